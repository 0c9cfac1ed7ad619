"""Runs jobs, each in a process of its own, one at a time; what was done before is read again.

A GPU's memory is free only when the process that took it has ended. A finished job's result stays in the work
folder under a name made of all that it depends on, so an interrupted calibration goes on where it was.

To import vLLM takes longer than to start a small engine. So while one process works the next one imports it,
and then waits for its job.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from metok_vllm.calibrate import worker
from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.jobs import Job, Result
from metok_vllm.demo.server import log_tail, signals_as_interrupt, why_it_died

POLL = 0.3  # seconds
GRACE = 10.0  # seconds that a process has for ending by itself


class Engines:
    """The work folder and the engines that fill it."""

    def __init__(self, folder: Path, told: Callable[[int], None]) -> None:
        """`told` hears of every request done, by how many there are more."""
        self.folder, self._told = folder, told
        self.started = self.read_again = 0
        self._next: _Worker | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CalibrateError(f"Cannot write {folder}: {error.strerror or error}.") from None

    def close(self) -> None:
        """End the process that waits for a job."""
        waiting, self._next = self._next, None
        if waiting is not None:
            _end(waiting.process)
            waiting.log.unlink(missing_ok=True)

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, job: Job) -> Result:
        """A job's result, from the folder where it is there.

        Raises:
            CalibrateError: the engine did not start, or ended.
        """
        file = self._result(job)
        result = _read(file)
        if result is not None:
            self.read_again += 1
            self._told(job.requests)
            return result
        self.started += 1
        with signals_as_interrupt():
            self._start(job, file)
        result = _read(file)
        if result is None:
            raise CalibrateError(f"The engine left no result (log: {self._log(file)}).")
        return result

    def keep_as(self, done: Job, other: Job) -> None:
        """A finished job's result is another's too."""
        shutil.copyfile(self._result(done), self._result(other))

    def _result(self, job: Job) -> Path:
        return self.folder / f"{job.name()}.result.json"

    def _log(self, file: Path) -> Path:
        return file.with_name(file.name.replace(".result.json", ".log"))

    def _start(self, job: Job, file: Path) -> None:
        stated, progress = (
            file.with_name(file.name.replace(".result.json", end)) for end in (".job.json", ".progress")
        )
        log = self._log(file)
        stated.write_text(job.model_dump_json())
        progress.write_text("0")
        ready = self._next or _Worker.started(self.folder)
        self._next = None
        process, done = ready.process, 0
        try:
            ready.log.replace(log)
            with contextlib.suppress(BrokenPipeError):  # it has ended already, and its log says why
                ready.give(stated, file, progress)
            if self.started > 1:  # so there will be more
                self._next = _Worker.started(self.folder)
            while process.poll() is None:
                time.sleep(POLL)
                done = self._tell(progress, done)
        finally:
            _end(process)
            progress.unlink(missing_ok=True)
        if process.returncode:
            why = why_it_died(log) or f"it ended with status {process.returncode}"
            raise CalibrateError(f"The engine failed: {why.rstrip('.')} (log: {log}).", details=log_tail(log))
        self._told(job.requests - done)

    def _tell(self, progress: Path, before: int) -> int:
        text = progress.read_text()
        now = int(text) if text.isdigit() else before
        self._told(max(0, now - before))
        return max(now, before)


@dataclass(frozen=True)
class _Worker:
    """A process that waits for a job, and what it prints."""

    process: subprocess.Popen[str]
    log: Path

    @classmethod
    def started(cls, folder: Path) -> _Worker:
        descriptor, log = tempfile.mkstemp(prefix="waiting-", suffix=".log", dir=folder)
        with open(descriptor, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                env=environment(),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends that one
            )
        return cls(process, Path(log))

    def give(self, *files: Path) -> None:
        """Tell it the files of its job: `worker.main` says which."""
        assert self.process.stdin is not None
        with self.process.stdin as told:
            json.dump([str(file) for file in files], told)


def environment() -> dict[str, str]:
    """This process's, and what a machine without a GPU needs."""
    import torch

    stated = dict(os.environ)
    stated.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        stated.setdefault("TRITON_INTERPRET", "1")
        stated.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    return stated


def _read(file: Path) -> Result | None:
    try:
        return Result.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:  # of another version, or not whole: it is made again
        return None


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and whatever it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
