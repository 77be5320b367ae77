"""Audits by experiment: what a released model gives away, and whether the mechanism is as claimed."""
