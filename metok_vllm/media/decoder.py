"""Sample frames from a video held in memory: PyAV and numpy alone, no vLLM.

Two steps. The packets are listed without decoding (cheap, and the only truth about damaged or endless files); then
only those stretches of packets are decoded that lead from a key frame to a wanted frame. Where frames are wanted so
densely that every stretch touches the next, this is a plain walk. Nothing is ever decoded past what is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame

from .plan import PacketTable, Run, plan_runs, sample_indices
from .settings import VideoError, VideoSettings
from .source import (
    Clock,
    PacketReader,
    SeekMissed,
    check_bytes,
    frame_rate,
    open_source,
    read_packet_table,
)

# Codecs in which damage is noticed while decoding with threads, so that the frames do not depend on their race.
_THREADED_CODECS = ("h264", "hevc", "vp9", "av1")


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames and what is known of the video they come from."""

    frames: npt.NDArray[np.uint8]
    """[T, H, W, 3] RGB, upright: a rotation stated by the container is applied, its pixel aspect ratio is not."""
    indices: list[int]
    """[T] index of each frame among the video's frames, in order of display; increasing."""
    total_frames: int
    """Frames in the video."""
    fps: float
    """Frames per second, on average; 0.0 where the file does not tell."""
    duration: float
    """`total_frames` / `fps`, in seconds; 0.0 where `fps` is unknown."""
    missing: int
    """Wanted frames that could not be decoded, so that `frames` lacks them; 0 for a sound file."""
    packets_decoded: int
    """Packets sent to the decoder over all passes: the work done."""


def decode_video(data: bytes, settings: VideoSettings | None = None) -> DecodedVideo:
    """Decode the sampled frames of the video file `data`.

    Raises `VideoError` with one sentence for whatever is wrong with the data or too large for `settings`.
    A file of which some wanted frames are damaged beyond decoding yields the others.
    """
    settings = settings or VideoSettings()
    clock = Clock(settings.timeout_s)
    data = bytes(data)
    check_bytes(data)
    with open_source(data, settings) as source:
        table = read_packet_table(source, settings, clock)
        fps = frame_rate(source.stream, table)
        size = (source.stream.codec_context.width, source.stream.codec_context.height)
    total = table.total
    if total == 0:
        raise VideoError("The video holds no frames; it is damaged or cut off.")
    duration = total / fps if fps > 0 else 0.0
    indices = sample_indices(total, duration, settings.num_frames, settings.fps if fps > 0 else -1)
    _check_output(len(indices), size, settings)

    picker = _Picker(len(indices), settings, clock)
    _decode(data, table, indices, settings, picker)
    got = np.flatnonzero(picker.have)
    if picker.frames is None or len(got) == 0:
        raise VideoError("No frame of the video could be decoded; it is damaged or in an unknown format.")
    return DecodedVideo(
        frames=picker.frames if len(got) == len(indices) else picker.frames[got],
        indices=[indices[slot] for slot in got],
        total_frames=total,
        fps=fps,
        duration=duration,
        missing=len(indices) - len(got),
        packets_decoded=picker.packets,
    )


def _decode(
    data: bytes, table: PacketTable, indices: list[int], settings: VideoSettings, picker: _Picker
) -> None:
    """Fill `picker` by the times of the frames, or by their order where the times turn out to be wrong."""
    try:
        _passes(data, table, indices, settings, picker)
    except _TimesLie:
        picker.forget()
        _passes(data, replace(table, timed=False), indices, settings, picker)


