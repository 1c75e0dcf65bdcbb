"""Statistics in, range out: one calibrator a file."""
