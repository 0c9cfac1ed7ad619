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
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # its own in Python 3.10
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from metok_vllm.media.children import messages, words
from metok_vllm.media.children.budget import Budget, BudgetFull, Grant
from metok_vllm.media.children.child import shared_size
from metok_vllm.media.children.outcomes import Outcome, publish
from metok_vllm.media.children.spawner import START
from metok_vllm.media.decoder import DecodedVideo
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings, too_late

PATIENCE_S = 3.0
"""Seconds beyond a child's time after which the process that should have killed it is given up itself."""

START_S = 60.0
"""Seconds that the process may take to start, on a machine that is very busy."""

LOOK_S = 0.1
"""Seconds after which who waits for memory looks whether its child is still there."""

_PACKAGES = str(Path(__file__).parents[3])
"""Where this package is. An import hook may have found it, that `python -I` does not install."""

_SPAWNER_ENDED = "the process that decodes videos ended"
_CRASHED = "The video makes its decoder crash; it is damaged, or made to do so."
_NO_CHILDREN = "METok cannot decode videos in a child process here"
_NO_PROCESS = "The server cannot start a process for the video now: try again later."


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
    count: int = 0
    """How many frames' numbers there is room for behind them."""
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
        self._stopped = True
        if (spawner := self._spawner) is not None:
            spawner.kill()  # whoever holds the lock may be waiting for it
        with self._lock:
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
            try:
                self._spawner = _started(other.fileno())
            except OSError as error:
                raise RuntimeError(f"{_NO_CHILDREN}: {error}.") from None
            finally:
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
            if self._stopped:
                raise Busy("The server is shutting down.")
            reason = "it does not start" if ready is None else ready["broken"]
            raise RuntimeError(f"{_NO_CHILDREN}: {reason}.")
        if not ready["filtered"]:
            _logger().warning(
                "METok: the processes that decode videos have limits, but no filter of system calls: %s.",
                ready["unfiltered"],
            )
        self._control.settimeout(PATIENCE_S)  # so nobody hangs where it hangs

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
        except RuntimeError as error:
            self.places.give_back(place)
            Outcome.BUSY.count()
            _logger().error("METok: there is no thread for a video: %s", error)
            raise Busy(_NO_PROCESS) from None
        except BaseException:
            self.places.give_back(place)
            raise
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            job.cancelled = True
            # Another spawner may be starting just now, for which the event loop must not wait.
            with suppress(RuntimeError):  # no thread to be had: the job goes on, and nobody takes its video
                threading.Thread(target=self._order, args=(job, "kill"), daemon=True).start()
            raise

    def hold(self, size: int, seconds: float) -> Grant:
        """Room for `size` bytes of frames that come without a child; waits for it, at most `seconds`.

        Raises:
            VideoError: the server never has so much.
            Busy: there was none in time.
        """
        grant = self._reserved(size)
        self._await_room(grant, seconds, lambda: False)
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
        except OSError as error:  # files, memory or processes have run out
            outcome = Outcome.BUSY
            _logger().error("METok: a video was not decoded: %s", error)
            raise Busy(_NO_PROCESS) from None
        finally:
            (Outcome.CANCELLED if job.cancelled else outcome).count()
            self.publish()

    def _attempt(self, job: _Job) -> DecodedVideo:
        """Hand `job` to a fresh child and answer what it asks for, until it ends."""
        self.publish()
        with ExitStack() as at_end:
            file, frames_file = _memory_file("video", at_end), _memory_file("frames", at_end)
            _fill(file, job.data)
            job.talk, other = messages.pair()
            job.talk.settimeout(job.settings.timeout_s + PATIENCE_S)
            at_end.callback(self._let_go, job)
            try:
                self._send(job, other, file, frames_file)
                return self._answered(job, frames_file)
            except messages.Garbled as error:
                _logger().warning("METok: the decoder of a video is out of its mind (%s).", error)
                raise _Ended(Outcome.BROKEN, _CRASHED) from None
            except TimeoutError:
                raise _SpawnerEnded(_SPAWNER_ENDED) from None

    def _answered(self, job: _Job, frames_file: int) -> DecodedVideo:
        """Answer the child until its last word, or the spawner's on how it ended."""
        for _ in range(words.MOST_WORDS):
            message = messages.receive(job.talk)
            if message is None:
                raise _silent(job)
            if "reserve" in message:
                self._reserve(job, message["reserve"])
            elif "frames" in message:
                self._make_room(job, frames_file, *words.room(message, job.settings))
            elif "video" in message:
                return self._taken(job, frames_file, message)
            else:
                raise _why(message, job.settings)
            with suppress(BrokenPipeError):  # it has died meanwhile; the next message says how
                messages.send(job.talk, {})
        raise messages.Garbled("it talks without end")

    def _await_end(self, job: _Job) -> bool:
        """End the child, which until then fills memory and may change its frames; whether it has ended."""
        self._order(job, "kill")
        return messages.ended(job.talk, PATIENCE_S)

    def _let_go(self, job: _Job) -> None:
        """Nothing of this attempt is left; its memory is free when its child does not use it any more."""
        self._await_end(job)
        job.talk.close()
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
            try:
                control, job.spawner = self._running(), self._spawner
            except RuntimeError as error:
                _logger().error("%s", error)
                raise Busy(_NO_PROCESS) from None
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

    def _reserve(self, job: _Job, asked: object) -> None:
        """Wait until there is room for the job's frames and its decoder; its clock stands still meanwhile."""
        if job.memory is not None:
            raise messages.Garbled("it asks for memory twice")
        job.frames_bytes, working = words.reserved(asked)
        job.memory = self._reserved(job.frames_bytes + working)
        if not job.memory.ready.done():
            self._order(job, "pause")
            self._await_room(job.memory, job.settings.timeout_s, lambda: messages.ended(job.talk))
            self._order(job, "resume")

    def _await_room(self, grant: Grant, seconds: float, gone: Callable[[], bool]) -> None:
        """Wait, at most `seconds`; not for one that is `gone`, because others wait behind it."""
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            with suppress(FutureTimeout):
                grant.ready.result(min(LOOK_S, rest))
                return
            if gone():
                self.memory.give_back(grant)
                return
        self.memory.give_back(grant)
        raise Busy(f"The server has no room for {grant.amount >> 20} MiB more of decoded video now: try again later.")

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
        if job.memory is None or not job.memory.held:
            raise messages.Garbled("it wants room before memory")
        more = size - job.frames_bytes
        if more > 0:  # the file's header had said less
            self._check_possible(job.memory.amount + more)
            if not self.memory.enlarge(job.memory, more):
                raise Busy(
                    "The server has no room now for frames larger than the video's header tells: try again later."
                )
            job.frames_bytes = size
        job.room, job.count = size, frames
        os.ftruncate(frames_file, shared_size(size, frames))

    def _taken(self, job: _Job, frames_file: int, message: dict[str, Any]) -> DecodedVideo:
        """The frames, in the memory that the child wrote; their share is given back when nobody uses them."""
        shape, about = words.shape(message.get("shape"), job.room, job.count), words.about(message["video"])
        if not self._await_end(job):  # it could still change them, after they have been looked at
            raise _SpawnerEnded(_SPAWNER_ENDED)
        # Too small, it would end this process at an access.
        if os.fstat(frames_file).st_size != shared_size(job.room, job.count):
            raise messages.Garbled("its frames have another size")
        shared = mmap.mmap(frames_file, 0)
        frames = np.frombuffer(shared, np.uint8, math.prod(shape)).reshape(shape)
        numbers = np.frombuffer(shared, np.int64, shape[0], shared_size(job.room, 0))
        video = DecodedVideo(frames=frames, indices=words.indices(numbers, about["total_frames"]), **about)
        assert job.memory is not None  # there is room, so there is memory
        memory, job.memory = job.memory, None
        self.memory.reduce(memory, job.frames_bytes)
        self.give_back_with(memory, shared)
        return video


