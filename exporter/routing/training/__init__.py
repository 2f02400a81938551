"""Training a router with the model frozen."""
