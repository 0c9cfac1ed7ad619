"""Sample frames from a video held in memory: PyAV and numpy alone, no vLLM.

Two steps. First the packets are listed without decoding, which is cheap and the only truth about damaged and
endless files. Then only those stretches of packets are decoded that lead from a key frame to a wanted frame.
Where frames are wanted so densely that each stretch touches the next, this becomes a plain walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from mmap import mmap
from typing import Any, Protocol

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from .orientation import orientation
from .sampling import QWEN3_RATE, PacketTable, Run, decode_runs, qwen3_indices, qwen_indices, sample_indices
from .settings import VideoError, VideoMemoryError, VideoSettings
from .source import (
    Clock,
    PacketReader,
    SeekMissed,
    VideoFile,
    frame_rate,
    open_source,
    read_packet_table,
    working_memory,
)

# Codecs whose decoders notice damage with threads on too, so that no frame depends on which thread was first.
# Not hevc: one damaged file in sixty passed as sound there, and gave other pixels each time.
_THREADED_CODECS = ("h264", "vp9", "av1")


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames and what is known of the video they come from."""

    frames: npt.NDArray[np.uint8]
    """[T, H, W, 3] RGB, upright: a display matrix that turns by quarters, mirrors, or both is applied.

    Its scale and shift are not, nor is the pixel aspect ratio. A matrix that turns by another angle (a degree
    or more off), shears or maps the picture to nothing changes nothing: the frame comes as it is stored.
    """
    indices: list[int]
    """[T] number of each frame among the video's frames, in order of display; increasing."""
    total_frames: int
    """Frames in the video."""
    fps: float
    """Frames per second, on average; 0.0 where the file does not tell."""
    duration: float
    """`total_frames` / `fps`, in seconds; 0.0 where `fps` is unknown."""
    missing: int
    """Wanted frames that could not be decoded and are left out of `frames`; 0 for a sound file."""
    packets_decoded: int
    """Packets sent to the decoder over all passes: the work done."""


class Room(Protocol):
    """Room for T frames uint8 [H, W, 3], each in its slot."""

    def put(self, slot: int, frame: npt.NDArray[np.uint8]) -> None:
        """Store a frame, contiguous in memory."""

    def move(self, source: int, target: int) -> None:
        """Store the frame of one slot in another one too."""

    def frames(self, count: int) -> npt.NDArray[np.uint8]:
        """[count, H, W, 3], what is in the first slots."""


class Memory(Protocol):
    """Where a decode gets its memory from."""

    def reserve(self, frames: int, working: int) -> None:
        """Wait until there is room for `frames` bytes of frames, and for `working` bytes beside them."""

    def room(self, shape: Sequence[int]) -> Room:
        """Room for frames [T, H, W, 3]."""


class OwnRoom:
    """Room in this process."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._frames = np.empty(shape, np.uint8)

    def put(self, slot: int, frame: npt.NDArray[np.uint8]) -> None:
        self._frames[slot] = frame

    def move(self, source: int, target: int) -> None:
        self._frames[target] = self._frames[source]

    def frames(self, count: int) -> npt.NDArray[np.uint8]:
        return self._frames[:count]


class OwnMemory:
    """This process's own, as much as there is."""

    def reserve(self, frames: int, working: int) -> None:
        pass

    def room(self, shape: Sequence[int]) -> OwnRoom:
        return OwnRoom(shape)


def decode_video(
    data: bytes | mmap, settings: VideoSettings | None = None, memory: Memory | None = None
) -> DecodedVideo:
    """Decode the sampled frames of the video file `data`.

    In this process and without a bound on its memory: files from strangers go through `children.pool`. A file
    of which some wanted frames are damaged beyond decoding yields the others. ``settings.fps`` has no effect
    where the frame rate is unknown. Time in which `memory` lets it wait does not count.

    Raises:
        VideoMemoryError: the file takes more memory than there is, or says so.
        VideoError: in one sentence, for whatever else is wrong with the data or too large for `settings`.
    """
    try:
        return _decode(data, settings or VideoSettings(), memory or OwnMemory())
    except MemoryError:
        raise VideoMemoryError("Reading the video takes more memory than there is, or it is damaged.") from None


