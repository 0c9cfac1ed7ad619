"""Operations for Matroska and WebM: tags, cues, attachments, chapters, lacing, compression, depth."""

from __future__ import annotations

from .bombs import bz2_zeros, lzo_zeros, zlib_zeros
from .element import Element, File, uint
from .generic import room
from .operations import CLAIM, choice, count, operation

_SEGMENT, _TRACKS, _CLUSTER, _TAGS = (bytes.fromhex(x) for x in ("18538067", "1654ae6b", "1f43b675", "1254c367"))
_SIMPLE_BLOCK, _TRACK, _VOID = b"\xa3", b"\xae", b"\xec"
_WIDE = b"\x08"


def element(name: str, *content: Element | bytes) -> Element:
    """An element with the ID `name` in hex, that holds elements or bytes."""
    children = [part for part in content if isinstance(part, Element)]
    body = b"".join(part for part in content if isinstance(part, bytes))
    return Element(bytes.fromhex(name), body, children or None)


def wide(made: Element) -> Element:
    """`made` with all sizes stored in eight bytes."""
    for part in made.walk():
        part.head = _WIDE
    return made


def _in_segment(file: File, made: Element) -> None:
    """Put `made` before the first cluster, so that libav reads it when it opens the file."""
    segment = file.find(_SEGMENT)
    items = file.roots if segment is None or segment.children is None else segment.children
    at = next((i for i, item in enumerate(items) if item.name == _CLUSTER), len(items))
    items.insert(at, made)


@operation("mkv.tags", count(5000, also=(1000, 3000)), choice(3), families="ebml")
def tags(file: File, many: int, target: int) -> None:
    """Tags for the track, for nothing, or for a track that is not there, each of another name."""
    uid = next((e.body for e in file.all() if e.name == b"\x73\xc5"), b"\1")
    targets = (
        element("63c0", element("63c5", uid)),
        element("63c0"),
        element("63c0", element("63c5", b"\x77\x77")),
    )[target % 3]
    made = [
        element("7373", targets.copy(), element("67c8", element("45a3", b"k%d" % i), element("4487", b"v")))
        for i in range(min(many, 6000))
    ]
    _in_segment(file, wide(element("1254c367", *made)))


@operation("mkv.tag_depth", count(8000), families="ebml")
def tag_depth(file: File, levels: int) -> None:
    """A tag in a tag in a tag."""
    inner = b""
    for _ in range(min(levels, 8000)):
        inner = b"\x67\xc8" + uint(len(inner) | 1 << 28, 4) + inner
    _in_segment(file, element("1254c367", element("7373", inner)))


@operation("mkv.cues", count(12_000), CLAIM, families="ebml")
def cues(file: File, many: int, position: int) -> None:
    """An index of many points that all lead to `position`."""
    places = element("b7", element("f7", b"\1"), element("f1", uint(position, 8)))
    made = [element("bb", element("b3", uint(i, 4)), places.copy()) for i in range(min(many, 13_000))]
    _in_segment(file, element("1c53bb6b", *made))


