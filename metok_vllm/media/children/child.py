"""Decode one video file in a process that can do nothing else. Runs in a fork of `spawner`."""

from __future__ import annotations

import math
import mmap
import os
import re
import socket
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from metok_vllm.media.children import messages, warm_up
from metok_vllm.media.children.confine import call_yourself, confine, leave_with_parent, limit_files, limit_memory
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoError, VideoMemoryError, VideoSettings

OPENING = 192 << 20
"""Bytes that a file's headers and the list of its packets may take: a million frames take about 100 MB."""

IDLE, AT_WORK = "metok-idle", "metok-decode"
"""What a child is called in a list of processes."""

_MARGIN = 48 << 20  # of the limit, within which libav's own errors are taken for a lack of memory
_PIECE = 1 << 20  # bytes of a frame that are moved at a time
_THREAD = 9 << 20  # address space of a thread's stack and its guard


ABOUT = ("total_frames", "fps", "duration", "missing", "packets_decoded")
"""Fields of `DecodedVideo` that go to the server as they are."""


def shared_size(frames: int, count: int) -> int:
    """Bytes of the file with `frames` bytes of frames, and the numbers (int64) of `count` of them behind."""
    return -(-frames // 8) * 8 + 8 * count


class FileRoom:
    """Room in a file that the server maps.

    Frames are written to it, and not to a mapping of it here: to touch its pages would take twice as long.
    """

    def __init__(self, file: int, shape: Sequence[int]) -> None:
        self._file = file
        self._shape = tuple(shape)
        self._frame_bytes = math.prod(shape[1:])

    def put(self, slot: int, frame: npt.NDArray[np.uint8]) -> None:
        self._write(frame.data, slot * self._frame_bytes)

    def move(self, source: int, target: int) -> None:
        start, end = source * self._frame_bytes, (source + 1) * self._frame_bytes
        shift = (target - source) * self._frame_bytes
        for at in range(start, end, _PIECE):
            piece = os.pread(self._file, min(_PIECE, end - at), at)
            self._write(piece, at + shift)

    def frames(self, count: int) -> npt.NDArray[np.uint8]:
        """Their shape alone: nobody here looks at them again."""
        return np.broadcast_to(np.uint8(0), (count, *self._shape[1:]))

    def number(self, indices: Sequence[int]) -> None:
        """Put the frames' numbers behind the room for all frames."""
        self._write(np.array(indices, np.int64).data, shared_size(math.prod(self._shape), 0))

    def _write(self, data: bytes | memoryview, start: int) -> None:
        """All of `data`, contiguous, from byte `start` on."""
        rest: memoryview[int] = memoryview(data).cast("B")
        while rest:
            written = os.pwrite(self._file, rest, start)
            rest, start = rest[written:], start + written


class PoolMemory:
    """Memory that the server grants; `metok_vllm.media.decoder.Memory`."""

    def __init__(self, talk: socket.socket, frames_file: int, opening: int) -> None:
        """
        Args:
            talk: the socket to the server.
            frames_file: open file, shared with the server, in which the frames go.
            opening: bytes of address space that this process may have before it is granted more.
        """
        self._talk = talk
        self._file = frames_file
        self.given: FileRoom | None = None
        """The latest room."""
        self.limit = opening

    def reserve(self, frames: int, working: int) -> None:
        """Wait for room; from then on this process may have so much more. The frames go in their file."""
        self._ask({"reserve": {"frames": frames, "working": working}})
        self.limit += working
        limit_memory(self.limit)

    def room(self, shape: Sequence[int]) -> FileRoom:
        """Room for the frames, in the file that the server maps, with room for their numbers behind."""
        size, count = math.prod(shape), shape[0]
        self._ask({"frames": size, "count": count})
        limit_files(shared_size(size, count))
        self.given = FileRoom(self._file, shape)
        return self.given

    def _ask(self, what: dict[str, Any]) -> None:
        messages.send(self._talk, what)
        if messages.receive(self._talk) is None:
            os._exit(0)  # whoever wanted the frames has gone


def take_a_job(orders: socket.socket, parent: int, clip: bytes, *, filtered: bool) -> NoReturn:
    """Wait for a video, decode it, tell the server what came of it, and end this process.

    Args:
        orders: socket to the process that forked this one. The job comes there, with three open files: the
            whole video file, in memory; an empty file in memory, for its frames; a socket to the server. The
            job is ``settings``, and ``most_memory``: bytes that this process may ever have beside its own.
        parent: the process that forked this one, with which it ends.
        clip: for `warm_up.touch`, if the job is not there yet.
        filtered: whether system calls are filtered.
    """
    status = os.open("/proc/self/status", os.O_RDONLY)
    leave_with_parent(parent)
    if not messages.there(orders):
        call_yourself(IDLE)
        warm_up.touch(clip)
    job, files = messages.receive_with_files(orders, 3)
    if job is None or len(files) < 3:
        os._exit(0)
    messages.send(orders, {})  # taken
    orders.close()
    call_yourself(AT_WORK)
    file, frames_file, talk = files
    _decode(socket.socket(fileno=talk), file, frames_file, job, status, filtered=filtered)


def _decode(
    talk: socket.socket, file: int, frames_file: int, job: dict[str, Any], status: int, *, filtered: bool
) -> NoReturn:
    settings = VideoSettings(**job["settings"])
    size = os.fstat(file).st_size
    own = _memory(status, "VmSize") + size + 2 * (settings.threads + 2) * _THREAD
    data = mmap.mmap(file, size, prot=mmap.PROT_READ) if size else b""
    memory = PoolMemory(talk, frames_file, own + OPENING)
    most_file = min(job["most_memory"], shared_size(settings.max_output_mib << 20, settings.max_frames))
    confine(own + OPENING + job["most_memory"], most_file, filtered=filtered)
    limit_memory(memory.limit)
    messages.send(talk, _outcome(data, settings, memory, status))
    os._exit(0)


def _outcome(data: Any, settings: VideoSettings, memory: PoolMemory, status: int) -> dict[str, Any]:
    limit = memory.limit
    try:
        video = decode_video(data, settings, memory)
        assert memory.given is not None
        memory.given.number(video.indices)
    except (VideoMemoryError, MemoryError):
        return {"memory": (memory.limit - limit or OPENING) >> 20}
    except VideoError as error:
        # libav takes a lack of memory for damage now and then.
        if _memory(status, "VmPeak") > memory.limit - _MARGIN:
            return {"memory": (memory.limit - limit or OPENING) >> 20}
        return {"error": str(error)}
    except Exception as error:  # a fault of METok's, or the confinement forbids what the decoder needs
        return {"fault": f"{type(error).__name__}: {error}"[:500]}
    return {"video": {name: getattr(video, name) for name in ABOUT}, "shape": list(video.frames.shape)}


def _memory(status: int, name: str) -> int:
    """A figure in bytes from the open /proc/self/status."""
    found = re.search(rb"%s:\s+(\d+) kB" % name.encode(), os.pread(status, 8192, 0))
    return int(found[1]) << 10 if found else 0
