"""Whatever comes in, out comes a right answer or one sentence; soon, and in little memory."""

from __future__ import annotations

import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metok_vllm.media import mp4_guard
from metok_vllm.media.decoder import DecodedVideo, decode_video
from metok_vllm.media.in_force import decode_pool
from metok_vllm.media.settings import VideoError, VideoSettings
from tests.support.clips import box, clip, full_box, number_of, tone

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x02\0\0\0\x90wS\xde" + bytes(30)
WEBP = b"RIFF\x80\0\0\0WEBPVP8X\n\0\0\0\x02\0\0\0\x07\0\0\x07\0\0ANIM\x06\0\0\0" + bytes(80)


def assert_one_sentence(message: str) -> None:
    """A message for the user: one sentence, and nothing of libav's own wording."""
    assert re.fullmatch(r"[A-Z][^\n]*\.", message), message
    assert ". " not in message
    assert not re.search(r"Errno|avcodec|avformat|0x|Traceback|<none>", message), message
    assert len(message) < 250


def decode(
    data: bytes, num_frames: int = 8, by: Callable[[bytes, VideoSettings], DecodedVideo] = decode_video
) -> DecodedVideo | str:
    """The video, or the sentence that refuses it; anything else is a failure, and so is taking long."""
    start = time.monotonic()
    try:
        video = by(data, VideoSettings(num_frames=num_frames, timeout_s=20))
    except VideoError as error:
        assert_one_sentence(str(error))
        return str(error)
    finally:
        assert time.monotonic() - start < 25
    assert len(video.frames) == len(video.indices) > 0
    assert video.missing + len(video.indices) <= num_frames
    assert video.indices == sorted(set(video.indices))
    assert video.indices[-1] < video.total_frames
    return video


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("nothing", b"", "empty"),
        ("one byte", b"\0", "not a video"),
        ("zeros", bytes(5000), "not a video"),
        ("noise", random.Random(1).randbytes(5000), "not a video"),
        ("text", b"<html><body>404 Not Found</body></html>" * 20, "not a video"),
        ("json", b'{"video": 1}', "not a video"),
        ("jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(100), "still image (JPEG)"),
        ("png", PNG, "still image (PNG)"),
        ("animated webp", WEBP, "WebP picture (animated)"),
        ("wav", b"RIFF\x24\x10\0\0WAVEfmt \x10\0\0\0" + bytes(4000), "not a video"),
        ("mp4 without anything", box(b"ftyp", b"isom\0\0\2\0isom"), "cannot be read"),
        ("matroska header alone", b"\x1a\x45\xdf\xa3" + bytes(60), "not a video"),
    ],
)
def test_what_is_not_a_video_is_refused(name: str, data: bytes, words: str) -> None:
    assert words in str(decode(data)), name


def test_sound_alone_is_refused_cover_or_not() -> None:
    assert "no video stream" in str(decode(tone()))
    assert "no video stream" in str(decode(tone("matroska")))
    assert "no video stream" in str(decode(tone(picture=PNG)))


def test_a_playlist_opens_no_file_and_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mp4").write_bytes(clip(3))
    monkeypatch.chdir(tmp_path)
    lists = [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        b"#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:1/x.ts\n",
        b"ffconcat version 1.0\nfile 'secret.mp4'\n",
        b'<?xml version="1.0"?><MPD type="static"><Period><BaseURL>secret.mp4</BaseURL></Period></MPD>',
    ]
    for data in lists:
        assert "not a video" in str(decode(data))


TRUNCATED = {
    "mp4": ({"container_options": {"moov_size": "20000"}}, b"mdat"),
    "matroska": ({}, b"\x1f\x43\xb6\x75"),
    "webm": ({"codec": "libvpx"}, b"\x1f\x43\xb6\x75"),
    "mpegts": ({}, b"\x47"),
    "gif": ({"codec": "gif", "pix_fmt": "gray"}, b"\x21\xf9"),
}


