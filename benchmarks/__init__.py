"""Benchmarks: of kernels, of whole requests, and of answers; see README.md."""
