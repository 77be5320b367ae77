"""The private step: Poisson batches, per-example clipping, noise, and nothing else leaves."""