def _passes(
    data: bytes, table: PacketTable, indices: list[int], settings: VideoSettings, picker: _Picker
) -> None:
    """Fill `picker`: quick and strict first; where that shows damage, tolerant; for what is missing then, a walk.

    libav's threads race when they patch over damage, so a damaged file is read again by one thread: the same bytes
    must give the same frames.
    """
    runs = plan_runs(table, indices)
    cost = sum(run.cost for run in runs)
    if cost > settings.max_decoded_frames:
        raise VideoError(
            f"To sample {len(indices)} frames of this video, {cost} would have to be decoded, more than"
            f" {settings.max_decoded_frames} (video setting max_decoded_frames)."
        )
    if not table.damaged and _pass(data, table, runs, settings, picker, strict=True):
        return
    picker.forget()
    _pass(data, table, runs, settings, picker, strict=False)
    walk = plan_runs(table, indices, jump=False)
    if not picker.have.all() and walk != runs and walk[0].cost <= settings.max_decoded_frames:
        _pass(data, table, walk, settings, picker, strict=False)


class _TimesLie(Exception):
    """Decoded frames came with times that do not rise, so that a frame cannot be known by its time."""


class _Picker:
    """Keeps the wanted frames that a pass decodes, as RGB in slots of one array."""

    def __init__(self, count: int, settings: VideoSettings, clock: Clock) -> None:
        self.frames: npt.NDArray[np.uint8] | None = None
        self.have = np.zeros(count, dtype=bool)
        self.packets = 0
        self.clock = clock
        self._settings = settings
        self._size = (0, 0)

    def forget(self) -> None:
        """Start over: a first pass turned out to be unsound."""
        self.frames, self.have[:] = None, False

    def put(self, slot: int, frame: VideoFrame) -> bool:
        """Store `frame` in `slot` unless an earlier pass has; return whether the slot is now filled.

        Frames that differ in size take the size of the first one stored.
        """
        if self.have[slot]:
            return True
        if self.frames is None:
            _check_output(len(self.have), (frame.width, frame.height), self._settings)
            self._size = (frame.width, frame.height)
        try:
            rgb = frame.to_ndarray(format="rgb24", width=self._size[0], height=self._size[1])
        except (av.FFmpegError, ValueError):
            return False
        # libav states the angle by which the stored picture must be turned counter-clockwise to stand upright.
        quarter_turns = round(frame.rotation / 90) % 4 if frame.rotation % 90 == 0 else 0
        upright = np.rot90(rgb, quarter_turns)
        if self.frames is None:
            self.frames = np.empty((len(self.have), *upright.shape), dtype=np.uint8)
        if upright.shape == self.frames.shape[1:]:
            self.frames[slot] = upright
            self.have[slot] = True
        return bool(self.have[slot])


def _pass(
    data: bytes,
    table: PacketTable,
    runs: list[Run],
    settings: VideoSettings,
    picker: _Picker,
    *,
    strict: bool,
    seek: bool = True,
) -> bool:
    """Decode `runs` into `picker`; return whether all went well. Strict: use threads, and stop at the first error."""
    with open_source(data, settings) as source:
        context = source.stream.codec_context
        context.options = {"max_pixels": str(settings.max_pixels)}
        if strict:
            context.options |= {"err_detect": "explode"}
        threads = settings.threads if strict and context.codec.canonical_name in _THREADED_CODECS else 1
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
            return _pass(data, table, runs, settings, picker, strict=strict, seek=False)
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


def _check_output(count: int, size: tuple[int, int], settings: VideoSettings) -> None:
    """Refuse more frames than `max_frames`, larger ones than `max_pixels`, and more bytes than `max_output_mib`."""
    width, height = size
    if count > settings.max_frames:
        raise VideoError(
            f"Sampling would give {count} frames, more than {settings.max_frames} (video setting max_frames);"
            " ask for fewer with num_frames or fps."
        )
    if width * height > settings.max_pixels:
        raise VideoError(
            f"The video's frames of {width} x {height} have more than"
            f" {settings.max_pixels} pixels (video setting max_pixels)."
        )
    mib = count * width * height * 3 / 2**20
    if mib > settings.max_output_mib:
        raise VideoError(
            f"{count} frames of {width} x {height} would fill {mib:.0f} MiB, more than"
            f" {settings.max_output_mib} (video setting max_output_mib)."
        )
