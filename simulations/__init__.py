"""Many sites on one machine: the grid, the experiments, and the commands that run them."""
