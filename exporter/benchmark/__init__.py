"""`bench`: latency, memory and operations."""
