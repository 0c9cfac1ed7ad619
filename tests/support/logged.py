"""What a module logs, whoever has configured vLLM's loggers before, and how."""

from __future__ import annotations

import logging


class Logged(logging.Logger):
    """A logger of no hierarchy that remembers."""

    def __init__(self) -> None:
        super().__init__("test", logging.DEBUG)
        self.lines: list[tuple[str, str]] = []
        """Level and message of each."""

    def handle(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))
