"""The API server's hold on the process that forks the children: start, orders, a new one where it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from metok_vllm.media.children import messages
from metok_vllm.media.children.spawner import START

PATIENCE_S = 3.0
"""Seconds in which it takes an order; and beyond a child's time, after which it is given up itself."""

START_S = 60.0
"""Seconds that it may take to start, on a machine that is very busy."""

_PACKAGES = str(Path(__file__).parents[3])
"""Where this package is. An import hook may have found it, that `python -I` does not install."""

# For the C library. One malloc arena: each reserves 64 MiB of the address space that a child may have. And
# what costs a child most is touching memory for the first time: so it grows in large steps and in huge pages
# where there are such, and gives nothing back before its end.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(16 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_NO_CHILDREN = "METok cannot decode videos in a child process here"


class Stopped(Exception):
    """The server is shutting down; the message is one sentence for the user."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class NotWanted(Exception):
    """A job was given up before its child was forked."""


class SpawnerEnded(Exception):
    """The process that forks has ended or hangs: nothing that a file did."""


class Forks:
    """One process that forks; another one where it has ended. May be used from several threads."""

    def __init__(self) -> None:
        self.stopped = False
        """For good."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Any = None

    def start(self) -> None:
        """Start it, so that the first video need not wait for it.

        Raises:
            RuntimeError: it cannot work here, in one sentence.
            Stopped: `stop` was called.
        """
        with self._lock:
            self._running()

    def stop(self) -> None:
        """End it and all children."""
        self.stopped = True
        if (process := self._process) is not None:
            process.kill()  # whoever holds the lock may be waiting for it
        with self._lock:
            self._end()

    def send(self, job: dict[str, Any], files: Sequence[int], wanted: Callable[[], bool]) -> subprocess.Popen[bytes]:
        """Have a child forked for a job, if it still is `wanted`; an `order` to end it comes after that.

        Returns:
            The process that was asked.

        Raises:
            NotWanted: it is not.
            SpawnerEnded: it did not hear.
            RuntimeError, Stopped: as `start`.
        """
        with self._lock:
            if not wanted():
                raise NotWanted
            control, process = self._running(), self._process
            assert process is not None
            try:
                messages.send(control, job, files)
            except OSError:
                raise SpawnerEnded from None
            return process

    def order(self, number: int, do: str) -> None:
        """Say something about a job; nothing happens where the job or the process has ended."""
        with self._lock, suppress(OSError):
            if self._control is not None and number:
                messages.send(self._control, {"job": number, "do": do})

    def give_up(self, process: subprocess.Popen[bytes] | None) -> None:
        """End `process`, dead or deaf, if it still is the one; the jobs of its children are tried again."""
        with self._lock:
            if self._process is process and not self.stopped:
                logger().warning("METok: the process that decodes videos ended or hangs, and is started again.")
                self._end()

    def _running(self) -> Any:
        """The control socket of a process that lives. Holds `_lock`."""
        if self.stopped:
            raise Stopped
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._control, other = messages.pair()
            try:
                self._process = _started(other.fileno())
            except OSError as error:
                raise RuntimeError(f"{_NO_CHILDREN}: {error}.") from None
            finally:
                other.close()
            self._await_ready()
        return self._control

    def _await_ready(self) -> None:
        """Until it has tried a child, which takes it about half a second."""
        self._control.settimeout(START_S)
        try:
            ready = messages.receive(self._control)
        except TimeoutError:
            ready = None
        if ready is None or ready["broken"] is not None:
            self._end()
            if self.stopped:
                raise Stopped
            reason = "it does not start" if ready is None else ready["broken"]
            raise RuntimeError(f"{_NO_CHILDREN}: {reason}.")
        if not ready["filtered"]:
            logger().warning(
                "METok: the processes that decode videos have limits, but no filter of system calls: %s.",
                ready["unfiltered"],
            )
        self._control.settimeout(PATIENCE_S)  # so nobody hangs where it hangs

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None


def logger() -> logging.Logger:
    """vLLM's. Taken where it is needed, because the rest does without vLLM, which takes seconds to import."""
    from metok_vllm.log import metok_logger

    return metok_logger(__name__)


def _started(control: int) -> subprocess.Popen[bytes]:
    """The process that forks: small, without this one's threads, secrets or environment."""
    kept = {name: value for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if (value := os.environ.get(name))}
    env = {**kept, **_ALLOCATOR, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if not sys.executable:
        raise FileNotFoundError("Python does not know its own program (sys.executable)")
    return subprocess.Popen(
        [sys.executable, "-I", "-c", START, str(control), *map(os.path.abspath, [*sys.path, _PACKAGES])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=env,
        cwd="/",
        pass_fds=(control,),
        start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
    )
