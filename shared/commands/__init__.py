"""The commands of this floor, a module each: calibrate, audit."""
