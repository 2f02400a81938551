"""Modules that trace, and what is done with their graphs."""
