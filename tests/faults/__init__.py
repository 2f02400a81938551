"""Damaged files and killed runs: what the tool makes of them. `python -m faults.fuzz`, `python -m faults.kills`."""
