"""Right frames from every kind of well-formed video, and little work for it."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from metok_vllm.media import decoder as decoder_module
from metok_vllm.media import source as source_module
from metok_vllm.media.decoder import DecodedVideo, decode_video
from metok_vllm.media.sampling import sample_indices
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.clips import clip, encode, number_of, numbered, repeated, rotated

KINDS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "mp4 with many key frames": {"options": {"g": "5"}},
    "mp4 in fragments": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mp4 of 10 bits": {"pix_fmt": "yuv420p10le"},
    "mp4 of odd size": {"width": 131, "height": 37, "pix_fmt": "yuv444p"},
    "mp4 with hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "mp4 with av1": {"codec": "libsvtav1", "width": 128, "height": 64, "options": {"svtav1-params": "lp=1"}},
    "mp4 in a hurry, then slow": {"times_ms": [*range(0, 400, 20), *range(400, 4400, 200)]},
    "mov with prores": {"container": "mov", "codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "mkv": {"container": "matroska"},
    "mkv in gray": {"container": "matroska", "codec": "ffv1", "pix_fmt": "gray"},
    "webm with vp8": {"container": "webm", "codec": "libvpx"},
    "webm with vp8 and hidden frames": {
        "container": "webm",
        "codec": "libvpx",
        "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "300k", "g": "20"},
    },
    "webm with vp9": {"container": "webm", "codec": "libvpx-vp9"},
    "webm as it comes live, without duration": {
        "container": "webm",
        "codec": "libvpx-vp9",
        "container_options": {"live": "1"},
    },
    "mpeg-ts": {"container": "mpegts"},
    "mpeg-ps": {"container": "mpeg", "codec": "mpeg2video"},
    "flv": {"container": "flv"},
    "avi with mpeg4": {"container": "avi", "codec": "mpeg4"},
    "avi with reordered frames": {"container": "avi", "options": {"bf": "3"}},
    "avi with mjpeg": {"container": "avi", "codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "wmv": {"container": "asf", "codec": "wmv2"},
    "gif": {"container": "gif", "codec": "gif", "pix_fmt": "gray", "rate": 10},
    "animated png": {"container": "apng", "codec": "apng", "pix_fmt": "rgb24"},
}
COUNT = 40


def assert_right(video: DecodedVideo, total: int, num_frames: int, size: tuple[int, int]) -> None:
    """Every frame shows its number, the indices are the sampled ones, nothing is missing."""
    assert video.total_frames == total
    assert video.indices == sample_indices(total, video.duration, num_frames, -1)
    assert [number_of(frame) for frame in video.frames] == video.indices
    assert video.frames.shape == (len(video.indices), size[1], size[0], 3)
    assert video.frames.dtype == np.uint8
    assert video.missing == 0


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_every_kind_of_video_are_the_sampled_ones(kind: str) -> None:
    how = KINDS[kind]
    data = clip(COUNT, **how)
    size = (how.get("width", 64), how.get("height", 48))
    for num_frames in (1, 3, 8, -1):
        video = decode_video(data, VideoSettings(num_frames=num_frames))
        assert_right(video, COUNT, num_frames, size)
        assert video.fps > 0
        assert video.duration == pytest.approx(COUNT / video.fps)
        assert video.packets_decoded <= COUNT
    if "times_ms" not in how:
        assert video.fps == pytest.approx(how.get("rate", 25), rel=0.05)


def test_one_frame_is_a_video() -> None:
    video = decode_video(clip(1), VideoSettings(num_frames=8))
    assert_right(video, 1, 8, (64, 48))


def test_frames_hidden_by_an_edit_list_do_not_count() -> None:
    data = clip(30, shift=10, options={"bf": "0"}, container_options={"avoid_negative_ts": "disabled"})
    video = decode_video(data, VideoSettings(num_frames=5))
    assert video.total_frames == 20
    assert [number_of(frame) - 10 for frame in video.frames] == video.indices == [0, 4, 9, 14, 19]


def test_vp8_packets_that_are_not_for_display_do_not_count() -> None:
    data = bytearray(clip(20, codec="libvpx", container="webm"))
    with av.open(io.BytesIO(data)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    assert data.count(packets[8]) == 1
    data[data.index(packets[8])] ^= 0x10  # the bit that says "show this frame"
    video = decode_video(bytes(data))
    assert video.total_frames == 19
    assert video.indices == list(range(19))
    assert [number_of(frame) for frame in video.frames] == [n for n in range(20) if n != 8]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_pictures_painted_on_the_one_before_are_not_jumped_to(kind: str) -> None:
    """Pillow stores only the part of a picture that changed."""
    first, *others = (Image.fromarray(numbered(n)) for n in range(COUNT))
    out = io.BytesIO()
    first.save(out, kind, save_all=True, append_images=others, duration=100)
    assert_right(decode_video(out.getvalue(), VideoSettings(num_frames=3)), COUNT, 3, (64, 48))


@pytest.mark.parametrize(("degrees", "corner"), [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_rotated_video_stands_upright(degrees: int, corner: tuple[int, int]) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:16, :16] = 255  # top left as stored; turned clockwise it goes to `corner`
    frame = decode_video(rotated(encode([image] * 3), degrees)).frames[0]
    assert frame.shape == ((48, 64, 3) if degrees % 180 == 0 else (64, 48, 3))
    quarters = {
        (row, column): int(frame[row * -12 :, column * -12 :][:12, :12].mean()) for row in (0, 1) for column in (0, 1)
    }
    assert max(quarters, key=lambda where: quarters[where]) == corner
    assert sorted(quarters.values())[-2] < 20


def test_frames_that_change_size_take_the_size_of_the_first() -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as file:
        target, shown = None, 0
        for width, height in ((64, 48), (128, 96)):
            encoder = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base = Fraction(1, 25)
            if target is None:
                target = file.add_stream("libvpx", rate=25)
                target.width, target.height, target.pix_fmt = width, height, "yuv420p"
            packets = []
            for number in range(shown, shown + 10):
                frame = av.VideoFrame.from_ndarray(numbered(number, width, height), format="rgb24")
                frame.pts = number
                packets += encoder.encode(frame.reformat(format="yuv420p"))
            for packet in [*packets, *encoder.encode()]:
                packet.stream = target
                file.mux(packet)
            shown += 10
    video = decode_video(out.getvalue())
    assert_right(video, 20, -1, (64, 48))


# An hour of video in no time: 2000 frames in groups of 250, copied 45 times.
@pytest.fixture(scope="module")
def hour() -> bytes:
    options = {"g": "250", "bf": "0", "sc_threshold": "0", "preset": "ultrafast"}
    return repeated(clip(2000, 48, 16, options=options), 45)


@pytest.mark.parametrize("frames", [4, 32])
def test_a_sparse_request_on_an_hour_of_video_decodes_a_small_part(
    hour: bytes, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeks = []
    seek = source_module.PacketReader._seek
    monkeypatch.setattr(
        source_module.PacketReader, "_seek", lambda self, start: (seeks.append(start), seek(self, start))[1]
    )
    video = decode_video(hour, VideoSettings(num_frames=frames))
    assert video.total_frames == 90_000
    assert video.duration == 3600
    assert [number_of(frame) for frame in video.frames] == [index % 2000 for index in video.indices]
    assert len(seeks) == frames - 1
    assert video.packets_decoded <= frames * 250
    assert video.packets_decoded < 90_000 / 10


@pytest.mark.parametrize("container", ["matroska", "mpegts"])
def test_jumping_works_in_other_containers_too(container: str) -> None:
    data = repeated(clip(1000, 48, 16, options={"g": "100", "bf": "0"}), 5, container)
    video = decode_video(data, VideoSettings(num_frames=6))
    assert video.total_frames == 5000
    assert [number_of(frame) for frame in video.frames] == [index % 1000 for index in video.indices]
    assert video.packets_decoded <= 600


class Wayward:
    """A container that seeks past where it is told to."""

    def __init__(self, container: Any, by: int) -> None:
        self._container, self._by = container, by

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def seek(self, offset: int, **how: Any) -> None:
        self._container.seek(offset + self._by, **how)


@pytest.mark.parametrize("by", [1_000_000, -1_000_000])
def test_a_container_that_seeks_wrongly_costs_time_but_no_frame(
    hour: bytes, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = decode_video(hour, VideoSettings(num_frames=4))
    open_source = source_module.open_source

    @contextmanager
    def open_wayward(*args: Any) -> Iterator[source_module.Source]:
        with open_source(*args) as source:
            yield source_module.Source(Wayward(source.container, by), source.stream)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder_module, "open_source", open_wayward)
    video = decode_video(hour, VideoSettings(num_frames=4))
    assert np.array_equal(video.frames, honest.frames)
    assert video.indices == honest.indices
    assert video.packets_decoded < 2 * honest.packets_decoded


def lying_table(monkeypatch: pytest.MonkeyPatch, **lies: Any) -> None:
    """Let the decoder see a packet table with other columns than the container's."""
    read = source_module.read_packet_table
    monkeypatch.setattr(decoder_module, "read_packet_table", lambda *args: dataclasses.replace(read(*args), **lies))


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_key_flags_that_lie_cost_time_but_no_frame(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(100, codec=codec, options={"g": "100"})
    honest = decode_video(data, VideoSettings(num_frames=6))
    lying_table(monkeypatch, key=np.ones(100, dtype=bool))
    video = decode_video(data, VideoSettings(num_frames=6))
    assert video.indices == honest.indices
    assert np.array_equal(video.frames, honest.frames)
    assert video.packets_decoded > 100  # the jumps were tried, and led nowhere


def test_times_that_lie_cost_time_but_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(100, options={"bf": "3"})
    lying_table(monkeypatch, pts=np.arange(100) * 3 + 1)
    assert_right(decode_video(data, VideoSettings(num_frames=6)), 100, 6, (64, 48))


def test_times_that_fall_are_not_believed() -> None:
    """A muxer that wrote the order of decoding as times of display: the order of the frames still tells."""
    data = repeated(clip(40, options={"bf": "3"}), 1, "matroska")
    assert_right(decode_video(data), 40, -1, (64, 48))


def test_threads_change_nothing() -> None:
    data = clip(120, options={"g": "30"})
    videos = [decode_video(data, VideoSettings(num_frames=20, threads=threads)) for threads in (1, 2, 7)]
    for video in videos[1:]:
        assert np.array_equal(video.frames, videos[0].frames)


def test_fps_limits_the_sample() -> None:
    data = clip(100)  # 4 s
    assert len(decode_video(data, VideoSettings(fps=2)).indices) == 8
    assert len(decode_video(data, VideoSettings(fps=2, num_frames=5)).indices) == 5
    assert len(decode_video(data, VideoSettings(fps=0.5, num_frames=5)).indices) == 2


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_frames": 99}, "100 frames, more than 99"),
        ({"max_pixels": 64 * 48 - 1}, "64 x 48"),
        ({"max_source_frames": 99}, "more than 99 frames"),
        ({"max_decoded_frames": 99}, "more than 99"),
        ({"timeout_s": 1e-6}, "longer than"),
        ({"max_output_mib": 1, "max_frames": 3000}, None),
    ],
)
def test_every_limit_refuses_in_one_sentence_and_lets_pass_what_it_allows(
    limits: dict[str, Any], words: str | None
) -> None:
    data = clip(100)
    if words is None:  # 100 frames are below 1 MiB, 200 are not
        assert len(decode_video(data, VideoSettings(**limits)).indices) == 100
        data, words = clip(200), "more than 1 "
    with pytest.raises(VideoError, match=words) as error:
        decode_video(data, VideoSettings(**limits))
    (name, value), *_ = limits.items()
    assert name in str(error.value)
    assert str(error.value).count(". ") == 0
    if isinstance(value, int) and value == 99:
        assert len(decode_video(data, VideoSettings(**{name: 100})).indices) == 100


