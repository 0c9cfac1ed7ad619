"""Operations for avi, flv, ogg, asf, ivf."""

from __future__ import annotations

import struct

from .element import Element, File, uint
from .generic import room, set_number
from .operations import BYTE, CLAIM, choice, count, operation

_ASF_GUIDS = {
    "stream": "9107dcb7b7a9cf118ee600c00c205365",
    "content": "3326b2758e66cf11a6d900aa0062ce6c",
    "extended": "40a4d0d207e3d21197f000a0c95ea850",
    "metadata": "eacbf8c5af5b77488467aa8c44fa4cca",
    "library": "941c23449894d149a1411d134e457054",
    "marker": "01cd87f451a9cf118ee600c00c205365",
    "extended_stream": "cba5e61472c632438399a96952065b5a",
    "language": "a946437ce0effc4bb229393ede415c85",
    "index": "90080033b1e5cf1189f400a0c90349cb",
    "data": "3626b2758e66cf11a6d900aa0062ce6c",
}


# ---- avi


@operation("avi.idx1", count(24_000), CLAIM, CLAIM, families="avi")
def idx1(file: File, many: int, position: int, size: int) -> None:
    """An index whose entries all lead to `position`, or one after the other."""
    one = b"00dc" + uint(0x10, 4, "little") + uint(position, 4, "little") + uint(size, 4, "little")
    file.child(b"RIFF", Element(b"idx1", one * min(many, 25_000)))


@operation("avi.indx", CLAIM, count(20_000), choice(2), CLAIM, families="avi")
def indx(file: File, claimed: int, many: int, kind: int, base: int) -> None:
    """An OpenDML index, of frames or of indexes, that may lead to itself."""
    many = min(many, 20_000)
    entries = (uint(base, 8, "little") + bytes(8)) * many if kind else struct.pack("<II", 8, 16) * many
    head = struct.pack("<HBB", 4 if kind else 2, 0, 0 if kind else 1) + uint(claimed, 4, "little")
    body = head + b"00dc" + uint(base, 8, "little") + bytes(4) + entries
    strl = next((e for e in file.all() if e.name == b"LIST" and e.body == b"strl"), None)
    if strl is not None and strl.children is not None:
        strl.children.append(Element(b"indx", body))


@operation("avi.dmlh", CLAIM, count(10_000), families="avi")
def dmlh(file: File, frames: int, size: int) -> None:
    """An OpenDML header that states how many frames there are."""
    odml = Element(b"LIST", b"odml", [Element(b"dmlh", uint(frames, 4, "little") + bytes(min(size, 300_000)))])
    hdrl = next((e for e in file.all() if e.name == b"LIST" and e.body == b"hdrl"), None)
    if hdrl is not None and hdrl.children is not None:
        hdrl.children.append(odml)


@operation("avi.streams", count(1500, also=(64, 100)), families="avi")
def avi_streams(file: File, many: int) -> None:
    """Streams in all."""
    strl = next((e for e in file.all() if e.name == b"LIST" and e.body == b"strl"), None)
    if strl is not None:
        file.siblings(strl).extend(strl.copy() for _ in range(min(many, room(file, strl))))


@operation("avi.header", choice(4), choice(14), CLAIM, families="avi")
def avi_header(file: File, box: int, field: int, value: int) -> None:
    """One of the 32-bit numbers of the file's and the stream's headers: sizes, rates, lengths, times."""
    element = file.find((b"avih", b"strh", b"strf", b"idx1")[box % 4])
    if element is not None:
        element.body = set_number(element.body, field * 4, 4, value, "little")


@operation("avi.info", count(12_000), families="avi")
def info(file: File, many: int) -> None:
    """Texts under changing names."""
    texts = [Element(b"I%03d" % (i % 1000), b"a\0") for i in range(min(many, 30_000))]
    file.child(b"RIFF", Element(b"LIST", b"INFO", texts), replacing=False)


