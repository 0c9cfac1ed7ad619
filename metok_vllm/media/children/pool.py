"""The API server's side: who may decode when, in how much memory, and what came of it.

One `DecodePool` a process. `decode` blocks its thread, `decode_async` an event loop's task. A task that is
cancelled, because its client has gone, ends its child.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # its own in Python 3.10
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from metok_vllm.media.children import messages
from metok_vllm.media.children.budget import Budget, BudgetFull, Grant
from metok_vllm.media.children.child import ABOUT, shared_size
from metok_vllm.media.children.outcomes import Outcome, publish
from metok_vllm.media.children.spawner import START
from metok_vllm.media.decoder import DecodedVideo
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings, too_late

PATIENCE_S = 3.0
"""Seconds beyond a child's time after which the process that should have killed it is given up itself."""

START_S = 60.0
"""Seconds that the process may take to start, on a machine that is very busy."""

_SPAWNER_ENDED = "the process that decodes videos ended"


class Busy(Exception):
    """There is no room for this video now; the message is one sentence for the user."""


class _SpawnerEnded(Exception):
    """Nothing that the file did."""


class _Ended(Exception):
    """A child ended without a video; the message is one sentence for the user."""

    def __init__(self, outcome: Outcome, sentence: str) -> None:
        super().__init__(sentence)
        self.outcome = outcome


@dataclass
class _Job:
    """One video on its way through a child."""

    data: bytes
    settings: VideoSettings
    number: int = 0
    talk: Any = None
    spawner: Any = None
    """The process that forked for it."""
    memory: Grant | None = None
    """For its frames and for what the decoder takes beside them."""
    frames_bytes: int = 0
    """Bytes of `memory` that are the frames'."""
    room: int = 0
    """Bytes of frames that there is room for in the shared file."""
    cancelled: bool = False


