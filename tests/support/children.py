"""The child processes of a decode pool, by what they do."""

from __future__ import annotations

from contextlib import suppress

import psutil

from metok_vllm.media.children.child import AT_WORK, IDLE
from metok_vllm.media.children.pool import DecodePool


def children(pool: DecodePool) -> list[psutil.Process]:
    """Those that have a job."""
    return _called(pool, AT_WORK)


def idle_children(pool: DecodePool) -> list[psutil.Process]:
    """Those that were forked ahead and wait."""
    return _called(pool, IDLE)


def is_called(process: psutil.Process, name: str) -> bool:
    """Whether a process lives and has this name."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.name() == name and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _called(pool: DecodePool, name: str) -> list[psutil.Process]:
    assert pool.forks._process is not None
    return [one for one in psutil.Process(pool.forks._process.pid).children() if is_called(one, name)]
