"""What is told of a checkpoint: its card, tables and plots."""
