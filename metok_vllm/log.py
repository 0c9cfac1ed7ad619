"""METok's loggers: children of vLLM's, whose handlers, format and level they then share."""

from __future__ import annotations

import logging

from vllm.logger import init_logger


def metok_logger(name: str) -> logging.Logger:
    """Logger for a module of this package. vLLM configures the logger `vllm` and its children only."""
    return init_logger(f"vllm.{name}")
