"""Audits by experiment and by comparison, on public or made-up data."""
