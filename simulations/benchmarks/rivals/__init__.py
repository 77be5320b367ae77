"""Other engines at the same work; each script runs by itself, in an environment without bract."""
