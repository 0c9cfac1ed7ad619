"""Operations for mp4 and mov: every box that states a count or a size, and boxes in odd places."""

from __future__ import annotations

import struct
from collections.abc import Callable

from .bombs import zlib_zeros
from .element import Element, File, uint
from .generic import room, set_number
from .operations import CLAIM, choice, count, operation

_ENTRIES = count(60_000)
_EDIT = ">IiI"
_HANDLERS = (b"vide", b"soun", b"meta", b"text")
_PIFF = bytes.fromhex("a5d40b30e81411ddba2f0800200c9a66")


def _full(name: bytes, *numbers: int, rest: bytes = b"", flags: int = 0) -> Element:
    """A box with version 0, `flags` and 32-bit numbers, then `rest`."""
    return Element(name, uint(flags, 4) + b"".join(uint(n, 4) for n in numbers) + rest)


# Each: the box that holds it, and the box that states `claim` entries and has `n`, all of them `value`.
_TABLES: dict[str, tuple[bytes, Callable[[int, int, int], Element]]] = {
    "stsz": (b"stbl", lambda c, n, v: _full(b"stsz", v % 3, c, rest=uint(v, 4) * n)),
    "stz2": (b"stbl", lambda c, n, v: _full(b"stz2", (4, 8, 16)[v % 3], c, rest=uint(v, 1) * n)),
    "stts": (b"stbl", lambda c, n, v: _full(b"stts", n, rest=struct.pack(">II", c & 0xFFFFFFFF, v & 0xFFFF) * n)),
    "ctts": (b"stbl", lambda c, n, v: _full(b"ctts", n, rest=struct.pack(">II", c & 0xFFFFFFFF, v & 0xFFFF) * n)),
    "stts_count": (b"stbl", lambda c, n, v: _full(b"stts", c, rest=struct.pack(">II", 1, v & 0xFFFF) * n)),
    "ctts_count": (b"stbl", lambda c, n, v: _full(b"ctts", c, rest=struct.pack(">II", 1, v & 0xFFFF) * n)),
    "stsc": (
        b"stbl",
        lambda c, n, v: _full(b"stsc", n, rest=b"".join(uint(i + 1, 4) + uint(c, 4) + uint(1, 4) for i in range(n))),
    ),
    "stsc_count": (b"stbl", lambda c, n, v: _full(b"stsc", c, rest=struct.pack(">III", 1, v & 0xFFFF, 1) * n)),
    "stco": (b"stbl", lambda c, n, v: _full(b"stco", c, rest=uint(v, 4) * n)),
    "co64": (b"stbl", lambda c, n, v: Element(b"co64", uint(0, 4) + uint(c, 4) + uint(v, 8) * n)),
    "stss": (b"stbl", lambda c, n, v: _full(b"stss", c, rest=uint(v, 4) * n)),
    "stps": (b"stbl", lambda c, n, v: _full(b"stps", c, rest=uint(v, 4) * n)),
    "sdtp": (b"stbl", lambda c, n, v: _full(b"sdtp", rest=uint(v, 1) * n)),
    "sbgp": (b"stbl", lambda c, n, v: Element(b"sbgp", uint(0, 4) + b"rap " + uint(c, 4) + uint(v, 8) * n)),
    "sgpd": (b"stbl", lambda c, n, v: Element(b"sgpd", uint(1 << 24, 4) + b"sync" + uint(1, 4) + uint(c, 4) + bytes(n))),
    "stsd": (b"stbl", lambda c, n, v: _full(b"stsd", c, rest=(uint(16, 4) + b"avc1" + uint(v, 8)) * n)),
    "elst": (b"edts", lambda c, n, v: _full(b"elst", n, rest=struct.pack(_EDIT, c & 0xFFFFFFFF, v % 3 - 1, 1 << 16) * n)),
    "elst_count": (b"edts", lambda c, n, v: _full(b"elst", c, rest=struct.pack(">IiI", 40, v % 3 - 1, 1 << 16) * n)),
    "trun": (b"traf", lambda c, n, v: _full(b"trun", c, rest=uint(v, 4) * n, flags=(0, 1, 0x100, 0x200)[v % 4])),
    "tfhd": (b"traf", lambda c, n, v: _full(b"tfhd", v % 3, rest=uint(c, 8) * (n % 9), flags=0x3B)),
    "tfdt": (b"traf", lambda c, n, v: Element(b"tfdt", uint(1 << 24, 4) + uint(c, 8))),
    "senc": (b"traf", lambda c, n, v: _full(b"senc", c, rest=uint(v, 1) * n, flags=v % 3)),
    "saiz": (b"traf", lambda c, n, v: Element(b"saiz", uint(0, 4) + uint(v, 1) + uint(c, 4) + bytes(n))),
    "saio": (b"traf", lambda c, n, v: _full(b"saio", c, rest=uint(v, 4) * n)),
    "tenc": (b"stbl", lambda c, n, v: Element(b"tenc", uint(0, 4) + bytes([0, 0, 1, v % 32]) + uint(c, 16) + bytes(n))),
    "pssh": (b"moov", lambda c, n, v: Element(b"pssh", uint(1 << 24, 4) + bytes(16) + uint(c, 4) + uint(v, 16) * (n % 999))),
    "pssh_data": (b"moov", lambda c, n, v: Element(b"pssh", uint(0, 4) + bytes(16) + uint(c, 4) + bytes(n))),
    "sidx": (b"", lambda c, n, v: _full(b"sidx", 1, 1000, v, 0, n & 0xFFFF, rest=(uint(c, 4) + uint(1 << 32, 8)) * n)),
    "tfra": (b"mfra", lambda c, n, v: _full(b"tfra", 1, v, c, rest=uint(v, 11) * n)),
    "dref": (b"dinf", lambda c, n, v: _full(b"dref", c, rest=(uint(12, 4) + b"alis" + uint(v, 4)) * n)),
    "keys": (b"meta", lambda c, n, v: _full(b"keys", c, rest=(uint(8 + v % 9, 4) + b"mdta" + bytes(v % 9)) * n)),
    "trex": (b"mvex", lambda c, n, v: Element(b"trex", (uint(0, 4) + uint(v, 4) + uint(1, 4) + uint(c, 12)) * n)),
    "chpl": (b"udta", lambda c, n, v: Element(b"chpl", uint(1 << 24, 4) + bytes(4) + uint(c, 1) + (uint(v, 8) + b"\1a") * n)),
    "hdlr": (b"mdia", lambda c, n, v: _full(b"hdlr", 0, rest=_HANDLERS[v % 4] + bytes(12) + uint(c, 1) * n)),
    "avcC": (b"avc1", lambda c, n, v: Element(b"avcC", b"\1\x42\0\x0a\xff" + uint(c | 0xE0, 1) + (uint(v, 2) + b"gB") * n)),
    "hvcC": (b"hev1", lambda c, n, v: Element(b"hvcC", bytes(22) + uint(c, 1) + (b"\x20" + uint(v, 2) + b"\0\1\0") * n)),
    "glbl": (b"avc1", lambda c, n, v: Element(b"glbl", uint(v, 1) * n)),
    "colr": (b"avc1", lambda c, n, v: Element(b"colr", b"prof" + uint(c, 8) + bytes(n))),
    "free": (b"moov", lambda c, n, v: Element(b"free", uint(v, 1) * n, claim=c)),
    "uuid": (b"", lambda c, n, v: Element(b"uuid", _PIFF + uint(v, 1) * n)),
}  # fmt: skip


