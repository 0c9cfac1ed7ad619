"""What do whole requests gain over stock vLLM? `python -m benchmarks.engine`."""