@operation("avi.chunks", count(40_000), choice(3), families="avi")
def chunks(file: File, many: int, kind: int) -> None:
    """Chunks that hold nothing."""
    movi = next((e for e in file.all() if e.name == b"LIST" and e.body == b"movi"), None)
    if movi is not None and movi.children is not None:
        name = (b"00dc", b"JUNK", b"ix00")[kind % 3]
        movi.children.append(Element(b"", (name + bytes(4)) * min(many, 48_000)))


# ---- flv


def _amf(value: object) -> bytes:
    """A number, a text, a list or a mapping in AMF0."""
    if isinstance(value, float):
        return b"\0" + struct.pack(">d", value)
    if isinstance(value, list):
        return b"\x0a" + uint(len(value), 4) + b"".join(_amf(item) for item in value)
    if isinstance(value, dict):
        items = b"".join(uint(len(k), 2) + k + _amf(v) for k, v in value.items())
        return b"\x08" + uint(len(value), 4) + items + b"\0\0\x09"
    return b"\2" + uint(len(str(value)), 2) + str(value).encode()


def _metadata(file: File, value: bytes) -> None:
    file.roots[1:1] = [Element(b"\x12", b"\2\0\x0aonMetaData" + value, head=bytes(7))]


@operation("flv.array", CLAIM, count(40_000), families="flv")
def array(file: File, claimed: int, many: int) -> None:
    """Metadata with a list that claims its length."""
    items = b"\0\0\0\0\0\0\0\0\0" * min(many, 43_000)
    _metadata(file, b"\x08\0\0\0\1\0\1a\x0a" + uint(claimed, 4) + items + b"\0\0\x09")