def _register(kind: str, parent: bytes, build: Callable[[int, int, int], Element]) -> None:
    @operation(f"mp4.{kind}", CLAIM, _ENTRIES, CLAIM, families="mp4")
    def change(file: File, claim: int, entries: int, value: int) -> None:
        _ensure(file, parent)
        file.child(parent, build(claim, min(entries, 300_000), value))


for _kind, (_parent, _build) in _TABLES.items():
    _register(_kind, _parent, _build)


def _ensure(file: File, name: bytes) -> None:
    """Have a box `name` that can hold boxes, in its usual place."""
    if not name or file.find(name) is not None:
        return
    above = {b"edts": b"trak", b"udta": b"moov", b"mvex": b"moov", b"meta": b"udta", b"ilst": b"meta", b"traf": b"moof"}
    parent = above.get(name, b"")
    _ensure(file, parent)
    file.child(parent, Element(name, bytes(4) if name == b"meta" else b"", []))


@operation("mp4.samples", CLAIM, families="mp4")
def samples(file: File, claimed: int) -> None:
    """A track of `claimed` samples of no size, stated by four small boxes that agree."""
    if file.find(b"stbl") is None:
        return
    claimed &= 0xFFFFFFFF
    file.child(b"stbl", _full(b"stts", 1, claimed, 1))
    file.child(b"stbl", _full(b"stsc", 1, 1, claimed, 1))
    file.child(b"stbl", _full(b"stsz", 1, claimed))
    file.child(b"stbl", _full(b"stco", 1, 40))


@operation("mp4.first", choice(12), families="mp4")
def first(file: File, kind: int) -> None:
    """Another first box in the place of ftyp; some that libav takes for mp4 only a good while later."""
    names = [b"uuid", b"free", b"skip", b"junk", b"wide", b"pict", b"prfl", b"udta", b"pnot", b"hoov", b"mdat", b"jP  "]
    file.roots = [root for root in file.roots if root.name != b"ftyp"]
    file.roots.insert(0, Element(names[kind % len(names)], bytes(16)))


@operation("mp4.index_first", families="mp4")
def index_first(file: File) -> None:
    """The moov box before the media: an index that nothing needs to seek for."""
    file.roots.sort(key=lambda root: root.name == b"mdat")


