"""What things cost on this machine: each benchmark is a module that can be run alone."""
