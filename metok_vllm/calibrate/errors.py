"""Calibration's one error type."""

from __future__ import annotations


class CalibrateError(Exception):
    """What the user must know or change, as one sentence; the command prints it and exits with status 2."""

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details
        """Lines to show before the sentence: the end of a log."""
