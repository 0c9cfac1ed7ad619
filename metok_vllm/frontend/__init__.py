"""Runs in the API server's process: the command line, start-up checks, and what becomes of a request before the scheduler sees it."""
