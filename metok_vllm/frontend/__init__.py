"""Runs in the API server's process: command line, start-up checks,
and a request until the scheduler sees it.
"""
