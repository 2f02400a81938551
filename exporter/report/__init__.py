"""`--report DIR`: one self-contained report.html of what `evaluate`, `compare` or `bench` measured."""
