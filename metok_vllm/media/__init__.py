"""Video decoding: `decoder` (PyAV and numpy alone) and its vLLM adapter, `loader`.

Runs in the API server's process.
"""
