"""What the first look at an mp4 file sees, what it passes by, and that it is quick."""

from __future__ import annotations

import mmap
import struct
import time

import pytest

from metok_vllm.media.mp4_guard import MAX_INDEX_ENTRIES, check_mp4, looks_like_mp4
from metok_vllm.media.settings import VideoError
from tests.support.clips import box
from tests.support.media_fuzz.bases import NAMES, base_data
from tests.support.media_fuzz.cases import parse

CLAIM = "mp4: mp4.samples(60000000)"


@pytest.mark.parametrize(
    "steps",
    [
        "",
        *(f"mp4.first({kind})" for kind in range(12)),
        "mp4.first(0) mp4.index_first()",
        "mp4.tracks(4)",
        "mp4.index_in(0,0)",  # the index under the name of padding
        "mp4.index_in(1,0)",
        "mp4.index_in(1,1)",
        "mp4.index_in(3,1)",
        *(f"mp4.decoy({kind})" for kind in range(6)),
        "id3(1000,0)",
    ],
)
def test_a_claimed_index_is_seen_wherever_libav_would_read_it(steps: str) -> None:
    data = parse(f"{CLAIM} {steps}").data()
    assert looks_like_mp4(data)
    with pytest.raises(VideoError, match="claims far more frames"):
        check_mp4(data)


@pytest.mark.parametrize("first", [b"emsg", b"abcd", b"\0\0\0\1"])
def test_boxes_that_libav_does_not_know_may_come_first(first: bytes) -> None:
    data = box(first, bytes(40)) * 3 + parse(CLAIM).data()
    assert looks_like_mp4(data)
    with pytest.raises(VideoError, match="claims far more frames"):
        check_mp4(data)


def test_the_same_claim_within_media_or_padding_is_none() -> None:
    good, claim = base_data("mp4"), parse(CLAIM).data()
    for name in (b"mdat", b"free", b"skip", b"wide"):
        assert check_mp4(good + box(name, claim)), name
    # libav reads padding as an index where the index itself starts in it.
    moov = claim[claim.index(b"moov") + 4 :]
    assert check_mp4(good + box(b"skip", moov))
    with pytest.raises(VideoError, match="claims far more frames"):
        check_mp4(good + box(b"free", moov))


@pytest.mark.parametrize("name", NAMES)
def test_good_files_pass_and_only_mp4_is_taken_for_mp4(name: str) -> None:
    data = base_data(name)
    assert looks_like_mp4(data) == name.startswith(("mp4", "mov"))
    assert looks_like_mp4(data[:64]) == looks_like_mp4(data)
    assert check_mp4(data)


def test_a_mapped_file_is_read_like_bytes() -> None:
    data = parse(f"{CLAIM} mp4.first(0)").data()
    with mmap.mmap(-1, len(data)) as mapped:
        mapped[:] = data
        assert looks_like_mp4(mapped)
        with pytest.raises(VideoError, match="claims far more frames"):
            check_mp4(mapped)


def test_edit_lists_are_left_to_libav_only_while_they_are_short() -> None:
    assert check_mp4(parse("mp4: mp4.edits(60)").data())
    assert check_mp4(parse("mp4: mp4.edits(1000)").data())
    many = parse(f"mp4: mp4.samples({MAX_INDEX_ENTRIES // 100}) mp4.edits(1000)").data()
    assert not check_mp4(many)


@pytest.mark.parametrize(
    "data",
    [
        box(b"mdat", b"a") * 100_000,
        (box(b"moof", box(b"traf", b"trak")) + box(b"mdat", b"")) * 30_000,
        box(b"moov", b"trak" * 250_000),
        box(b"moov", b"stsz" * 250_000),
        struct.pack(">I4s", 1, b"moov") + bytes(1_000_000),
    ],
    ids=["boxes", "fragments", "tracks", "tables", "zeros"],
)
def test_the_look_is_linear_in_what_it_reads(data: bytes) -> None:
    """A megabyte of the worst takes a fraction of a second; a quadratic search would take minutes."""
    start = time.monotonic()
    try:
        check_mp4(data)
    except VideoError as error:
        assert "claims far more" in str(error)  # noqa: PT017  (it may be refused; it must not take long)
    assert time.monotonic() - start < 10
