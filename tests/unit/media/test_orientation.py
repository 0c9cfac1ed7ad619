"""Display matrices: every way in which a camera can state one, against the pixels that players show."""

from __future__ import annotations

import io
import math
import struct

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.bitstream import BitStreamFilterContext

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.orientation import AS_STORED, orientation
from tests.support.clips import encode

Axes = tuple[float, float, float, float]
"""a, b, c, d: a pixel p to the right and q down belongs at (a * p + c * q, b * p + d * q)."""

EIGHT: dict[str, Axes] = {
    "as stored": (1, 0, 0, 1),
    "a quarter clockwise": (0, 1, -1, 0),
    "upside down": (-1, 0, 0, -1),
    "a quarter counter-clockwise": (0, -1, 1, 0),
    "mirrored left and right": (-1, 0, 0, 1),
    "mirrored top and bottom": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed over the other diagonal": (0, -1, -1, 0),
}
"""A mirrored selfie is one of the last four."""

# What ffmpeg's tools put behind the decoder for each (fftools/ffmpeg_filter.c), as filters of libav.
FILTERS = {
    "as stored": ["null"],
    "a quarter clockwise": ["transpose=clock"],
    "upside down": ["hflip", "vflip"],
    "a quarter counter-clockwise": ["transpose=cclock"],
    "mirrored left and right": ["hflip"],
    "mirrored top and bottom": ["vflip"],
    "transposed": ["transpose=cclock_flip"],
    "transposed over the other diagonal": ["transpose=clock_flip"],
}
ODD: dict[str, Axes] = {
    "30 degrees": (math.cos(0.5236), math.sin(0.5236), -math.sin(0.5236), math.cos(0.5236)),
    "45 degrees": (0.7071, 0.7071, -0.7071, 0.7071),
    "two degrees": (math.cos(0.0349), math.sin(0.0349), -math.sin(0.0349), math.cos(0.0349)),
    "sheared": (1, 0, 0.5, 1),
    "nothing": (0, 0, 0, 0),
    "a line": (1, 0, 0, 0),
    "both axes one way": (0, 1, 0, 1),
}


def picture(number: int = 0) -> npt.NDArray[np.uint8]:
    """Four corners of different grey, so that each of the eight is another picture."""
    image = np.full((48, 64, 3), 20 + number, np.uint8)
    image[:16, :16], image[:16, -16:], image[-16:, :16] = 240, 160, 90
    return image


def fixed(axes: Axes) -> tuple[int, int, int, int]:
    a, b, c, d = (round(value * 65536) for value in axes)
    return a, b, c, d


def libavs(axes: Axes) -> bytes:
    a, b, c, d = fixed(axes)
    return struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


def with_matrix(mp4: bytes, axes: Axes, header: bytes = b"tkhd", shift: tuple[int, int] = (0, 0)) -> bytes:
    """The one-track `mp4` with the matrix in its track's header, or in the film's."""
    a, b, c, d = fixed(axes)
    at = mp4.index(header) + 4
    version = mp4[at]
    assert version == 0
    at += {b"tkhd": 40, b"mvhd": 36}[header]
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, shift[0] << 16, shift[1] << 16, 1 << 30)
    return mp4[:at] + matrix + mp4[at + 36 :]


def mapped(image: npt.NDArray[np.uint8], axes: Axes) -> npt.NDArray[np.uint8]:
    """The definition, pixel by pixel: each goes where the matrix sends it, the whole back to the origin."""
    a, b, c, d = (round(value) for value in axes)
    height, width, _ = image.shape
    to = {(a * p + c * q, b * p + d * q): image[q, p] for q in range(height) for p in range(width)}
    left, top = min(x for x, _ in to), min(y for _, y in to)
    right, bottom = max(x for x, _ in to), max(y for _, y in to)
    shown = np.zeros((bottom - top + 1, right - left + 1, 3), np.uint8)
    for (x, y), pixel in to.items():
        shown[y - top, x - left] = pixel
    return shown


def filtered(image: npt.NDArray[np.uint8], filters: list[str]) -> npt.NDArray[np.uint8]:
    graph = av.filter.Graph()
    height, width, _ = image.shape
    nodes = [graph.add_buffer(width=width, height=height, format="rgb24", time_base=1)]  # type: ignore[call-overload]
    nodes += [graph.add(*stated.split("=")) for stated in filters]
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    graph.push(av.VideoFrame.from_ndarray(image, format="rgb24"))
    out = graph.pull()
    assert isinstance(out, av.VideoFrame)
    return out.to_ndarray(format="rgb24")


def with_message(mpegts: bytes, stated: str) -> bytes:
    """The h264 stream with a display orientation in a message of its own (SEI)."""
    out = io.BytesIO()
    with av.open(io.BytesIO(mpegts), format="mpegts") as source, av.open(out, "w", format="mpegts") as file:
        stream = source.streams.video[0]
        target = file.add_stream_from_template(stream)
        edit = BitStreamFilterContext(f"h264_metadata=display_orientation=insert:{stated}", stream, target)
        for packet in [*source.demux(stream), None]:
            for edited in edit.filter(packet):
                edited.stream = target
                file.mux(edited)
    return out.getvalue()


@pytest.mark.parametrize("name", EIGHT)
def test_each_of_the_eight_is_what_its_definition_and_what_ffmpegs_player_say(name: str) -> None:
    image = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    shown = orientation(libavs(EIGHT[name])).apply(image)
    assert np.array_equal(shown, mapped(image, EIGHT[name]))
    assert np.array_equal(shown, filtered(image, FILTERS[name]))
    assert orientation(libavs(EIGHT[name])).size(7, 5) == shown.shape[1::-1]


