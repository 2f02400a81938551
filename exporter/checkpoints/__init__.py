"""Checkpoints as folders on disk: opened, written, staged, recorded, verified."""
