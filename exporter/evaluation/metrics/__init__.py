"""Metrics as the benchmarks define them: one file a kind, all of them in `table.py`. Pure, but the judge."""