def _decode(data: bytes | mmap, settings: VideoSettings, memory: Memory) -> DecodedVideo:
    clock = Clock(settings.timeout_s)
    file = VideoFile.check(data)
    with open_source(file, settings) as source:
        size = (source.stream.codec_context.width, source.stream.codec_context.height)
        _check_size(size, settings)
        table = read_packet_table(source, settings, clock)
        fps = frame_rate(source.stream, table)
        working = working_memory(source.stream, settings.threads)
    total = table.total
    if total == 0:
        raise VideoError("The video holds no frames; it is damaged or cut off.")
    if settings.sampling == "qwen3_vl" and fps <= 0:
        fps = QWEN3_RATE
    duration = total / fps if fps > 0 else 0.0
    if settings.sampling == "qwen3_vl":
        indices = qwen3_indices(total, fps, settings.num_frames, settings.fps)
    elif settings.sampling == "qwen2_vl":
        indices = qwen_indices(total, fps, settings.num_frames, settings.fps if fps > 0 else -1)
    else:
        indices = sample_indices(total, duration, settings.num_frames, settings.fps if fps > 0 else -1)
    _check_count(len(indices), size, settings)

    with clock.stopped():
        memory.reserve(len(indices) * size[0] * size[1] * 3, working)

    picker = _Picker(len(indices), settings, clock, memory)
    try:
        _passes(file, table, indices, settings, picker)
    except _TimesLie:
        picker.forget()
        _passes(file, replace(table, timed=False), indices, settings, picker)
    got = np.flatnonzero(picker.have)
    if len(got) == 0:
        raise VideoError("No frame of the video could be decoded; it is damaged or of a kind that cannot be read.")
    return DecodedVideo(
        frames=picker.without_gaps(),
        indices=[indices[slot] for slot in got],
        total_frames=total,
        fps=fps,
        duration=duration,
        missing=len(indices) - len(got),
        packets_decoded=picker.packets,
    )


class _TimesLie(Exception):
    """Decoded frames came with times that do not rise or fit, so that a frame is not known by its time."""


class _Picker:
    """Keeps the wanted frames that a pass decodes, as RGB."""

    def __init__(self, count: int, settings: VideoSettings, clock: Clock, memory: Memory) -> None:
        self.have = np.zeros(count, dtype=bool)
        self.packets = 0
        self.clock = clock
        self._settings = settings
        self._memory = memory
        self._size = (0, 0)
        self._to_rgb = VideoReformatter()
        self._room: Room | None = None
        self._shape: tuple[int, ...] = ()  # of the room
        self._begun = False  # whether there is a frame whose size all others take

    def forget(self) -> None:
        """Start over: the passes so far turned out to be unsound."""
        self._begun, self.have[:] = False, False

    def without_gaps(self) -> npt.NDArray[np.uint8]:
        """The frames that there are, moved together where others are missing."""
        assert self._room is not None
        got = np.flatnonzero(self.have)
        for place, slot in enumerate(got):
            if place != slot:
                self._room.move(int(slot), place)
        return self._room.frames(len(got))

    def _begin(self) -> Room:
        """Room for frames of the size that is known now; that of an earlier pass where it fits."""
        shape = (len(self.have), self._size[1], self._size[0], 3)
        if self._room is None or self._shape != shape:
            self._room, self._shape = self._memory.room(shape), shape
        self._begun = True
        return self._room

    def put(self, slot: int, frame: VideoFrame) -> bool:
        """Store `frame` in `slot` unless an earlier pass has; return whether the slot is filled now.

        Frames that differ in size, once upright, take the size of the first one stored.
        """
        if self.have[slot]:
            return True
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")  # a buffer
        upright = orientation(None if matrix is None else bytes(matrix))
        if not self._begun:
            self._size = upright.size(frame.width, frame.height)
            _check_size(self._size, self._settings)
            _check_count(len(self.have), self._size, self._settings)
        width, height = upright.size(*self._size)
        try:
            # One for all frames, with as many threads as the decoder: else each frame starts one a core.
            rgb: Any = self._to_rgb.reformat(frame, width, height, "rgb24", threads=self._settings.threads).to_ndarray()
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError):
            return False
        room = self._room if self._begun else None
        (room or self._begin()).put(slot, np.ascontiguousarray(upright.apply(rgb)))
        self.have[slot] = True
        return True


