"""Runs in the engine core's process: how pruned prompts are cut into chunks, and which KV blocks they get."""
