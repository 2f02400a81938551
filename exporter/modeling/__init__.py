"""Code that travels with checkpoints. The files here import nothing of the package."""
