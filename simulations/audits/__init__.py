"""The audit of the mechanism: canaries through the real client path, on public data alone."""
