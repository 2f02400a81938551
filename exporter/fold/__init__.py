"""Folds: putting what the dropped layers did into the weights that stay. One file a method.

Their rows stand in `exporter/methods.py`. A fold takes a FoldJob and its own options and returns new tensors by (old
layer index, name inside the layer).
"""
