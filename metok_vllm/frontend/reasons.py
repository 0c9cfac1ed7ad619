"""Other libraries' errors as the end of one sentence."""

from __future__ import annotations

MOST = 200
"""Characters that are kept of an error."""


def reason(error: BaseException) -> str:
    """What an error says, on one line and without its last full stop; its type where it says nothing.

    Libraries that read checkpoints explain at length, on many lines; the start is what tells.
    """
    short = error.strerror if isinstance(error, OSError) else None
    said = short or " ".join(str(error).split()) or type(error).__name__
    if len(said) > MOST:
        said = said[:MOST].rpartition(" ")[0].rstrip(",;:([") + "\u2026"
    return said.rstrip(".")
