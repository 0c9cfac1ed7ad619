"""Video decoding for METok: `decoder` (PyAV and numpy alone) and its vLLM adapter, `loader`."""