def _passes(file: VideoFile, table: PacketTable, indices: list[int], settings: VideoSettings, picker: _Picker) -> None:
    """Fill `picker`: quick and strict first; tolerant where that shows damage; then a walk for the missing.

    libav's threads race when they patch over damage, so a damaged file is read again by one thread: the same
    bytes must give the same frames. Raises `_TimesLie` where the frames are not known by their times.
    """
    runs = decode_runs(table, indices)
    cost = sum(run.cost for run in runs)
    if cost > settings.max_decoded_frames:
        raise VideoError(
            f"To sample {len(indices)} frames of this video, {cost} would have to be decoded, more than"
            f" {settings.max_decoded_frames} (video setting max_decoded_frames)."
        )
    if not table.damaged and _pass(file, table, runs, settings, picker, strict=True):
        return
    picker.forget()
    _pass(file, table, runs, settings, picker, strict=False)
    walk = decode_runs(table, indices, jump=False)
    if not picker.have.all() and walk != runs and walk[0].cost <= settings.max_decoded_frames:
        _pass(file, table, walk, settings, picker, strict=False)
    if table.timed and not picker.have.any():
        raise _TimesLie


def _pass(
    file: VideoFile,
    table: PacketTable,
    runs: list[Run],
    settings: VideoSettings,
    picker: _Picker,
    *,
    strict: bool,
    seek: bool = True,
) -> bool:
    """Decode `runs` into `picker`; return whether all went well. Strict: threads, up to the first error."""
    with open_source(file, settings) as source:
        context = source.stream.codec_context
        context.options = {"max_pixels": str(settings.max_pixels)}
        if strict:
            context.options |= {"err_detect": "explode"}
        threads = settings.threads if strict and source.codec in _THREADED_CODECS else 1
        context.thread_type, context.thread_count = "AUTO" if threads > 1 else "SLICE", threads
        reader = PacketReader(source, table, picker.clock, seek=seek)
        sound = True
        try:
            for number, run in enumerate(runs):
                if number:
                    context.flush_buffers()
                sound = _decode_run(reader, run, table.timed, picker, strict=strict) and sound
                if strict and not sound:
                    return False
        except SeekMissed:
            return _pass(file, table, runs, settings, picker, strict=strict, seek=False)
    return sound


def _decode_run(reader: PacketReader, run: Run, timed: bool, picker: _Picker, *, strict: bool) -> bool:
    """Decode one run; return whether there was no error and every wanted frame came."""
    wanted = dict(run.wanted)
    ordinal, last, sound = 0, None, True
    for packet in reader.read(run.start, run.end):
        picker.clock()
        picker.packets += packet is not None
        try:
            frames = reader.source.stream.codec_context.decode(packet)
        except MemoryError:
            raise
        except (av.FFmpegError, ValueError):
            frames, sound = [], False
        for frame in frames:
            sound = sound and not frame.is_corrupt
            if timed and last is not None and frame.pts is not None and frame.pts <= last:
                raise _TimesLie
            last, key = frame.pts, frame.pts if timed else ordinal
            slot = None if key is None else wanted.pop(key, None)
            ordinal += 1
            if slot is not None:
                sound = picker.put(slot, frame) and sound
        if not wanted or (strict and not sound):
            break
    return sound and not wanted


def _check_size(size: tuple[int, int], settings: VideoSettings) -> None:
    """Refuse frames of more than `max_pixels`."""
    if size[0] * size[1] > settings.max_pixels:
        raise VideoError(
            f"The video's frames of {size[0]} x {size[1]} have more than"
            f" {settings.max_pixels} pixels (video setting max_pixels)."
        )


def _check_count(count: int, size: tuple[int, int], settings: VideoSettings) -> None:
    """Refuse more frames than `max_frames`, and more bytes of them than `max_output_mib`."""
    if count > settings.max_frames:
        raise VideoError(
            f"Sampling would give {count} frames, more than {settings.max_frames} (video settings max_frames,"
            " num_frames and fps)."
        )
    mib = count * size[0] * size[1] * 3 / 2**20
    if mib > settings.max_output_mib:
        raise VideoError(
            f"{count} frames of {size[0]} x {size[1]} would fill {mib:.0f} MiB, more than"
            f" {settings.max_output_mib} (video setting max_output_mib)."
        )
