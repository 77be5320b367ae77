"""The commands of this floor, a module each: audit, calibrate, keys."""