@operation("flv.depth", count(100_000), choice(2), families="flv")
def amf_depth(file: File, levels: int, kind: int) -> None:
    """Metadata in metadata in metadata."""
    step = (b"\x0a\0\0\0\1", b"\x03\0\1a")[kind % 2]
    _metadata(file, b"\x08\0\0\0\1\0\1a" + step * min(levels, 390_000 // len(step)))


@operation("flv.keyframes", count(20_000), CLAIM, families="flv")
def keyframes(file: File, many: int, position: int) -> None:
    """An index of key frames that all lie at one place."""
    many = min(many, 21_000)
    index = {b"times": [float(i) for i in range(many)], b"filepositions": [float(position)] * many}
    _metadata(file, _amf({b"keyframes": index}))


@operation("flv.keys", count(25_000), families="flv")
def keys(file: File, many: int) -> None:
    """Metadata under many names."""
    _metadata(file, _amf({b"k%d" % i: 1.0 for i in range(min(many, 25_000))}))


@operation("flv.tags", count(25_000), choice(5), BYTE, families="flv")
def flv_tags(file: File, many: int, kind: int, codec: int) -> None:
    """Tags of a byte or two, of sound, pictures or data, of changing streams."""
    name = (b"\x09", b"\x08", b"\x12", b"\x09", b"\x08")[kind % 5]
    body = bytes([codec % 256, 0]) if kind < 3 else bytes([codec % 256])
    file.roots += [Element(name, body, head=uint(i, 3) + bytes(1) + uint(i % 70, 3)) for i in range(min(many, 25_000))]


# ---- ogg


def page(serial: int, number: int, body: bytes, flags: int = 0, granule: int = 0) -> Element:
    """One page of one packet of less than 255 * 255 bytes."""
    table = bytes([255]) * (len(body) // 255) + bytes([len(body) % 255])
    head = bytes([0, flags]) + uint(granule, 8, "little") + uint(serial, 4, "little") + uint(number, 4, "little")
    return Element(b"OggS", bytes([len(table)]) + table + body, head=head)


_OGG_STARTS = (
    b"OVP80\1\1\0\0\x40\0\x30\0\0\1\0\0\1\0\0\0\x19\0\0\0\1",
    b"\x80theora\3\2\1\0\4\0\3\0\0\x40\0\0\x30\0\0\0\0\0\x19\0\0\0\1\0\0\1\0\0\1\0\0\0\0\0\0\0\0",
    b"\1vorbis\0\0\0\0\1\x40\x1f\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xb8\1",
    b"OpusHead\1\1\0\0\x80\xbb\0\0\0\0\0",
    b"fishead\0\3\0\0\0\0\0\0\0\0\0\0\0".ljust(64, b"\0"),
    b"\x7fFLAC\1\0\0\1fLaC\0\0\0\x22".ljust(51, b"\0"),
    b"Speex   1.2".ljust(80, b"\1"),
    b"BBCD\0\0\0\0\x0d",
)


@operation("ogg.serials", count(6000), choice(len(_OGG_STARTS) + 1), families="ogg")
def serials(file: File, many: int, kind: int) -> None:
    """Streams of many serial numbers, each begun and no more."""
    start = (*_OGG_STARTS, b"unknown")[kind % (len(_OGG_STARTS) + 1)]
    file.roots[:0] = [page(1000 + i, 0, start, flags=2) for i in range(min(many, 390_000 // (29 + len(start))))]


@operation("ogg.chain", count(800), families="ogg")
def chain(file: File, many: int) -> None:
    """The file behind itself, under other serial numbers."""
    pages = [root for root in file.roots if root.name]
    for i in range(1, min(many, 800, room(file, *pages))):
        file.roots += [Element(p.name, p.body, head=p.head[:10] + uint(i, 4, "little") + p.head[14:]) for p in pages]


@operation("ogg.comments", CLAIM, count(25_000), CLAIM, families="ogg")
def comments(file: File, claimed: int, many: int, length: int) -> None:
    """A comment header that claims how many comments there are and how long they are."""
    serial = int.from_bytes(file.roots[0].head[10:14], "little") if file.roots else 0
    texts = b"".join(uint(7, 4, "little") + b"k%05d=" % (i % 100_000) for i in range(min(many, 5000)))
    body = (
        b"OVP80\2\x20"
        + uint(1, 4, "little")
        + b"v"
        + uint(claimed, 4, "little")
        + texts
        + uint(length, 4, "little")
        + b"a=b"
    )
    if len(file.roots) > 1:
        file.roots[1] = page(serial, 1, body)


@operation("ogg.pages", count(13_000), CLAIM, families="ogg")
def pages(file: File, many: int, granule: int) -> None:
    """Pages that hold nothing, at one time."""
    serial = int.from_bytes(file.roots[0].head[10:14], "little") if file.roots else 0
    file.roots += [page(serial, 4 + i, b"", granule=granule) for i in range(min(many, 13_000))]


@operation("ogg.times", CLAIM, families="ogg")
def times(file: File, granule: int) -> None:
    """The time that the last page states."""
    for element in file.roots[-1:]:
        element.head = set_number(element.head.ljust(18, b"\0"), 2, 8, granule, "little")


# ---- asf


def _asf(name: str, body: bytes) -> Element:
    return Element(bytes.fromhex(_ASF_GUIDS[name]), body)


@operation("asf.streams", count(2000, also=(64, 100)), families="asf")
def asf_streams(file: File, many: int) -> None:
    """Streams in all, of all the numbers there are."""
    stream = file.find(bytes.fromhex(_ASF_GUIDS["stream"]))
    if stream is not None:
        items = file.siblings(stream)
        for i in range(min(many, room(file, stream))):
            copy = stream.copy()
            copy.body = set_number(copy.body, 48, 2, i % 128, "little")
            items.append(copy)


@operation("asf.texts", choice(3), CLAIM, count(10_000), CLAIM, families="asf")
def texts(file: File, kind: int, claimed: int, many: int, length: int) -> None:
    """Metadata that claims how many entries there are, and how long the last one is."""
    name = ("extended", "metadata", "library")[kind % 3]
    key = b"k\0"
    if kind % 3 == 0:
        one = [
            uint(8, 2, "little")
            + b"k\0%c\0%c\0\0\0" % (65 + i % 26, 65 + i // 26 % 26)
            + bytes(2)
            + uint(2, 2, "little")
            + b"v\0"
            for i in range(min(many, 20_000))
        ]
        last = uint(2, 2, "little") + key + uint(1, 2, "little") + uint(length, 2, "little")
    else:
        one = [
            uint(0, 4) + uint(2, 2, "little") + bytes(2) + uint(2, 4, "little") + b"%c\0v\0" % (65 + i % 26)
            for i in range(min(many, 20_000))
        ]
        last = uint(0, 4) + uint(2, 2, "little") + uint(1, 2, "little") + uint(length, 4, "little") + key
    header = file.roots[0] if file.roots else None
    if header is not None and header.children is not None:
        header.children.append(_asf(name, uint(claimed, 2, "little") + b"".join(one) + last))


@operation("asf.markers", CLAIM, count(10_000), families="asf")
def markers(file: File, claimed: int, many: int) -> None:
    """Markers: libav makes a chapter of each."""
    one = uint(0, 16) + uint(14, 2, "little") + uint(0, 8) + uint(1, 4, "little") + b"a\0"
    header = file.roots[0] if file.roots else None
    if header is not None and header.children is not None:
        body = bytes(16) + uint(claimed, 4, "little") + bytes(2) + bytes(2) + one * min(many, 12_000)
        header.children.append(_asf("marker", body))


@operation("asf.extended_stream", CLAIM, CLAIM, count(5000), families="asf")
def extended_stream(file: File, systems: int, names: int, many: int) -> None:
    """A stream's extended header that claims names and payload extensions."""
    body = (
        bytes(48)
        + uint(1, 2)
        + bytes(2)
        + bytes(8)
        + uint(names, 2, "little")
        + uint(systems, 2, "little")
        + bytes(22) * min(many, 15_000)
    )
    extension = file.find(bytes.fromhex("b503bf5f2ea9cf118ee300c00c205365"))
    if extension is not None and extension.children is not None:
        extension.children.append(_asf("extended_stream", body))


@operation("asf.index", CLAIM, count(50_000), CLAIM, families="asf")
def index(file: File, claimed: int, many: int, interval: int) -> None:
    """An index that claims how many entries there are."""
    body = (
        bytes(16) + uint(interval, 8, "little") + bytes(4) + uint(claimed, 4, "little") + bytes(6) * min(many, 60_000)
    )
    file.child(b"", _asf("index", body))


@operation("asf.header", choice(20), CLAIM, families="asf")
def asf_header(file: File, field: int, value: int) -> None:
    """One number of the file properties: packet sizes, play time, packets."""
    properties = file.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if properties is not None:
        properties.body = set_number(properties.body, 16 + field * 4, 4, value, "little")


@operation("asf.payload", choice(40), BYTE, BYTE, families="asf")
def payload(file: File, at: int, value: int, every: int) -> None:
    """One byte in the head of data packets: flags, lengths, offsets of payloads."""
    data = file.find(bytes.fromhex(_ASF_GUIDS["data"]))
    properties = file.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    if data is not None and properties is not None and len(properties.body) >= 76:
        size, body = int.from_bytes(properties.body[68:72], "little"), bytearray(data.body)
        for start in range(26, len(body) - 40, max(64, size) * (every % 3 + 1)):
            body[start + at % 40] = value % 256
        data.body = bytes(body)


# ---- ivf


@operation("ivf.header", choice(8), CLAIM, families="ivf")
def ivf_header(file: File, field: int, value: int) -> None:
    """One number of the file's header: codec, size, rate, frames."""
    if file.roots:
        at, width = ((4, 2), (6, 2), (8, 4), (12, 2), (14, 2), (16, 4), (20, 4), (24, 4))[field % 8]
        file.roots[0].body = set_number(file.roots[0].body, at, width, value, "little")


@operation("ivf.frames", count(30_000), CLAIM, families="ivf")
def ivf_frames(file: File, many: int, time: int) -> None:
    """Frames of a byte or two."""
    file.roots += [
        Element(b"frame", b"\0\1"[: 1 + i % 2], head=uint(time + i, 8, "little")) for i in range(min(many, 28_000))
    ]
