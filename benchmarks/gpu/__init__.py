"""All that a machine with a GPU can say of METok, in one command: `python -m benchmarks.gpu`."""
