"""A loaded model, opened up: layers run one by one, watched, and its answers."""
