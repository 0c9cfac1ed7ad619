"""Decodes one case at a time, each in a process of its own, and measures the process from outside."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import asdict, dataclass

from metok_vllm.media.settings import VideoSettings


@dataclass(frozen=True)
class Outcome:
    """What became of a case."""

    kind: str
    """"frames", "refused" (a `VideoError`), or "broken": anything else."""
    said: str
    """The sentence; or the frames' shape, numbers and digest; or what broke."""
    seconds: float
    """Wall time of the decode."""
    peak_mib: float
    """The most memory that the process held, its own 60 MiB included."""


class Runner:
    """A small process that has the decoder loaded and forks for each case; it is ended by `close`."""

    def __init__(self, *, kill_after_s: float, address_space_mib: int) -> None:
        """A case is killed after `kill_after_s` seconds, and may map `address_space_mib` MiB."""
        command = [sys.executable, "-m", "tests.support.media_fuzz.child", str(kill_after_s), str(address_space_mib)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    def run_one(self, data: bytes, settings: VideoSettings) -> Outcome:
        """Decode `data`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        how = json.dumps(asdict(settings)).encode()
        self._process.stdin.write(struct.pack(">II", len(how), len(data)) + how + data)
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
