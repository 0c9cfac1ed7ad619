"""METok's routes, metrics and status page. Runs in the API server's process."""
