"""Checkpoints of the papers' own formats, written as transformers and this package read them."""
