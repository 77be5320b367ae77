"""Audits by experiment, of what is released and of how it is made."""