class DecodePool:
    """Decodes video files in child processes, within `limits` over all of them."""

    def __init__(self, limits: PoolLimits | None = None) -> None:
        self.limits = limits or PoolLimits()
        self.places = Budget(self.limits.at_once, self.limits.waiting)
        """One for each child at work."""
        self.memory = Budget(self.limits.memory_mib << 20)
        """Bytes of frames that are in use anywhere in this process, and of decoders at work."""
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._spawner: subprocess.Popen[bytes] | None = None
        self._control: Any = None
        self._stopped = False
        self.publish()

    def publish(self) -> None:
        """State in the metrics how busy the pool is."""
        publish(self.places.used, self.places.waiting, self.memory.used)

    # --- life ---

    def start(self) -> None:
        """Start the process that forks the children, so that the first video need not wait for it."""
        with self._lock:
            self._running()

    def stop(self) -> None:
        """End it and all children; whoever waits for a video gets an error. For the server's shutdown."""
        with self._lock:
            self._stopped = True
            self._end_spawner()

    @property
    def stopped(self) -> bool:
        """Whether it has been stopped, which is for good."""
        return self._stopped

    def _running(self) -> Any:
        """The control socket of a process that lives. Holds `_lock`."""
        if self._stopped:
            raise Busy("The server is shutting down.")
        if self._spawner is None or self._spawner.poll() is not None:
            self._end_spawner()
            self._control, other = messages.pair()
            self._spawner = _started(other.fileno())
            other.close()
            self._await_spawner()
        return self._control

    def _await_spawner(self) -> None:
        """Until it has tried a child, which takes it about half a second."""
        self._control.settimeout(START_S)
        try:
            ready = messages.receive(self._control)
        except TimeoutError:
            ready = None
        if ready is None or ready["broken"] is not None:
            self._end_spawner()
            reason = "it does not start" if ready is None else ready["broken"]
            raise RuntimeError(f"METok cannot decode videos in a child process here: {reason}.")
        if not ready["filtered"]:
            _logger().warning(
                "METok: the processes that decode videos have limits, but no filter of system calls: %s.",
                ready["unfiltered"],
            )
        self._control.settimeout(None)

    def _end_spawner(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._spawner is not None:
            self._spawner.kill()
            self._spawner.wait()
        self._spawner = self._control = None

    # --- one video ---

    def decode(self, data: bytes, settings: VideoSettings) -> DecodedVideo:
        """Decode as `metok_vllm.media.decoder.decode_video` does, in a child.

        Raises:
            VideoError: as there; and where the child was killed, or died of the file.
            Busy: there is no room, and no room to wait for some.
        """
        place = self._place()
        try:
            place.ready.result()
            return self._decode(_Job(data, settings))
        finally:
            self.places.give_back(place)

    async def decode_async(self, data: bytes, settings: VideoSettings) -> DecodedVideo:
        """As `decode`, for a task of an event loop. Cancelling it ends the child."""
        place = self._place()
        job = _Job(data, settings)
        try:
            await asyncio.wrap_future(place.ready)
            done = _in_thread(lambda: self._decode(job), lambda: self.places.give_back(place))
        except BaseException:
            self.places.give_back(place)
            raise
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            job.cancelled = True
            self._order(job, "kill")
            raise

    def hold(self, size: int, seconds: float) -> Grant:
        """Room for `size` bytes of frames that come without a child; waits for it, at most `seconds`.

        Raises:
            VideoError: the server never has so much.
            Busy: there was none in time.
        """
        grant = self._reserved(size)
        self._await_room(grant, seconds)
        return grant

    def give_back_with(self, grant: Grant, frames: Any) -> None:
        """Give the room back when nobody uses `frames` any more."""
        weakref.finalize(frames, self.memory.give_back, grant)

    def _place(self) -> Grant:
        try:
            return self.places.ask(1)
        except BudgetFull:
            Outcome.BUSY.count()
            raise Busy(
                f"The server is decoding {self.limits.at_once} videos and {self.limits.waiting} wait: try again later."
            ) from None

    def _decode(self, job: _Job) -> DecodedVideo:
        outcome = Outcome.BROKEN
        try:
            try:
                video = self._attempt(job)
            except _SpawnerEnded:  # not the file's doing, as far as one can tell: once more
                self._give_up_spawner(job)
                video = self._attempt(job)
            outcome = Outcome.DECODED
            return video
        except _SpawnerEnded as error:
            outcome = Outcome.BUSY
            raise Busy(f"The video was not decoded, because {error}: try again.") from None
        except _Ended as error:
            outcome = error.outcome
            raise VideoError(str(error)) from None
        except VideoError:
            outcome = Outcome.REFUSED
            raise
        except Busy:
            outcome = Outcome.BUSY
            raise
        finally:
            (Outcome.CANCELLED if job.cancelled else outcome).count()
            self.publish()

    def _attempt(self, job: _Job) -> DecodedVideo:
        """Hand `job` to a fresh child and answer what it asks for, until it ends."""
        self.publish()
        file = _memory_file(job.data)
        frames_file = os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        job.talk, other = messages.pair()
        job.talk.settimeout(job.settings.timeout_s + PATIENCE_S)
        try:
            self._send(job, other, file, frames_file)
            while (message := messages.receive(job.talk)) is not None:
                if "reserve" in message:
                    self._reserve(job, message["reserve"])
                elif "frames" in message:
                    self._make_room(job, frames_file, int(message["frames"]), int(message["count"]))
                elif "video" in message:
                    return self._taken(job, frames_file, message["video"], message["shape"])
                else:
                    raise _why(message, job.settings)
                messages.send(job.talk, {})
            raise _SpawnerEnded(_SPAWNER_ENDED)
        except (TimeoutError, BrokenPipeError):
            raise _SpawnerEnded(_SPAWNER_ENDED) from None
        finally:
            self._order(job, "kill")
            job.talk.close()
            os.close(file)
            os.close(frames_file)
            if job.memory is not None:
                self.memory.give_back(job.memory)
                job.memory = None

    def _send(self, job: _Job, other: Any, file: int, frames_file: int) -> None:
        job.number = next(self._numbers)
        stated = {
            "job": job.number,
            "settings": asdict(job.settings),
            "most_memory": self.memory.total,
        }
        with other, self._lock:
            if job.cancelled:
                raise _Ended(Outcome.CANCELLED, "The client has gone.")
            control, job.spawner = self._running(), self._spawner
            try:
                messages.send(control, stated, (file, frames_file, other.fileno()))
            except OSError:
                raise _SpawnerEnded(_SPAWNER_ENDED) from None

    def _order(self, job: _Job, do: str) -> None:
        """Tell the spawner something about a job; nothing happens where the job or the spawner has ended."""
        with self._lock, suppress(OSError):
            if self._control is not None and job.number:
                messages.send(self._control, {"job": job.number, "do": do})

    def _give_up_spawner(self, job: _Job) -> None:
        """End the process that forked for `job`, dead or deaf; its other children's jobs are tried again."""
        with self._lock:
            if self._spawner is job.spawner and not self._stopped:
                _logger().warning("METok: %s or hangs, and is started again.", _SPAWNER_ENDED)
                self._end_spawner()

    # --- its memory ---

    def _reserve(self, job: _Job, asked: dict[str, int]) -> None:
        """Wait until there is room for the job's frames and its decoder; its clock stands still meanwhile."""
        job.frames_bytes = int(asked["frames"])
        job.memory = self._reserved(job.frames_bytes + int(asked["working"]))
        if not job.memory.ready.done():
            self._order(job, "pause")
            self._await_room(job.memory, job.settings.timeout_s)
            self._order(job, "resume")

    def _await_room(self, grant: Grant, seconds: float) -> None:
        try:
            grant.ready.result(seconds)
        except FutureTimeout:
            self.memory.give_back(grant)
            raise Busy(
                f"The server has no room for {grant.amount >> 20} MiB more of decoded video now: try again later."
            ) from None

    def _reserved(self, size: int) -> Grant:
        self._check_possible(size)
        return self.memory.ask(size)

    def _check_possible(self, size: int) -> None:
        if size > self.memory.total:
            raise VideoError(
                f"Decoding the video takes {size >> 20} MiB, more than the {self.limits.memory_mib} MiB that the server"
                " has for all videos together; ask for fewer or smaller frames."
            )

    def _make_room(self, job: _Job, frames_file: int, size: int, frames: int) -> None:
        """Make the shared file as large as the frames turned out to be."""
        assert job.memory is not None
        more = size - job.frames_bytes
        if more > 0:  # the file's header had said less
            self._check_possible(job.memory.amount + more)
            if not self.memory.enlarge(job.memory, more):
                raise Busy(
                    "The server has no room now for frames larger than the video's header tells: try again later."
                )
            job.frames_bytes = size
        job.room = size
        os.ftruncate(frames_file, shared_size(size, frames))

    def _taken(self, job: _Job, frames_file: int, about: dict[str, Any], shape: list[int]) -> DecodedVideo:
        """The frames, in the memory that the child wrote; their share is given back when nobody uses them."""
        assert job.memory is not None
        # Shrunk by a child that has gone mad, the file would end this process at the next access.
        fcntl.fcntl(frames_file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        shared = mmap.mmap(frames_file, 0)
        frames = np.frombuffer(shared, np.uint8, math.prod(shape)).reshape(shape)
        indices = np.frombuffer(shared, np.int64, shape[0], shared_size(job.room, 0)).tolist()
        memory, job.memory = job.memory, None
        self.memory.reduce(memory, job.frames_bytes)
        self.give_back_with(memory, shared)
        return DecodedVideo(frames=frames, indices=indices, **{name: about[name] for name in ABOUT})


def _why(message: dict[str, Any], settings: VideoSettings) -> _Ended | VideoError:
    """The error for a child's last word, or for the spawner's about it."""
    if "error" in message:
        return VideoError(message["error"])
    if "memory" in message:
        return _Ended(
            Outcome.MEMORY, f"Reading the video takes more than {message['memory']} MiB of memory, or it is damaged."
        )
    if "late" in message:
        return _Ended(Outcome.LATE, too_late(settings.timeout_s))
    if "fault" in message:
        _logger().error("METok: the decoder of a video failed: %s", ascii(message["fault"]))
    return _Ended(Outcome.BROKEN, "The video makes its decoder crash; it is damaged, or made to do so.")


def _memory_file(data: bytes) -> int:
    """An open file in memory with `data` in it, which nobody can change any more."""
    file = os.memfd_create("video", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return file


def _logger() -> logging.Logger:
    # Here, because the rest does without vLLM, which takes seconds to import.
    from metok_vllm.log import metok_logger

    return metok_logger(__name__)


def _in_thread(work: Callable[[], DecodedVideo], at_end: Callable[[], None]) -> Future[DecodedVideo]:
    """Run `work` in a thread that does not keep the process from ending, then `at_end`."""
    done: Future[DecodedVideo] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            at_end()
            done.set_exception(error)
        else:
            at_end()
            done.set_result(result)

    threading.Thread(target=run, name="metok-video", daemon=True).start()
    return done


def _started(control: int) -> subprocess.Popen[bytes]:
    """The process that forks: small, without this one's threads, secrets or environment."""
    kept = {name: value for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if (value := os.environ.get(name))}
    # One malloc arena: each reserves 64 MiB of the address space that a child may have.
    env = {**kept, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", START, str(control), *map(os.path.abspath, sys.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=env,
        cwd="/",
        pass_fds=(control,),
        start_new_session=True,  # a Ctrl-C in the terminal is the server's to handle
    )
