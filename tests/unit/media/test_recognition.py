"""What is no video file says what it is; raw streams and live recordings are read."""

from __future__ import annotations

import io
import itertools
import time

import av
import numpy as np
import pytest
from PIL import Image

from metok_vllm.media.decoder import decode_video
from metok_vllm.media.recognition import container_of, usable_length, why_not_opened
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.clips import box, clip, number_of

COUNT = 40
RAW = {"h264": "libx264", "hevc": "libx265", "obu": "libsvtav1", "m4v": "mpeg4", "mpeg2video": "mpeg2video"}


@pytest.fixture(scope="module", params=RAW)
def raw(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    return request.param, clip(COUNT, codec=RAW[request.param], container=request.param, options={"g": "12"})


@pytest.mark.parametrize("frames", [-1, 5])
def test_a_raw_stream_is_read(raw: tuple[str, bytes], frames: int) -> None:
    video = decode_video(raw[1], VideoSettings(num_frames=frames))
    assert video.total_frames == COUNT
    assert video.missing == 0
    assert [number_of(frame) for frame in video.frames] == video.indices
    assert len(video.indices) == (COUNT if frames < 0 else frames)


def test_a_raw_stream_is_told_by_its_start_alone(raw: tuple[str, bytes]) -> None:
    """A start code elsewhere is nothing: there are some inside of every transport stream."""
    name, data = raw
    assert container_of(data[:4096]) == {"mpeg2video": "mpegvideo"}.get(name, name)
    for before in (b"\x47", b"x", b"\xff\xfb"):
        assert container_of(before + data[:4096]) is None
    for length in range(6):
        assert container_of(data[:length]) in (None, container_of(data))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
@pytest.mark.parametrize("container", ["mp4", "mpegts", "matroska", "avi", "mpeg"])
def test_no_container_is_taken_for_a_raw_stream(codec: str, container: str) -> None:
    if (container == "mpeg" and codec == "mpeg4") or (container != "mpegts" and codec == "libx265"):
        pytest.skip("not written, or not each time")
    for count in (1, 2, 3):
        data = clip(count, codec=codec, container=container)
        assert container_of(data) == ("mpegts" if container == "mpegts" else None)
        assert len(decode_video(data).frames) == count


def test_a_short_transport_stream_needs_no_probing() -> None:
    """libav wants more of its packets than a video of two frames has."""
    data = clip(2, container="mpegts")
    assert len(data) < 2000
    assert [number_of(frame) for frame in decode_video(data).frames] == [0, 1]
    assert container_of(data[: 3 * 188]) == "mpegts"
    assert container_of(data[: 3 * 188 - 1]) is None
    assert container_of(data[:188] + b"x" + data[189:]) is None
    assert container_of(b"GIF89a" + b"G" * 600) is None
    assert container_of(b"Good morning.") is None


def test_a_stream_that_is_nothing_but_its_start() -> None:
    assert why_not_opened(b"\0\0\0\1\x67\x64") == "The data is a raw h264 stream that is damaged or cut off."
    with pytest.raises(VideoError, match="damaged"):
        decode_video(b"\0\0\0\1\x67\x64\0\x0a")


@pytest.mark.parametrize("name", [b"ftyp", b"free", b"moov", b"mdat"])
def test_a_first_box_with_a_long_size_is_no_start_code(name: bytes) -> None:
    assert container_of(b"\0\0\0\1" + name + (24).to_bytes(8, "big") + b"isom" + bytes(4)) is None


def outcome(data: bytes) -> bytes:
    try:
        return decode_video(data, VideoSettings(num_frames=4)).frames.tobytes()
    except VideoError as error:
        return str(error).encode()


def test_a_shuffled_raw_stream_is_an_error_or_a_video(raw: tuple[str, bytes]) -> None:
    """Never anything else, and the same each time."""
    head, rng = raw[1][:64], np.random.default_rng(5)
    for _ in range(12):
        body = bytearray(raw[1][64:])
        for at in rng.integers(0, len(body), 40):
            body[at] = rng.integers(0, 256)
        assert outcome(head + bytes(body)) == outcome(head + bytes(body))


# --- sentences ---


def fragmented(**how: object) -> bytes:
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", **how}
    return clip(COUNT, container_options=options, options={"g": "10", "bf": "0"})


def boxes(data: bytes) -> list[tuple[bytes, int]]:
    found, at = [], 0
    while at < len(data):
        found.append((data[at + 4 : at + 8], at))
        at += int.from_bytes(data[at : at + 4], "big")
    return found


def first(data: bytes, name: bytes) -> int:
    return next(at for box_name, at in boxes(data) if box_name == name)


def picture(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, kind)
    return out.getvalue()


FILM, LIVE = clip(COUNT), fragmented()
WEBM = clip(COUNT, codec="libvpx", container="webm")
REFUSED = {
    "a segment": (LIVE[first(LIVE, b"moof") :], "a media segment without its initialisation segment"),
    "a segment with a type": (box(b"styp", b"msdh") + LIVE[first(LIVE, b"moof") :], "a media segment without"),
    "a segment with an index": (box(b"sidx", bytes(24)) + LIVE[first(LIVE, b"moof") :], "a media segment without"),
    "a segment, mkv": (WEBM[WEBM.index(b"\x1f\x43\xb6\x75") :], "a segment of a webm/mkv stream"),
    "still recorded": (FILM[: first(FILM, b"moov")], "written last while a camera still records"),
    "cut off": (FILM[:-600], "an mp4/mov file that is damaged or cut off"),
    "webm header": (WEBM[: WEBM.index(b"\x1f\x43\xb6\x75")], "webm/mkv file that is damaged"),
    "hls": (b"#EXTM3U\n#EXT-X-VERSION:3\nfile:///etc/passwd\n", "a playlist (HLS)"),
    "hls, mark": (b"\xef\xbb\xbf\r\n#extm3u\n", "a playlist (HLS)"),
    "dash": (b'<?xml version="1.0"?>\n<!-- x --><MPD xmlns="urn:mpeg:dash:schema:mpd:2011">', "a playlist (DASH)"),
    "dash, bare": (b"<MPD type='dynamic'>", "a playlist (DASH)"),
    "concat": (b"ffconcat version 1.0\nfile 'a.mp4'\n", "a playlist (concat)"),
    "pls": (b"[playlist]\nFile1=http://a/b.mp4\n", "a playlist (PLS)"),
    "sdp": (b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\n", "a description of a stream (SDP)"),
    "an address": (b"https://example.com/a.mp4", "the address of something"),
    "a web page": (b"\n\n<!DOCTYPE html><html>not found</html>", "a web page"),
    "xml": (b"<?xml version='1.0'?><error/>", "an XML document"),
    "json": (b'{"error": "no such file"}', "JSON"),
    "y4m": (b"YUV4MPEG2 W64 H48 F25:1\nFRAME\n" + bytes(4608), "raw pictures (y4m)"),
    "jpeg": (picture("JPEG"), "a still image (JPEG)"),
    "png": (picture("BMP"), "a still image (BMP)"),
    "tiff": (picture("TIFF"), "a still image (TIFF)"),
    "avif": (box(b"ftyp", b"avif", bytes(4)), "a still image (HEIF or AVIF)"),
    "webp": (picture("WEBP"), "a WebP picture (still)"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(32), "sound (WAV)"),
    "zip": (b"PK\x03\x04" + bytes(64), "a zip archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "a gzip archive"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "noise": (
        bytes(np.random.default_rng(1).integers(128, 256, 400, np.uint8)),
        "not a video that can be read; send mp4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_sentence_says_what_it_is(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(VideoError) as raised:
        decode_video(data)
    sentence = str(raised.value)
    assert words in sentence
    assert sentence == why_not_opened(data[:4096])
    assert sentence.startswith("The data is ")
    assert sentence.endswith(".")
    assert sentence.count(". ") == 0


def test_a_segment_with_its_initialisation_segment_is_a_video() -> None:
    """What the sentence tells to do."""
    moofs = [at for name, at in boxes(LIVE) if name == b"moof"]
    video = decode_video(LIVE[: moofs[0]] + LIVE[moofs[1] : moofs[2]])
    assert [number_of(frame) for frame in video.frames] == list(range(10, 20))


# --- live recordings ---


@pytest.mark.parametrize("flags", ["", "+dash", "+cmaf"])
def test_a_live_mp4_may_be_cut_off_anywhere(flags: str) -> None:
    """Whole frames before the cut are read, whatever box it goes through."""
    data = fragmented(movflags="frag_keyframe+empty_moov+default_base_moof" + flags)
    known = boxes(data)
    # Frames that are there once a fragment's mdat has ended.
    ends = [at for (name, _), (_, at) in itertools.pairwise(known) if name == b"mdat"]
    assert len(ends) == 4
    for cut in range(ends[0], len(data), 23):
        video = decode_video(data[:cut], VideoSettings(num_frames=3))
        assert video.total_frames >= 10 * sum(end <= cut for end in ends)
        assert [number_of(frame) for frame in video.frames] == video.indices


def test_only_a_half_header_behind_a_fragment_is_left_out() -> None:
    assert usable_length(LIVE) == len(LIVE)
    assert usable_length(FILM) == len(FILM)
    assert usable_length(FILM[:-50]) == len(FILM) - 50, "a film's index: left to libav"
    moofs = [at for name, at in boxes(LIVE) if name == b"moof"]
    assert usable_length(LIVE[: moofs[1] + 20]) == moofs[1]
    assert usable_length(LIVE[: moofs[1] + 3]) == moofs[1]
    assert usable_length(LIVE[: moofs[0] + 20]) == moofs[0] + 20
    in_mdat = first(LIVE, b"mdat") + 30
    assert usable_length(LIVE[:in_mdat]) == in_mdat
    assert usable_length(b"") == 0
    assert usable_length(WEBM) == len(WEBM)


def test_many_boxes_take_no_long_walk() -> None:
    start = time.perf_counter()
    usable_length(b"\0\0\0\x08moof" * (4 << 20))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("container", ["webm", "matroska"])
def test_a_live_mkv_may_be_cut_off(container: str) -> None:
    out = io.BytesIO()
    with av.open(io.BytesIO(clip(COUNT, codec="libvpx", container="webm"))) as source:
        stream = source.streams.video[0]
        with av.open(Pipe(out), "w", format=container, options={"live": "1"}) as file:
            target = file.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = target
                    file.mux(packet)
    data = out.getvalue()
    for share in (0.5, 0.8, 0.99):
        video = decode_video(data[: int(len(data) * share)])
        assert 10 < video.total_frames <= COUNT
        assert [number_of(frame) for frame in video.frames] == list(range(len(video.frames)))


class Pipe:
    """A file that goes one way, as a socket does."""

    def __init__(self, out: io.BytesIO) -> None:
        self._out = out

    def write(self, data: bytes) -> int:
        return self._out.write(data)
