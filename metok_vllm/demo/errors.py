"""The demo's one error type."""


class DemoError(Exception):
    """What the user must know or change, as one sentence; the command prints it and exits with status 2."""