@pytest.mark.parametrize("container", TRUNCATED)
def test_a_truncated_file_gives_the_frames_that_are_there(container: str) -> None:
    how, mark = TRUNCATED[container]
    data = clip(60, container=container, **how)
    media = data.index(mark)
    answers = [decode(data[: media + (len(data) - media) * tenth // 10]) for tenth in range(1, 10)]
    videos = [answer for answer in answers if isinstance(answer, DecodedVideo)]
    assert len(videos) >= 6
    assert len({video.total_frames for video in videos}) >= 6
    for video in videos:
        assert video.total_frames < 60
        # The last frame may be half there; in mpeg-ts a few that are shown before the last are stored after
        # it.
        shown = [number_of(frame) for frame in video.frames][: -2 if container == "mpegts" else -1]
        assert shown == video.indices[: len(shown)]
        assert video.missing <= 1
        # The half frame at the end of an mp4 is known to be one, and not sampled.
        assert container != "mp4" or (video.missing == 0 and video.packets_decoded <= video.total_frames)


def test_an_mp4_whose_index_was_cut_off_is_refused() -> None:
    data = clip(60)  # its index is at the end
    assert "index cannot be read" in str(decode(data[: len(data) // 2]))


def mutated(data: bytes, seed: int) -> bytes:
    """`data` with flipped bits, noise, a gap, a repeat, or extreme bytes in its first or last kilobyte."""
    dice, changed = random.Random(seed), bytearray(data)
    at = dice.randrange(len(data))
    match seed % 5:
        case 0:
            for _ in range(dice.randrange(1, 20)):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        case 1:
            changed[at : at + dice.randrange(1, 200)] = dice.randbytes(dice.randrange(1, 200))
        case 2:
            del changed[at : at + dice.randrange(1, 2000)]
        case 3:
            changed[at:at] = changed[max(0, at - dice.randrange(1, 2000)) : at]
        case _:
            for _ in range(dice.randrange(1, 4)):
                near = dice.randrange(min(1000, len(changed)))
                changed[near if dice.random() < 0.5 else -near - 1] = dice.choice([0, 1, 127, 128, 255])
    return bytes(changed)


SEEDS = {
    "mp4": clip(50, options={"g": "12"}, container_options={"moov_size": "20000"}),
    "fragments": clip(30, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "webm": clip(30, codec="libvpx-vp9", container="webm"),
    "ts": clip(30, container="mpegts"),
    "avi": clip(30, codec="mpeg4", container="avi"),
    "ffv1": clip(12, codec="ffv1", container="matroska"),
    "gif": clip(20, codec="gif", container="gif", pix_fmt="gray", rate=10),
}


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**9))
def test_a_damaged_file_gives_the_same_frames_each_time_or_one_sentence(kind: str, seed: int) -> None:
    """In a fresh child for each: within one process libav shows what its memory held before, where a picture
    is damaged (ffv1).
    """
    data = mutated(SEEDS[kind], seed)
    first, second = (decode(data, by=decode_pool().decode) for _ in range(2))
    if isinstance(first, str) or isinstance(second, str):
        assert first == second
    else:
        assert first.indices == second.indices
        assert np.array_equal(first.frames, second.frames)


def test_flipped_bits_in_the_pictures_do_not_lose_the_video() -> None:
    """Not vacuous: of many damaged files most are answered,
    some were damaged enough to need a second pass.
    """
    data, answered, repaired = SEEDS["mp4"], 0, 0
    media = data.index(b"mdat")
    for seed in range(40):
        dice, changed = random.Random(seed), bytearray(data)
        for _ in range(6):
            changed[dice.randrange(media + 200, len(data))] ^= 1 << dice.randrange(8)
        video = decode(bytes(changed))
        assert isinstance(video, DecodedVideo)
        assert video.total_frames == 50
        answered += video.missing == 0
        repaired += video.packets_decoded > 50
    assert answered >= 25
    assert repaired >= 10


def test_huge_frames_are_refused_before_their_memory_is_taken() -> None:
    gif = bytearray(SEEDS["gif"])
    gif[6:10] = struct.pack("<HH", 65000, 65000)
    before = resident_mib()
    assert isinstance(decode(bytes(gif)), str)
    assert resident_mib() - before < 100
    # A vp8 key frame that is 16383 x 16383 in a container that says 64 x 48.
    webm = bytearray(clip(3, codec="libvpx", container="webm"))
    at = webm.index(b"\x9d\x01\x2a") + 3
    webm[at : at + 4] = struct.pack("<HH", 16383, 16383)
    start = time.monotonic()
    decode(bytes(webm))
    assert time.monotonic() - start < 10


def mp4_that_claims(*, samples: int = 0, edits: int = 0, fragment: int = 0, table: int = 4) -> bytes:
    """An mp4 with one track whose headers claim `samples`,
    or that an edit list or a fragment repeats them.
    """
    sizes = full_box(b"stsz", 1, samples) if samples else full_box(b"stsz", 0, table, *[1] * table)
    count = samples or table
    entry = box(b"mp4v", bytes(6), b"\0\1", bytes(16), struct.pack(">HH", 64, 48), bytes(50))
    tables = [
        box(b"stsd", struct.pack(">II", 0, 1), entry),
        full_box(b"stts", 1, count, 1),
        full_box(b"stsc", 1, 1, count, 1),
        sizes,
        full_box(b"stco", 1, 8),
    ]
    handler = box(b"hdlr", bytes(8), b"vide", bytes(13))
    clock = full_box(b"mdhd", 0, 0, 1000, 1000, 0)
    media = box(b"mdia", clock, handler, box(b"minf", box(b"stbl", *tables)))
    # Each edit: a duration, a start, rate 1.
    cuts = box(b"edts", full_box(b"elst", edits, *[count, 0, 1 << 16] * edits)) if edits else b""
    track = box(b"trak", full_box(b"tkhd", 0, 0, 1, *[0] * 17), cuts, media)
    extends = box(b"mvex", full_box(b"trex", 1, 1, 1, 1, 0)) if fragment else b""
    movie = box(b"moov", full_box(b"mvhd", 0, 0, 1000, 1000, *[0] * 20), track, extends)
    run = box(b"traf", full_box(b"tfhd", 1), full_box(b"trun", fragment)) if fragment else b""
    return box(b"ftyp", b"isom\0\0\2\0isom") + movie + (box(b"moof", run) if run else b"") + box(b"mdat", bytes(4096))


@pytest.mark.parametrize(
    "claims",
    [
        {"samples": 80_000_000},
        {"fragment": 80_000_000},
        {"table": 3000, "edits": 3000},
    ],
)
def test_headers_that_claim_millions_of_frames_take_neither_time_nor_memory(claims: dict[str, int]) -> None:
    """Without the guard each of these takes libav from 0.2 to 3 GB and up to half a minute, to no end."""
    before = resident_mib()
    start = time.monotonic()
    assert isinstance(decode(mp4_that_claims(**claims)), str)
    assert time.monotonic() - start < 10
    assert resident_mib() - before < 100


def resident_mib() -> float:
    """The most memory that this process has held so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def test_the_guard_lets_ordinary_files_pass() -> None:
    ordinary = [
        SEEDS["mp4"],
        SEEDS["fragments"],
        tone(),
        tone("mov", "pcm_s16le"),
        mp4_that_claims(samples=1000),
        mp4_that_claims(table=1000, edits=3),
    ]
    assert all(mp4_guard.looks_like_mp4(data) and mp4_guard.check_mp4(data) for data in ordinary)
    assert not mp4_guard.looks_like_mp4(SEEDS["webm"])


def test_words_in_the_metadata_do_not_frighten_the_guard() -> None:
    words = box(b"udta", box(b"\xa9cmt", b"a truncated trunk, elsternest, stsz size and so on; strung"))
    movie = mp4_that_claims()
    at = movie.index(b"moov") - 4
    (size,) = struct.unpack_from(">I", movie, at)
    data = movie[:at] + struct.pack(">I", size + len(words)) + movie[at + 4 : at + size] + words + movie[at + size :]
    mp4_guard.check_mp4(data)  # edit lists may be ignored then; the file is not refused
    assert mp4_guard.check_mp4(movie)


def test_sound_in_single_ticks_may_claim_as_many_samples_as_the_file_has_bytes() -> None:
    handler, times = box(b"hdlr", bytes(8), b"soun", bytes(13)), full_box(b"stts", 1, 5_000_000, 1)
    track = box(b"trak", handler, times, full_box(b"stsz", 2, 5_000_000))
    data = box(b"moov", track) + box(b"mdat", bytes(10_000_000))
    assert mp4_guard.check_mp4(data)
    with pytest.raises(VideoError, match="claims far more"):
        mp4_guard.check_mp4(data.replace(b"soun", b"vide"))
    with pytest.raises(VideoError, match="claims far more"):
        mp4_guard.check_mp4(data[:2000])
