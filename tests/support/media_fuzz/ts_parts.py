"""Operations for MPEG transport and program streams: tables, streams, lengths, packet numbers."""

from __future__ import annotations

from .element import Element, File, uint
from .operations import BYTE, CLAIM, choice, count, operation

_PMT_PID = 0x1000


def section_packets(pid: int, section: bytes) -> list[Element]:
    """Packets that carry `section`, which gets its length; the checksum too where it is short."""
    section = section[:1] + uint(0xB000 | (len(section) - 3 + 4) & 0xFFF, 2) + section[3:]
    from .streams import crc32_high

    data = b"\0" + section + uint(crc32_high(section, 0xFFFFFFFF), 4)
    chunks = [data[at : at + 184] for at in range(0, len(data), 184)]
    return [
        Element(
            b"packet",
            b"\x47" + uint(pid | (0x4000 if i == 0 else 0), 2) + bytes([0x10 | i % 16]) + chunk.ljust(184, b"\xff"),
        )
        for i, chunk in enumerate(chunks)
    ]


def pat(programs: int, first_pid: int = _PMT_PID, version: int = 0) -> list[Element]:
    """A program table with `programs` programs, each with its own map's PID."""
    entries = b"".join(uint(i + 1, 2) + uint(0xE000 | (first_pid + i) % 0x1FFF, 2) for i in range(min(programs, 250)))
    return section_packets(0, b"\0\0\0\0\1" + bytes([0xC1 | version % 32 << 1, 0, 0]) + entries)


