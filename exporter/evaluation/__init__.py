"""`evaluate`: exact match and fidelity, under budgets."""
