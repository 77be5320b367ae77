"""A site: its policy and gate, its private training, its end of the federation."""