def _silent(job: _Job) -> Exception:
    """Why nobody says how the child ended: the spawner is gone, or the child kept it from speaking."""
    try:
        job.spawner.wait(1)
    except subprocess.TimeoutExpired:
        return _Ended(Outcome.BROKEN, _CRASHED)
    return _SpawnerEnded(_SPAWNER_ENDED)


def _why(message: dict[str, Any], settings: VideoSettings) -> Exception:
    """The error for a child's last word, or for the spawner's about it."""
    if "error" in message:
        return VideoError(words.sentence(message["error"]))
    if "memory" in message:
        mib = words.number(message["memory"])
        return _Ended(Outcome.MEMORY, f"Reading the video takes more than {mib} MiB of memory, or it is damaged.")
    if "late" in message:
        return _Ended(Outcome.LATE, too_late(settings.timeout_s))
    if "no_process" in message:
        return OSError(ascii(message["no_process"])[:200])
    if "fault" in message:
        _logger().error("METok: the decoder of a video failed: %s", ascii(message["fault"])[:600])
    return _Ended(Outcome.BROKEN, _CRASHED)


def _memory_file(name: str, at_end: ExitStack) -> int:
    """A new file in memory, open until `at_end`."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    at_end.callback(os.close, file)
    return file


def _fill(file: int, data: bytes) -> None:
    """Put `data` in a file in memory, which nobody can change any more then."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)


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
