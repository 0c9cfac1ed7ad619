"""What does compression cost in answers? `python -m benchmarks.accuracy`."""