def test_too_much_to_decode_is_refused_before_decoding(hour: bytes) -> None:
    with pytest.raises(VideoError, match="To sample 32 frames of this video"):
        decode_video(hour, VideoSettings(num_frames=32, max_decoded_frames=1000))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_frame": 3}, "Unknown video setting 'num_frame'; known are fps, max_decoded_frames"),
        ({"num_frames": 0}, "num_frames must be -1 or between 1 and"),
        ({"num_frames": -2}, "num_frames"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"num_frames": 4.0}, "num_frames must be a whole number"),
        ({"num_frames": "x" * 500}, "num_frames must be a whole number"),
        ({"fps": "2"}, "fps must be a finite number"),
        ({"fps": float("nan")}, "fps must be a finite number"),
        ({"fps": 0}, "fps must be -1 or above 0"),
        ({"fps": 1e9}, "fps must be -1 or above 0 and at most 1000"),
        ({"timeout_s": -1}, "timeout_s must be above 0"),
        ({"max_pixels": None}, "max_pixels must be a whole number"),
        ({"threads": 0}, "threads must be between 1 and 64"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(values: dict[str, Any], words: str) -> None:
    with pytest.raises(VideoError, match=words) as error:
        VideoSettings.from_mapping(values)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VideoSettings().num_frames = 3  # type: ignore[misc]


def test_the_decoder_imports_neither_vllm_nor_torch_and_keeps_libav_quiet() -> None:
    """Even where someone switched libav's log on, and on a damaged file."""
    program = """
import sys, av
av.logging.restore_default_callback()
from metok_vllm.media.decoder import decode_video
data = bytearray(sys.stdin.buffer.read())
for at in range(2000, len(data), 97):
    data[at] ^= 255
try:
    print(decode_video(bytes(data)).missing)
except ValueError as error:
    print(error)
assert not {"vllm", "torch", "transformers", "cv2"} & set(sys.modules)
"""
    data = clip(60, 320, 240, options={"crf": "1"})
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip()
    assert done.stderr == b""
