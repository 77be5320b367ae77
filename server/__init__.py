"""The coordinator: rounds, aggregation, evaluation, checkpoints."""
