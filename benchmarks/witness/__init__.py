"""Does a real language model still answer when METok acts on it? `python -m benchmarks.witness`."""
