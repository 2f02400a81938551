"""`compare`: methods side by side on the user's model and data."""