@pytest.mark.parametrize("container", ["mp4", "mov"])
@pytest.mark.parametrize("name", EIGHT)
def test_a_files_frames_come_as_players_show_them(name: str, container: str) -> None:
    plain = encode([picture(number) for number in range(3)], container=container)
    stored = decode_video(plain).frames
    shown = decode_video(with_matrix(plain, EIGHT[name])).frames
    assert len(shown) == 3
    for before, after in zip(stored, shown, strict=True):
        assert np.array_equal(after, mapped(before, EIGHT[name]))
    assert shown.flags.c_contiguous


@pytest.mark.parametrize("name", EIGHT)
def test_the_films_own_matrix_and_the_tracks_count_together(name: str) -> None:
    plain = encode([picture()])
    stored = decode_video(plain).frames[0]
    film = with_matrix(plain, EIGHT[name], b"mvhd")
    assert np.array_equal(decode_video(film).frames[0], mapped(stored, EIGHT[name]))
    both = with_matrix(film, EIGHT["mirrored left and right"])
    again = mapped(mapped(stored, EIGHT["mirrored left and right"]), EIGHT[name])
    assert np.array_equal(decode_video(both).frames[0], again)


@pytest.mark.parametrize("name", [name for name in EIGHT if not name.startswith("transposed")])
def test_a_matroska_file_made_of_such_a_file(name: str) -> None:
    """It states the angle and a mirror in other words ("projection"), but for the two transpositions."""
    turned = with_matrix(encode([picture()]), EIGHT[name])
    out = io.BytesIO()
    with av.open(io.BytesIO(turned)) as source, av.open(out, "w", format="matroska") as file:
        stream = source.streams.video[0]
        target = file.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.stream = target
                file.mux(packet)
    assert np.array_equal(decode_video(out.getvalue()).frames, decode_video(turned).frames)


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("rotate=90", "a quarter counter-clockwise"),
        ("rotate=180", "upside down"),
        ("flip=horizontal", "mirrored left and right"),
        ("flip=vertical", "mirrored top and bottom"),
    ],
)
def test_an_orientation_in_the_codecs_own_message(stated: str, name: str) -> None:
    """As h264 carries it in a transport stream, which has no matrix of its own."""
    plain = encode([picture()], container="mpegts")
    stored = decode_video(plain).frames[0]
    assert np.array_equal(decode_video(with_message(plain, stated)).frames[0], mapped(stored, EIGHT[name]))


@pytest.mark.parametrize("name", ODD)
def test_what_is_none_of_the_eight_leaves_the_frame_as_it_is_stored(name: str) -> None:
    assert orientation(libavs(ODD[name])) == AS_STORED
    plain = encode([picture()])
    turned = decode_video(with_matrix(plain, ODD[name]))
    assert np.array_equal(turned.frames, decode_video(plain).frames)


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("scale", [(0.25, 0.25), (2, 0.5), (1 / 65536, 1 / 65536), (32767, 1)])
def test_the_scale_does_not_count(name: str, scale: tuple[float, float]) -> None:
    a, b, c, d = EIGHT[name]
    scaled = (a * scale[0], b * scale[0], c * scale[1], d * scale[1])
    assert orientation(libavs(scaled)) == orientation(libavs(EIGHT[name]))


@pytest.mark.parametrize("name", EIGHT)
def test_less_than_a_degree_is_a_rounded_matrix(name: str) -> None:
    a, b, c, d = EIGHT[name]
    cos, sin = math.cos(0.01), math.sin(0.01)
    nearly = (a * cos - b * sin, a * sin + b * cos, c * cos - d * sin, c * sin + d * cos)
    assert orientation(libavs(nearly)) == orientation(libavs(EIGHT[name]))


def test_the_shift_does_not_count() -> None:
    """Most cameras add it, so that the turned picture starts at the origin; some do not."""
    plain, axes = encode([picture()]), EIGHT["a quarter clockwise"]
    shifted, bare = with_matrix(plain, axes, shift=(48, 0)), with_matrix(plain, axes)
    assert np.array_equal(decode_video(shifted).frames, decode_video(bare).frames)


@pytest.mark.parametrize("matrix", [None, b"", bytes(35), bytes(37), bytes(36), b"\xff" * 36, b"\x80\0\0\0" * 9])
def test_no_matrix_and_odd_bytes(matrix: bytes | None) -> None:
    assert orientation(matrix) == AS_STORED


def test_the_extreme_numbers() -> None:
    low = struct.pack("=9i", -(2**31), 0, 0, 0, 2**31 - 1, 0, 0, 0, 0)
    assert orientation(low) == orientation(libavs(EIGHT["mirrored left and right"]))


def test_frames_that_turn_midway_take_the_upright_size_of_the_first() -> None:
    """Transport streams may be joined end to end; here the second one is turned."""
    plain = encode([picture()] * 2, container="mpegts")
    video = decode_video(plain + with_message(plain, "rotate=90"))
    assert video.frames.shape == (4, 48, 64, 3)
    assert video.missing == 0
    bottom_left = [int(frame[-12:, :12].mean()) for frame in video.frames]  # the brightest corner is turned there
    assert bottom_left[0] < 120 < 200 < bottom_left[2]
