"""Runs in each worker's process: attention metadata, the pruned step, and what is written to the KV cache."""