@operation("mp4.index_in", choice(4), choice(3), families="mp4")
def index_in(file: File, kind: int, way: int) -> None:
    """The movie's index under the name of padding, inside padding, or behind a copy of it."""
    moov = file.find(b"moov")
    if moov is None or not any(root is moov for root in file.roots):
        return
    name = (b"free", b"hoov", b"skip", b"uuid")[kind % 4]
    if way == 0:
        moov.name = name
    else:
        index = next(i for i, root in enumerate(file.roots) if root is moov)
        inner = Element(name, b"", [moov])
        file.roots[index : index + 1] = [inner] if way == 1 else [Element(name, b"", [moov.copy()]), moov]


@operation("mp4.decoy", choice(6), families="mp4")
def decoy(file: File, kind: int) -> None:
    """A harmless box within padding that a search by name finds first, or bytes that look like one."""
    names = (b"hdlr", b"stsz", b"stts", b"trak", b"mdat", b"moov")
    fake = struct.pack(">I4s", 32, names[kind % 6]) + bytes(8) + b"soun" + bytes(8)
    file.child(b"trak", Element(b"free", fake), replacing=False)


@operation("mp4.tracks", count(200, also=(4, 64)), families="mp4")
def tracks(file: File, more: int) -> None:
    """Tracks in all, each with a number of its own."""
    track = file.find(b"trak")
    if track is None:
        return
    items = file.siblings(track)
    for number in range(1, min(more, room(file, track))):
        copy = track.copy()
        for element in copy.walk():
            if element.name == b"tkhd":
                element.body = set_number(element.body, 12, 4, number + 1)
        items.append(copy)


@operation("mp4.depth", choice(8), count(20_000), families="mp4")
def depth(file: File, kind: int, levels: int) -> None:
    """Boxes in boxes in boxes."""
    name = (b"moov", b"trak", b"udta", b"meta", b"mdia", b"moof", b"edts", b"stsd")[kind % 8]
    levels, head = min(levels, 20_000), {b"meta": 4, b"stsd": 8}.get(name, 0)
    step = 8 + head
    opened = b"".join(uint(step * (levels - i), 4) + name + bytes(head) for i in range(levels))
    file.roots.append(Element(b"", opened))


@operation("mp4.ilst", count(8000), count(5000), choice(4), families="mp4")
def ilst(file: File, items: int, size: int, kind: int) -> None:
    """Tags in udta/meta/ilst: texts, covers, free-form, numbers."""
    name, data_type = ((b"\xa9nam", 1), (b"covr", 14), (b"----", 1), (b"trkn", 0))[kind % 4]
    value = Element(b"data", uint(data_type, 4) + bytes(4) + b"\x89PNG\r\n\x1a\n".ljust(size, b"a")[:size])
    extra = [Element(b"mean", bytes(4) + b"m"), Element(b"name", bytes(4) + b"n")] if name == b"----" else []
    _ensure(file, b"ilst")
    file.child(b"meta", Element(b"hdlr", bytes(8) + b"mdir" + bytes(13)))
    room = 400_000 // (size + 60)
    file.child(b"meta", Element(b"ilst", b"", [Element(name, b"", [*extra, value]) for _ in range(min(items, room))]))


@operation("mp4.udta", count(20_000), families="mp4")
def udta(file: File, items: int) -> None:
    """User data: strings under changing names."""
    texts = [Element(b"\xa9" + b"%03d" % (i % 1000), b"\0\1\0\0a") for i in range(min(items, 25_000))]
    _ensure(file, b"udta")
    file.child(b"moov", Element(b"udta", b"", texts))


@operation("mp4.cmov", CLAIM, count(300_000_000, also=(300_000_000,)), families="mp4")
def cmov(file: File, claimed: int, size: int) -> None:
    """A compressed index: zlib of `size` zeros, that states another size."""
    packed = zlib_zeros(size)
    inner = [Element(b"dcom", b"zlib"), Element(b"cmvd", uint(claimed, 4) + packed)]
    file.roots = [root for root in file.roots if root.name != b"moov"]
    file.roots.append(Element(b"moov", b"", [Element(b"cmov", b"", inner)]))


@operation("mp4.fragments", count(5000), CLAIM, count(200), families="mp4")
def fragments(file: File, many: int, claimed: int, runs: int) -> None:
    """Fragments, each of `runs` runs that claim samples without listing them."""
    many, runs = min(many, 8000), min(runs, 500)
    _ensure(file, b"mvex")
    file.child(b"mvex", _full(b"trex", 1, 1, 1, 1, 0))
    traf = [_full(b"tfhd", 1), *[_full(b"trun", claimed) for _ in range(runs)]]
    moof = Element(b"moof", b"", [_full(b"mfhd", 1), Element(b"traf", b"", traf)])
    size = 48 + 16 * runs
    file.roots += [moof.copy() for _ in range(min(many, 380_000 // size))]


@operation("mp4.edits", count(30_000), families="mp4")
def edits(file: File, cuts: int) -> None:
    """An edit list that shows the whole track again and again."""
    _ensure(file, b"edts")
    file.child(b"edts", _full(b"elst", cuts, rest=struct.pack(">IiI", 500, 0, 1 << 16) * min(cuts, 33_000)))
