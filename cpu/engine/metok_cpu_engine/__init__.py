"""What vLLM's CPU build needs, on a machine without a GPU, to run Model Runner V2. See ../README.md."""
