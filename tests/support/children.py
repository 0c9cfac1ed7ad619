"""The child processes of a decode pool, by what they do."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

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


def frames_mib(pid: int) -> float:
    """Memory of the file in which a process puts its frames; 0 if it has ended."""
    size = 0
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(file).startswith("/memfd:frames"):
                    size += file.stat().st_blocks * 512
    return size / 2**20


def _called(pool: DecodePool, name: str) -> list[psutil.Process]:
    assert pool.forks._process is not None
    return [one for one in psutil.Process(pool.forks._process.pid).children() if is_called(one, name)]
