"""The API server's side: who may decode when, in how much memory, and what came of it.

One `DecodePool` a process. `decode` blocks its thread, `decode_async` an event loop's task. A task that is
cancelled, because its client has gone, ends its child.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any

from metok_vllm.media.children.attempt import NO_PROCESS, Attempt, Busy, Ended, Job, Memory
from metok_vllm.media.children.budget import Budget, BudgetFull, Grant
from metok_vllm.media.children.forks import Forks, SpawnerEnded, Stopped, logger
from metok_vllm.media.children.outcomes import Outcome, publish
from metok_vllm.media.decoder import DecodedVideo
from metok_vllm.media.settings import PoolLimits, VideoError, VideoSettings

__all__ = ["Busy", "DecodePool"]


class DecodePool:
    """Decodes video files in child processes, within `limits` over all of them."""

    def __init__(self, limits: PoolLimits | None = None) -> None:
        self.limits = limits or PoolLimits()
        self.places = Budget(self.limits.at_once, self.limits.waiting)
        """One for each child at work."""
        self._room = Memory(self.limits.memory_mib)
        self.memory = self._room.budget
        """Bytes of frames that are in use anywhere in this process, and of decoders at work."""
        self.forks = Forks()
        self._numbers = count(1)
        self.publish()

    def publish(self) -> None:
        """State in the metrics how busy the pool is."""
        publish(self.places.used, self.places.waiting, self.memory.used)

    def start(self) -> None:
        """Start the process that forks the children, so that the first video need not wait for it.

        Raises:
            RuntimeError: it cannot work here, in one sentence.
            Busy: the pool has been stopped.
        """
        try:
            self.forks.start()
        except Stopped as error:
            raise Busy(str(error)) from None

    def stop(self) -> None:
        """End it and all children; whoever waits for a video gets an error. For the server's shutdown."""
        self.forks.stop()

    @property
    def stopped(self) -> bool:
        """Whether it has been stopped, which is for good."""
        return self.forks.stopped

    def decode(self, data: bytes, settings: VideoSettings) -> DecodedVideo:
        """Decode as `metok_vllm.media.decoder.decode_video` does, in a child.

        Raises:
            VideoError: as there; and where the child was killed, or died of the file.
            Busy: there is no room, and no room to wait for some.
        """
        place = self._place()
        try:
            place.ready.result()
            return self._decode(Job(data, settings))
        finally:
            self.places.give_back(place)

    async def decode_async(self, data: bytes, settings: VideoSettings) -> DecodedVideo:
        """As `decode`, for a task of an event loop. Cancelling it ends the child."""
        place = self._place()
        job = Job(data, settings)
        try:
            await asyncio.wrap_future(place.ready)
            done = _in_thread(lambda: self._decode(job), lambda: self.places.give_back(place))
        except RuntimeError as error:
            self.places.give_back(place)
            Outcome.BUSY.count()
            logger().error("METok: there is no thread for a video: %s", error)
            raise Busy(NO_PROCESS) from None
        except BaseException:
            self.places.give_back(place)
            raise
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            job.cancelled = True
            # Another spawner may be starting just now, for which the event loop must not wait.
            with suppress(RuntimeError):  # no thread to be had: the job goes on, and nobody takes its video
                threading.Thread(target=self.forks.order, args=(job.number, "kill"), daemon=True).start()
            raise

    def hold(self, size: int, seconds: float) -> Grant:
        """Room for `size` bytes of frames that come without a child; waits for it, at most `seconds`.

        Raises:
            VideoError: the server never has so much.
            Busy: there was none in time.
        """
        grant = self._room.reserved(size)
        self._room.wait(grant, seconds)
        return grant

    def give_back_with(self, grant: Grant, frames: Any) -> None:
        """Give the room back when nobody uses `frames` any more."""
        self._room.give_back_with(grant, frames)

    def _place(self) -> Grant:
        try:
            return self.places.ask(1)
        except BudgetFull:
            Outcome.BUSY.count()
            raise Busy(
                f"The server is decoding {self.limits.at_once} videos and {self.limits.waiting} wait: try again later."
            ) from None

    def _decode(self, job: Job) -> DecodedVideo:
        outcome = Outcome.BROKEN
        self.publish()
        try:
            video = self._in_a_child(job)
            outcome = Outcome.DECODED
            return video
        except SpawnerEnded:
            outcome = Outcome.BUSY
            raise Busy("The video was not decoded, because the process that decodes videos ended: try again.") from None
        except Ended as error:
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
            if not job.cancelled:
                logger().error("METok: a video was not decoded: %s", error)
            raise Busy(NO_PROCESS) from None
        finally:
            (Outcome.CANCELLED if job.cancelled else outcome).count()
            self.publish()

    def _in_a_child(self, job: Job) -> DecodedVideo:
        attempt = Attempt(job, self.forks, self._room)
        try:
            return attempt.run(next(self._numbers))
        except SpawnerEnded:  # not the file's doing, as far as one can tell: once more
            attempt.give_up_forks()
            return Attempt(job, self.forks, self._room).run(next(self._numbers))


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
