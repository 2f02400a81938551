"""Routed checkpoints: budgets, rules, and the steps of `route`."""
