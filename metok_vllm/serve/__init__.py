"""METok's part of vLLM's HTTP server."""
