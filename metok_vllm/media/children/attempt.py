"""One video on its way through a child: what the child is given, asks for, and says at its end."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import subprocess
import time
import weakref
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout  # its own in Python 3.10
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from metok_vllm.media.children import messages, words
from metok_vllm.media.children.budget import Budget, Grant
from metok_vllm.media.children.child import shared_size
from metok_vllm.media.children.forks import PATIENCE_S, Forks, NotWanted, SpawnerEnded, Stopped, logger
from metok_vllm.media.children.outcomes import Outcome
from metok_vllm.media.decoder import DecodedVideo
from metok_vllm.media.settings import VideoError, VideoSettings, too_late

LOOK_S = 0.1
"""Seconds after which who waits for memory looks whether its child is still there."""

NO_PROCESS = "The server cannot start a process for the video now: try again later."
_CRASHED = "The video makes its decoder crash; it is damaged, or made to do so."


class Busy(Exception):
    """There is no room for this video now; the message is one sentence for the user."""


class Ended(Exception):
    """A child ended without a video; the message is one sentence for the user."""

    def __init__(self, outcome: Outcome, sentence: str) -> None:
        super().__init__(sentence)
        self.outcome = outcome


@dataclass
class Job:
    """One video to decode."""

    data: bytes
    settings: VideoSettings
    number: int = 0
    """Of the child that is at it; 0 before the first."""
    cancelled: bool = False


class Memory:
    """A budget of bytes, and how long somebody waits for a share of it."""

    def __init__(self, mib: int) -> None:
        self.budget = Budget(mib << 20)
        self._mib = mib

    def reserved(self, size: int) -> Grant:
        """A share, there or to be waited for.

        Raises:
            VideoError: there never is so much.
        """
        self.check_possible(size)
        return self.budget.ask(size)

    def check_possible(self, size: int) -> None:
        """Refuse what there never is; raises `VideoError`."""
        if size > self.budget.total:
            raise VideoError(
                f"Decoding the video takes {size >> 20} MiB, more than the {self._mib} MiB that the server has for all"
                " videos together; ask for fewer or smaller frames."
            )

    def wait(self, grant: Grant, seconds: float, gone: Callable[[], bool] = lambda: False) -> None:
        """Wait, at most `seconds`; not for one that is `gone`, because others wait behind it.

        Raises:
            Busy: it was not there in time.
        """
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            with suppress(FutureTimeout):
                grant.ready.result(min(LOOK_S, rest))
                return
            if gone():
                self.budget.give_back(grant)
                return
        self.budget.give_back(grant)
        raise Busy(f"The server has no room for {grant.amount >> 20} MiB more of decoded video now: try again later.")

    def give_back_with(self, grant: Grant, frames: Any) -> None:
        """Give a share back when nobody uses `frames` any more."""
        weakref.finalize(frames, self.budget.give_back, grant)


class Attempt:
    """`job` in a fresh child of `forks`, its frames in `memory`. `run` it once."""

    def __init__(self, job: Job, forks: Forks, memory: Memory) -> None:
        self.job = job
        self._forks = forks
        self._memory = memory
        self._talk: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._grant: Grant | None = None  # for its frames and for what the decoder takes beside them
        self._frames_bytes = 0  # those of them that are the frames'
        self._room = 0  # bytes of frames that there is room for in the shared file
        self._count = 0  # how many frames' numbers there is room for behind them

    def run(self, number: int) -> DecodedVideo:
        """Hand the job to a child called `number`, and answer what it asks for until it ends.

        Raises:
            SpawnerEnded: the process that forks has ended, or hangs. The video may be tried again.
            Ended, VideoError: what is wrong with the file.
            Busy, OSError: memory, files or processes have run out.
        """
        job = self.job
        with ExitStack() as at_end:
            file, frames_file = _memory_file("video", at_end), _memory_file("frames", at_end)
            _fill(file, job.data)
            self._talk, other = messages.pair()
            self._talk.settimeout(job.settings.timeout_s + PATIENCE_S)
            at_end.callback(self._let_go)
            try:
                self._send(number, other, file, frames_file)
                return self._answered(frames_file)
            except messages.Garbled as error:
                logger().warning("METok: the decoder of a video is out of its mind (%s).", error)
                raise Ended(Outcome.BROKEN, _CRASHED) from None
            except TimeoutError:
                raise SpawnerEnded from None

    def give_up_forks(self) -> None:
        """After `SpawnerEnded`: have another process fork from now on."""
        self._forks.give_up(self._process)

    def _send(self, number: int, other: Any, file: int, frames_file: int) -> None:
        job, most = self.job, self._memory.budget.total
        stated = {"job": number, "settings": asdict(job.settings), "most_memory": most}
        with other:
            job.number = number  # by which it is ended from now on
            try:
                files = (file, frames_file, other.fileno())
                self._process = self._forks.send(stated, files, lambda: not job.cancelled)
            except NotWanted:
                raise Ended(Outcome.CANCELLED, "The client has gone.") from None
            except Stopped as error:
                raise Busy(str(error)) from None
            except RuntimeError as error:
                logger().error("%s", error)
                raise Busy(NO_PROCESS) from None

    def _answered(self, frames_file: int) -> DecodedVideo:
        """Answer the child until its last word, or the spawner's on how it ended."""
        for _ in range(words.MOST_WORDS):
            message = messages.receive(self._talk)
            if message is None:
                raise self._silent()
            if "reserve" in message:
                self._reserve(message["reserve"])
            elif "frames" in message:
                self._make_room(frames_file, *words.room(message, self.job.settings))
            elif "video" in message:
                return self._taken(frames_file, message)
            else:
                raise _why(message, self.job.settings)
            with suppress(BrokenPipeError):  # it has died meanwhile; the next message says how
                messages.send(self._talk, {})
        raise messages.Garbled("it talks without end")

    def _silent(self) -> Exception:
        """Why nobody says how the child ended: the spawner is gone, or the child kept it from speaking."""
        assert self._process is not None
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return Ended(Outcome.BROKEN, _CRASHED)
        return SpawnerEnded()

    def _await_end(self) -> bool:
        """End the child, which until then fills memory and may change its frames; whether it has ended."""
        self._forks.order(self.job.number, "kill")
        return messages.ended(self._talk, PATIENCE_S)

    def _let_go(self) -> None:
        """Nothing of this attempt is left; its memory is free when its child does not use it any more."""
        self._await_end()
        self._talk.close()
        if self._grant is not None:
            self._memory.budget.give_back(self._grant)

    def _reserve(self, asked: object) -> None:
        """Wait until there is room for frames and decoder; the child's clock stands still meanwhile."""
        if self._grant is not None:
            raise messages.Garbled("it asks for memory twice")
        self._frames_bytes, working = words.reserved(asked)
        self._grant = self._memory.reserved(self._frames_bytes + working)
        if not self._grant.ready.done():
            self._forks.order(self.job.number, "pause")
            self._memory.wait(self._grant, self.job.settings.timeout_s, lambda: messages.ended(self._talk))
            self._forks.order(self.job.number, "resume")

    def _make_room(self, frames_file: int, size: int, frames: int) -> None:
        """Make the shared file as large as the frames turned out to be."""
        if self._grant is None or not self._grant.held:
            raise messages.Garbled("it wants room before memory")
        more = size - self._frames_bytes
        if more > 0:  # the file's header had said less
            self._memory.check_possible(self._grant.amount + more)
            if not self._memory.budget.enlarge(self._grant, more):
                raise Busy(
                    "The server has no room now for frames larger than the video's header tells: try again later."
                )
            self._frames_bytes = size
        self._room, self._count = size, frames
        os.ftruncate(frames_file, shared_size(size, frames))

    def _taken(self, frames_file: int, message: dict[str, Any]) -> DecodedVideo:
        """The frames, in the memory that the child wrote; their share is given back when nobody uses them."""
        shape = words.shape(message.get("shape"), self._room, self._count)
        about = words.about(message["video"])
        if not self._await_end():  # it could still change them, after they have been looked at
            raise SpawnerEnded
        # Too small, it would end this process at an access.
        if os.fstat(frames_file).st_size != shared_size(self._room, self._count):
            raise messages.Garbled("its frames have another size")
        shared = mmap.mmap(frames_file, 0)
        frames = np.frombuffer(shared, np.uint8, math.prod(shape)).reshape(shape)
        numbers = np.frombuffer(shared, np.int64, shape[0], shared_size(self._room, 0))
        video = DecodedVideo(frames=frames, indices=words.indices(numbers, about["total_frames"]), **about)
        assert self._grant is not None  # there is room, so there is memory
        grant, self._grant = self._grant, None
        self._memory.budget.reduce(grant, self._frames_bytes)
        self._memory.give_back_with(grant, shared)
        return video


def _why(message: dict[str, Any], settings: VideoSettings) -> Exception:
    """The error for a child's last word, or for the spawner's about it."""
    if "error" in message:
        return VideoError(words.sentence(message["error"]))
    if "memory" in message:
        mib = words.number(message["memory"])
        return Ended(Outcome.MEMORY, f"Reading the video takes more than {mib} MiB of memory, or it is damaged.")
    if "late" in message:
        return Ended(Outcome.LATE, too_late(settings.timeout_s))
    if "no_process" in message:
        return OSError(ascii(message["no_process"])[:200])
    if "fault" in message:
        logger().error("METok: the decoder of a video failed: %s", ascii(message["fault"])[:600])
    return Ended(Outcome.BROKEN, _CRASHED)


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
