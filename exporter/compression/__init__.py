"""The steps of `compress`."""
