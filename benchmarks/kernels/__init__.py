"""How fast is each Triton kernel? `python -m benchmarks.kernels`."""
