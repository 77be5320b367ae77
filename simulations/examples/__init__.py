"""Examples to copy: what a user of bract writes."""
