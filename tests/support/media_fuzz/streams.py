"""Grammars of the containers that are a flat run of parts: ts, ps, flv, ogg, ivf, gif, png."""

from __future__ import annotations

import zlib
from functools import cache

from .element import Element, uint


@cache
def _crc_table() -> tuple[int, ...]:
    """Table of the CRC with polynomial 0x04c11db7, high bit first, of mpeg-ts sections and ogg pages."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return tuple(table)


def crc32_high(data: bytes, start: int) -> int:
    """That CRC of `data`, from the value `start`."""
    value, table = start, _crc_table()
    for byte in data:
        value = ((value << 8) & 0xFFFFFFFF) ^ table[(value >> 24) ^ byte]
    return value


class Ts:
    """MPEG transport streams: packets of 188 bytes. Those that hold one short section get its checksum."""

    PACKET = 188

    def parse(self, data: bytes) -> list[Element]:
        packets = [data[at : at + self.PACKET] for at in range(0, len(data), self.PACKET)]
        return [Element(b"section" if _is_section(packet) else b"packet", packet) for packet in packets]

    def write(self, elements: list[Element]) -> bytes:
        return b"".join(_with_crc(e.body) if e.name == b"section" else e.body for e in elements)


def _is_section(packet: bytes) -> bool:
    """Whether `packet` starts a section that ends in it, and has no adaptation field."""
    if len(packet) < 188 or packet[0] != 0x47 or not packet[1] & 0x40 or packet[3] & 0x20 or packet[4]:
        return False
    length = int.from_bytes(packet[6:8], "big") & 0xFFF
    return packet[5] in (0, 2, 0x42) and 9 <= length <= 180


def _with_crc(packet: bytes) -> bytes:
    if not _is_section(packet):
        return packet
    end = 8 + (int.from_bytes(packet[6:8], "big") & 0xFFF) - 4
    return packet[:end] + uint(crc32_high(packet[5:end], 0xFFFFFFFF), 4) + packet[end + 4 :]


class Ps:
    """MPEG program streams: parts that begin with 00 00 01 and a byte of 0xB9 or more."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [], 0
        while at + 4 <= len(data) and data[at : at + 3] == b"\0\0\1" and data[at + 3] >= 0xB9:
            name = data[at + 3 : at + 4]
            if name in (b"\xb9", b"\xba"):
                end = min(len(data), at + (4 if name == b"\xb9" else 14 if data[at + 4] & 0xC0 == 0x40 else 12))
                if name == b"\xba" and data[at + 4] & 0xC0 == 0x40:
                    end += data[at + 13] & 7
                found.append(Element(name, data[at + 4 : end], head=b"fixed"))
            else:
                end = min(len(data), at + 6 + int.from_bytes(data[at + 4 : at + 6], "big"))
                found.append(Element(name, data[at + 6 : end]))
            at = end
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            if element.name:
                parts += [b"\0\0\1", element.name]
                if element.head != b"fixed":
                    parts.append(uint(len(element.body) if element.claim is None else element.claim, 2))
            parts.append(element.body)
        return b"".join(parts)


class Flv:
    """FLV: a header, then tags of type, size, time and stream number."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [Element(b"", data[:13])], 13
        while at + 11 <= len(data):
            size = int.from_bytes(data[at + 1 : at + 4], "big")
            if at + 15 + size > len(data):
                break
            found.append(Element(data[at : at + 1], data[at + 11 : at + 11 + size], head=data[at + 4 : at + 11]))
            at += 15 + size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            if element.name:
                size = len(element.body) if element.claim is None else element.claim
                head = element.head.ljust(7, b"\0")[:7]
                parts += [element.name, uint(size, 3), head, element.body, uint(len(element.body) + 11, 4)]
            else:
                parts.append(element.body)
        return b"".join(parts)


class Ogg:
    """Ogg pages (RFC 3533). `head`: 18 bytes, version to page number; `body`: segment table and data."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [], 0
        while at + 27 <= len(data) and data[at : at + 4] == b"OggS":
            table = data[at + 27 : at + 27 + data[at + 26]]
            end = at + 27 + len(table) + sum(table)
            if end > len(data):
                break
            found.append(Element(b"OggS", data[at + 26 : end], head=data[at + 4 : at + 22]))
            at = end
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            if element.name:
                head = b"OggS" + element.head.ljust(18, b"\0")[:18]
                crc = crc32_high(head + bytes(4) + element.body, 0)
                parts += [head, uint(crc, 4, "little")]
            parts.append(element.body)
        return b"".join(parts)


class Ivf:
    """IVF: a header of 32 bytes, then frames with a size and a time."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [Element(b"", data[:32])], 32
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 4], "little")
            if at + 12 + size > len(data):
                break
            found.append(Element(b"frame", data[at + 12 : at + 12 + size], head=data[at + 4 : at + 12]))
            at += 12 + size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            if element.name:
                size = len(element.body) if element.claim is None else element.claim
                parts += [uint(size, 4, "little"), element.head.ljust(8, b"\0")[:8]]
            parts.append(element.body)
        return b"".join(parts)


class Gif:
    """GIF: the screen with its palette, then extensions (``!``), pictures (``,``) and the end (``;``)."""

    def parse(self, data: bytes) -> list[Element]:
        at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
        found = [Element(b"", data[:at])]
        while at < len(data) and data[at : at + 1] in (b"!", b","):
            name, start = data[at : at + 1], at + 1
            at += 2
            if name == b",":
                packed = data[at + 8] if at + 8 < len(data) else 0
                at += 9 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)
            while at < len(data) and data[at]:
                at += 1 + data[at]
            at += 1
            found.append(Element(name, data[start:at]))
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        return b"".join(element.name + element.body for element in elements)


class Png:
    """PNG and APNG chunks; each gets its checksum."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [Element(b"", data[:8])], 8
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            if at + 12 + size > len(data):
                break
            found.append(Element(data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
            at += 12 + size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            if element.name:
                size = len(element.body) if element.claim is None else element.claim
                parts += [uint(size, 4), element.name, element.body, uint(zlib.crc32(element.name + element.body), 4)]
            else:
                parts.append(element.body)
        return b"".join(parts)
