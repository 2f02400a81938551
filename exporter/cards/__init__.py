"""The description of a checkpoint: its card, tables and plots."""
