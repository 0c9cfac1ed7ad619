"""Grammars of the containers that nest: mp4/mov boxes, EBML elements, RIFF chunks, ASF objects."""

from __future__ import annotations

import struct
from types import MappingProxyType

from .element import Element, uint

MAX_DEPTH = 40
"""Levels that are read as such; deeper ones stay bytes."""


class Boxes:
    """mp4, mov and their fragments (ISO 14496-12)."""

    # Boxes that hold boxes, and how many bytes of fields come first.
    PARENTS = dict.fromkeys(
        (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"ilst", b"mvex", b"moof", b"traf", b"mfra"), 0
    ) | {
        b"dinf": 0,
        b"meta": 4,
        b"stsd": 8,
        b"dref": 8,
        b"avc1": 78,
        b"hvc1": 78,
        b"hev1": 78,
        b"mp4v": 78,
        b"jpeg": 78,
    }

    def parse(self, data: bytes) -> list[Element]:
        return self._parse(data, 0)

    def _parse(self, data: bytes, depth: int) -> list[Element]:
        found, at = [], 0
        while at + 8 <= len(data):
            size, name = struct.unpack_from(">I4s", data, at)
            if size < 8 or at + size > len(data):
                break
            skip = self.PARENTS.get(name)
            body = data[at + 8 : at + size]
            if skip is None or len(body) < skip or depth > MAX_DEPTH:
                found.append(Element(name, body))
            else:
                found.append(Element(name, body[:skip], self._parse(body[skip:], depth + 1)))
            at += size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            content = element.body + (self.write(element.children) if element.children else b"")
            if element.name:
                size = 8 + len(content) if element.claim is None else element.claim
                if size >= 2**32:
                    parts += [b"\0\0\0\1", element.name, uint(size, 8)]
                else:
                    parts += [uint(size, 4), element.name]
            parts.append(content)
        return b"".join(parts)


_EBML_PARENTS = """
    18538067 1549a966 1654ae6b ae e0 e1 1f43b675 a0 1c53bb6b bb b7 114d9b74 4dbb 1941a469 61a7
    1043a770 45b9 b6 80 1254c367 7373 63c0 67c8 6d80 6240 5034
"""


class Ebml:
    """Matroska and WebM (RFC 8794, RFC 9559)."""

    PARENTS = frozenset(map(bytes.fromhex, _EBML_PARENTS.split()))
    UNKNOWN = -1

    def parse(self, data: bytes) -> list[Element]:
        return self._parse(data, 0)

    def _parse(self, data: bytes, depth: int) -> list[Element]:
        found, at = [], 0
        while at < len(data):
            name_width = _width(data[at], 4)
            size_at = at + name_width
            if not name_width or size_at >= len(data):
                break
            width = _width(data[size_at], 8)
            start = size_at + width
            size = int.from_bytes(data[size_at:start], "big") & ((1 << (7 * width)) - 1) if width else 0
            if not width or start + size > len(data):
                break
            name, body = data[at:size_at], data[start : start + size]
            element = Element(name, body, head=bytes([width]))
            if name in self.PARENTS and depth < MAX_DEPTH:
                element.body, element.children = b"", self._parse(body, depth + 1)
            found.append(element)
            at = start + size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            content = element.body + (self.write(element.children) if element.children else b"")
            if element.name:
                parts += [element.name, self._size(element, len(content))]
            parts.append(content)
        return b"".join(parts)

    def _size(self, element: Element, true: int) -> bytes:
        if element.claim == self.UNKNOWN:
            return b"\x01" + b"\xff" * 7
        size = true if element.claim is None else element.claim & (2**56 - 2)
        width = element.head[0] if element.head else 1
        while size >= (1 << (7 * width)) - 1:
            width += 1
        return uint(size | 1 << (7 * width), width)


def _width(first: int, most: int) -> int:
    """Bytes of the EBML number that starts with `first`; 0 if it is longer than `most`."""
    width = 9 - first.bit_length()
    return width if width <= most else 0


class Riff:
    """AVI: chunks with sizes in little endian, padded to even."""

    def parse(self, data: bytes) -> list[Element]:
        found, at = [], 0
        while at + 8 <= len(data):
            name, size = struct.unpack_from("<4sI", data, at)
            if at + 8 + size > len(data):
                break
            body = data[at + 8 : at + 8 + size]
            if name in (b"RIFF", b"LIST") and size >= 4:
                found.append(Element(name, body[:4], self.parse(body[4:])))
            else:
                found.append(Element(name, body))
            at += 8 + size + size % 2
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            content = element.body + (self.write(element.children) if element.children else b"")
            if element.name:
                size = len(content) if element.claim is None else element.claim
                parts += [element.name, uint(size, 4, "little")]
            parts.append(content)
            if element.name and len(content) % 2:
                parts.append(b"\0")
        return b"".join(parts)


class Asf:
    """ASF/WMV: objects with a GUID and a 64-bit size in little endian."""

    HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
    EXTENSION = bytes.fromhex("b503bf5f2ea9cf118ee300c00c205365")
    PARENTS = MappingProxyType({HEADER: 6, EXTENSION: 22})

    def parse(self, data: bytes) -> list[Element]:
        found, at = [], 0
        while at + 24 <= len(data):
            name, size = struct.unpack_from("<16sQ", data, at)
            if size < 24 or at + size > len(data):
                break
            body, skip = data[at + 24 : at + size], self.PARENTS.get(name)
            if skip is None or len(body) < skip:
                found.append(Element(name, body))
            else:
                found.append(Element(name, body[:skip], self.parse(body[skip:])))
            at += size
        return found + ([Element(b"", data[at:])] if at < len(data) else [])

    def write(self, elements: list[Element]) -> bytes:
        parts = []
        for element in elements:
            body, children = element.body, self.write(element.children) if element.children else b""
            if element.name == self.EXTENSION and element.children is not None and len(body) == 22:
                body = body[:18] + uint(len(children), 4, "little")
            if element.name:
                size = 24 + len(body) + len(children) if element.claim is None else element.claim
                parts += [element.name, uint(size, 8, "little")]
            parts += [body, children]
        return b"".join(parts)