@operation("mkv.attachments", count(6000), count(20_000), CLAIM, families="ebml")
def attachments(file: File, many: int, size: int, claimed: int) -> None:
    """Attached files; the last states another size. libav makes a stream of each."""
    size = min(size, 400_000)
    made = [
        element("61a7", element("466e", b"a"), element("4660", b"image/png"), element("465c", bytes(size)))
        for _ in range(min(many, 390_000 // (size + 40) + 1))
    ]
    assert made[-1].children is not None
    made[-1].children[-1].claim = claimed
    _in_segment(file, element("1941a469", *made))


@operation("mkv.chapters", count(10_000), count(300), families="ebml")
def chapters(file: File, many: int, levels: int) -> None:
    """Chapters, each of a number of its own, then one in another."""
    made = [
        element("b6", element("73c4", uint(i, 3)), element("91", uint(i, 4)), element("80", element("85", b"a")))
        for i in range(min(many, 13_000))
    ]
    # Written level by level: a tree this deep would be too deep for Python's own stack.
    deep = b""
    for _ in range(min(levels, 300)):
        deep = file.grammar.write([element("b6", Element(b"\x91", b"\0"), Element(b"", deep))])
    _in_segment(file, element("1043a770", element("45b9", *made, Element(b"", deep))))


@operation("mkv.lacing", choice(4), count(255), count(60_000), families="ebml")
def lacing(file: File, kind: int, frames: int, size: int) -> None:
    """Blocks that claim to be `frames` frames."""
    for block in file.all():
        if block.name == _SIMPLE_BLOCK and len(block.body) > 4:
            flags = (block.body[3] & 0xF9) | (kind % 4) << 1
            block.body = block.body[:3] + bytes([flags, (frames - 1) % 256]) + bytes(min(size, 60_000))


@operation("mkv.tracks", count(3000, also=(64, 100)), families="ebml")
def tracks(file: File, many: int) -> None:
    """Tracks in all, each with a number of its own."""
    track = file.find(_TRACK)
    if track is None or track.children is None:
        return
    items = file.siblings(track)
    for number in range(2, min(many, room(file, track))):
        copy = track.copy()
        for part in copy.children or ():
            if part.name in (b"\xd7", b"\x73\xc5"):
                part.body = uint(number, 3)
        items.append(copy)


_KINDS = (
    (0x11, b"S_TEXT/UTF8"),
    (0x11, b"S_VOBSUB"),
    (0x11, b"S_HDMV/PGS"),
    (2, b"A_PCM/INT/LIT"),
    (2, b"A_OPUS"),
    (1, b"V_UNCOMPRESSED"),
    (0x12, b"B_VOBBTN"),
    (0x20, b"D_WEBVTT/METADATA"),
)


@operation("mkv.other_track", choice(len(_KINDS)), families="ebml")
def other_track(file: File, kind: int) -> None:
    """One more track, of subtitles, sound, buttons or data."""
    number, codec = _KINDS[kind % len(_KINDS)]
    parts = (("d7", b"\x09"), ("73c5", b"\x09"), ("83", bytes([number])), ("86", codec))
    track = element("ae", *(element(name, body) for name, body in parts))
    file.child(_TRACKS, track, replacing=False)


@operation("mkv.private", count(300_000), CLAIM, choice(3), families="ebml")
def private(file: File, size: int, claimed: int, kind: int) -> None:
    """A codec's private data, large or of a claimed size."""
    body = (bytes(size), b"\xff" * size, b"\1\x42\0\x0a\xff\xff" + b"\0\0" * (size // 2))[kind % 3]
    file.child(_TRACK, Element(b"\x63\xa2", body, claim=claimed if kind == 0 else None))


@operation("mkv.packed", choice(3), count(200_000_000, also=(9_000_000, 200_000_000)), count(40), families="ebml")
def packed(file: File, kind: int, size: int, blocks: int) -> None:
    """Blocks in zlib, bz2 or lzo that unpack to `size` bytes each."""
    algorithm, data = ((0, zlib_zeros), (1, bz2_zeros), (2, lzo_zeros))[kind % 3]
    content = data(size)
    settings = element("5034", element("4254", bytes([algorithm])))
    coding = element("6d80", element("6240", element("5031", b"\0"), element("5032", b"\1"), settings))
    file.child(_TRACK, coding)
    made = [element("a3", b"\x81" + uint(i, 2) + b"\x80" + content) for i in range(min(blocks, 40))]
    file.child(_CLUSTER, made[0], replacing=False)
    for block in made[1 : 390_000 // (len(content) + 10)]:
        file.child(_CLUSTER, block, replacing=False)


@operation("mkv.clusters", count(20_000), CLAIM, families="ebml")
def clusters(file: File, many: int, time: int) -> None:
    """Clusters with a time and nothing else."""
    segment = file.find(_SEGMENT)
    if segment is not None and segment.children is not None:
        segment.children += [element("1f43b675", element("e7", uint(time + i, 8))) for i in range(min(many, 20_000))]


@operation("mkv.seek", count(8000), CLAIM, families="ebml")
def seek(file: File, many: int, position: int) -> None:
    """A directory that leads to tags, cues and directories many times, at `position` or at itself."""
    names = (_TAGS, bytes.fromhex("1c53bb6b"), bytes.fromhex("114d9b74"))
    made = [
        element("4dbb", element("53ab", names[i % 3]), element("53ac", uint(position + i, 8)))
        for i in range(min(many, 15_000))
    ]
    segment = file.find(_SEGMENT)
    if segment is not None and segment.children is not None:
        segment.children.insert(0, element("114d9b74", *made))


@operation("mkv.void", count(100_000), families="ebml")
def void(file: File, many: int) -> None:
    """Empty padding elements."""
    _in_segment(file, Element(b"", (_VOID + b"\x80") * min(many, 150_000)))


@operation("mkv.duration", choice(3), CLAIM, families="ebml")
def duration(file: File, kind: int, value: int) -> None:
    """The ticks in a second, the duration, or how long a frame is."""
    parent, name = (("1549a966", "2ad7b1"), ("1549a966", "4489"), ("ae", "23e383"))[kind % 3]
    file.child(bytes.fromhex(parent), element(name, uint(value, 8)))


@operation("mkv.size", CLAIM, CLAIM, families="ebml")
def size(file: File, width: int, height: int) -> None:
    """The picture's size in the track's header."""
    file.child(b"\xe0", element("b0", uint(width, 8)))
    file.child(b"\xe0", element("ba", uint(height, 8)))
