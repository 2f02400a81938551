"""The search for an outcome: which compression is so much faster, or so small, and loses so little."""
