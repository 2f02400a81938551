"""Images with questions, and the batches that a model takes."""
