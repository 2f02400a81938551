"""`push` and `reproduce`."""
