"""Other libraries' errors as the end of one sentence."""

from __future__ import annotations

MOST = 200
"""Characters that are kept of an error."""


def reason(error: BaseException) -> str:
    """What an error says, on one line and without its last full stop; its type where it says nothing.

    Libraries that read checkpoints explain at length, on many lines; the start is what tells.
    """
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    else:
        said = " ".join(str(error).split())
    said = said or type(error).__name__
    return said.rstrip(".") if len(said) <= MOST else said[: MOST - 3].rstrip() + "..."