def pmt(
    pid: int, program: int, streams: int, kind: int, first_pid: int, descriptor: bytes = b"", version: int = 0
) -> list[Element]:
    """A program's map with `streams` streams of the type `kind`."""
    one = [
        bytes([kind]) + uint(0xE000 | (first_pid + i) % 0x1FFF, 2) + uint(0xF000 | len(descriptor), 2) + descriptor
        for i in range(min(streams, 1000 // (5 + len(descriptor))))
    ]
    head = b"\2\0\0" + uint(program, 2) + bytes([0xC1 | version % 32 << 1, 0, 0]) + uint(0xE000 | first_pid, 2)
    return section_packets(pid, head + b"\xf0\0" + b"".join(one))


def pes(pid: int, kind: int, payload: bytes, length: int = 0) -> Element:
    """One packet that starts a PES packet of stream `kind`."""
    body = b"\0\0\1" + bytes([kind]) + uint(length, 2) + b"\x80\x80\5" + b"\x21\0\1\0\1" + payload
    return Element(b"packet", b"\x47" + uint(0x4000 | pid, 2) + b"\x10" + body.ljust(184, b"\xff")[:184])


@operation("ts.programs", count(250), count(180), choice(6), families="ts")
def programs(file: File, many: int, streams: int, kind: int) -> None:
    """Many programs, each with many streams, before the file's own tables."""
    stream_type = (0x1B, 2, 0x0F, 6, 0x24, 0x80)[kind % 6]
    made = pat(many)
    for i in range(min(many, 250)):
        made += pmt(_PMT_PID + i, i + 1, streams, stream_type, 0x20 + i * 20 % 0x1F00)
        if len(made) > 2000:
            break
    file.roots = made + file.roots


@operation("ts.pids", count(2000), count(5), BYTE, families="ts")
def pids(file: File, many: int, each: int, kind: int) -> None:
    """Packets of streams that no table knows: libav makes a stream of each, and a buffer."""
    many, each = min(many, 2000), min(each, 5)
    file.roots = [
        pes(0x20 + i % 0x1F00, 0xC0 | kind % 48, b"\0\0\1\xb3" * 30) for i in range(many) for _ in range(each)
    ] + file.roots


@operation("ts.maps", count(1500), count(40), BYTE, families="ts")
def maps(file: File, many: int, streams: int, kind: int) -> None:
    """The program's map again and again, each of a new version with other streams."""
    made: list[Element] = []
    for i in range(min(many, 1500)):
        made += pmt(_PMT_PID, 1, streams, kind % 256, 0x20 + i * 41 % 0x1F00, version=i)
    file.roots[3:3] = made


@operation("ts.tables", count(1500), count(250), families="ts")
def tables(file: File, many: int, programs: int) -> None:
    """The program table again and again, each of a new version."""
    made: list[Element] = []
    for i in range(min(many, 1500)):
        made += pat(programs, _PMT_PID + i % 1000, i)
        if len(made) > 2000:
            break
    file.roots = made + file.roots


@operation("ts.descriptors", BYTE, count(250), BYTE, count(40), families="ts")
def descriptors(file: File, tag: int, size: int, fill: int, streams: int) -> None:
    """Streams with descriptors of a kind and a length, which may lie."""
    descriptor = bytes([tag % 256, size % 256]) + bytes([fill % 256]) * min(size, 250)
    file.roots[2:2] = pmt(_PMT_PID, 1, streams, 6, 0x200, descriptor[:252], version=1)


@operation("ts.pes_length", CLAIM, families="ts")
def pes_length(file: File, length: int) -> None:
    """PES packets that state another length."""
    for packet in file.all():
        at = packet.body.find(b"\0\0\1\xe0")
        if at >= 0:
            packet.body = packet.body[: at + 4] + uint(length, 2) + packet.body[at + 6 :]


@operation("ts.padding", count(2000), choice(3), families="ts")
def padding(file: File, many: int, kind: int) -> None:
    """Packets of nothing: null packets, adaptation fields alone, or damaged ones."""
    packet = (
        b"\x47\x1f\xff\x10" + b"\xff" * 184,
        b"\x47\x01\x00\x20\xb7\0" + b"\xff" * 182,
        b"\x47\x81\x00\x10" + b"\0" * 184,
    )[kind % 3]
    file.roots[len(file.roots) // 2 : len(file.roots) // 2] = [
        Element(b"packet", packet) for _ in range(min(many, 2000))
    ]


@operation("ts.packet_size", choice(2), families="ts")
def packet_size(file: File, kind: int) -> None:
    """Packets of 192 or 204 bytes."""
    extra = (4, 16)[kind % 2]
    file.roots = [
        Element(b"", bytes(extra if extra == 4 else 0) + e.body + bytes(16 if extra == 16 else 0)) for e in file.roots
    ]


@operation("ts.pictures", count(2000), choice(5), families="ts")
def pictures(file: File, many: int, kind: int) -> None:
    """Packets on the video's PID whose headers begin a picture each, of a few bytes."""
    start = (
        b"\0\0\1\0\0\x0f\xff\xf8\0\0\1\1",
        b"\0\0\1\x65\x88",
        b"\0\0\1\xb3\x04\0\x30\x13",
        b"\0\0\1\x67\x42",
        b"\0\0\1\x09\x10",
    )[kind % 5]
    video = next((e for e in file.all() if b"\0\0\1\xe0" in e.body), None)
    if video is not None:
        pid = int.from_bytes(video.body[1:3], "big") & 0x1FFF
        file.roots += [pes(pid, 0xE0, start * 20) for _ in range(min(many, 2000))]


@operation("ps.map", count(200), BYTE, families="ps")
def stream_map(file: File, streams: int, kind: int) -> None:
    """A program stream map that names many streams."""
    entries = b"".join(bytes([kind % 256, 0xC0 + i % 48, 0, 0]) for i in range(min(streams, 250)))
    body = b"\xe0\xff\0\0" + uint(len(entries), 2) + entries + bytes(4)
    file.roots.insert(1, Element(b"\xbc", body))


@operation("ps.streams", count(5000), BYTE, families="ps")
def streams(file: File, many: int, first: int) -> None:
    """Packets of many streams, and of private ones with sub-numbers."""
    made = []
    for i in range(min(many, 8000)):
        private = i % 2 == 0
        body = b"\x80\x80\5\x21\0\1\0\1" + bytes([(first + i) % 256]) + bytes(20)
        made.append(Element(b"\xbd" if private else bytes([0xC0 + i % 48]), body))
    file.roots[2:2] = made


@operation("ps.small", count(30_000), families="ps")
def small(file: File, many: int) -> None:
    """Packets that hold a byte or nothing."""
    file.roots[2:2] = [Element(b"\xe0", b"\x0f\0"[: i % 3]) for i in range(min(many, 40_000))]
