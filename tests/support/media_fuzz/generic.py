"""Operations for every container: on the tree of elements, and on bytes."""

from __future__ import annotations

from .bases import BASES, NAMES, base_data
from .element import Element, File, place, uint
from .operations import BYTE, CLAIM, INDEX, OFFSET, PERMILLE, choice, count, operation

MAX_COPIES_BYTES = 400_000


def pick(file: File, index: int) -> Element:
    """Element number `index`, modulo how many there are."""
    elements = file.all() or [Element(b"")]
    return elements[index % len(elements)]


def room(file: File, *elements: Element) -> int:
    """How many times `elements` fit into a case at most."""
    return MAX_COPIES_BYTES // max(1, len(file.grammar.write(list(elements))))


def set_number(body: bytes, at: int, width: int, value: int, order: str = "big") -> bytes:
    """`body` with `value` in `width` bytes at `at`, where that is within it."""
    if at + width > len(body):
        return body
    return body[:at] + uint(value, width, order) + body[at + width :]


@operation("repeat", INDEX, count(3000))
def repeat(file: File, index: int, times: int) -> None:
    """One element, `times` more times."""
    if file.roots:
        element = pick(file, index)
        items = file.siblings(element)
        at = place(items, element)
        items[at:at] = [element.copy() for _ in range(min(times, room(file, element)))]


@operation("drop", INDEX)
def drop(file: File, index: int) -> None:
    """One element less."""
    if file.roots:
        element = pick(file, index)
        items = file.siblings(element)
        del items[place(items, element)]


@operation("swap", INDEX, INDEX)
def swap(file: File, one: int, other: int) -> None:
    """The contents of two elements, each under the other's header."""
    if file.roots:
        first, second = pick(file, one), pick(file, other)
        if not any(e is second for e in first.walk()) and not any(e is first for e in second.walk()):
            first.body, second.body = second.body, first.body
            first.children, second.children = second.children, first.children


@operation("splice", INDEX, choice(len(NAMES)), INDEX)
def splice(file: File, index: int, base: int, theirs: int) -> None:
    """An element of another base file of this grammar, before one of ours."""
    other = BASES[NAMES[base % len(NAMES)]]
    if file.roots and type(other.grammar) is type(file.grammar):
        graft = pick(File.parse(other.grammar, base_data(NAMES[base % len(NAMES)])), theirs).copy()
        element = pick(file, index)
        items = file.siblings(element)
        items.insert(place(items, element), graft)


@operation("claim", INDEX, CLAIM)
def claim(file: File, index: int, size: int) -> None:
    """A header that states another size."""
    pick(file, index).claim = size


@operation("claim_near", INDEX, choice(64))
def claim_near(file: File, index: int, wrong: int) -> None:
    """A header that states a size a few bytes off."""
    element = pick(file, index)
    element.claim = max(0, len(file.grammar.write([Element(b"", element.body, element.children)])) + wrong - 32)


@operation("unknown", INDEX, families="ebml")
def unknown(file: File, index: int) -> None:
    """An EBML element of unknown size."""
    pick(file, index).claim = -1


@operation("rename", INDEX, INDEX)
def rename(file: File, index: int, other: int) -> None:
    """An element under the name of another."""
    if file.roots:
        pick(file, index).name = pick(file, other).name


@operation("nest", INDEX, count(2000), families="mp4 ebml avi asf")
def nest(file: File, index: int, depth: int) -> None:
    """An element wrapped `depth` times in empty elements of its parent's name, or of its own."""
    if not file.roots:
        return
    element = pick(file, index)
    items = file.siblings(element)
    parent = next((e for e in file.all() if e.children is items), element)
    # Written at once: a tree this deep would be too deep for Python's own stack.
    inner = file.grammar.write([element])
    for _ in range(min(depth, 3000, 20_000_000 // (len(inner) + 1))):
        if len(inner) > MAX_COPIES_BYTES:
            break
        inner = file.grammar.write([Element(parent.name, (parent.body if parent.children else b"") + inner)])
    items[place(items, element)] = Element(b"", inner)


@operation("number", INDEX, OFFSET, choice(4), CLAIM)
def number(file: File, index: int, at: int, log_width: int, value: int) -> None:
    """One number, big endian, of 1 to 8 bytes in an element's fields."""
    element = pick(file, index)
    element.body = set_number(element.body, at, 1 << (log_width % 4), value)


@operation("number_little", INDEX, OFFSET, choice(4), CLAIM, families="avi asf ivf gif ogg")
def number_little(file: File, index: int, at: int, log_width: int, value: int) -> None:
    """One number, little endian, in an element's fields."""
    element = pick(file, index)
    element.body = set_number(element.body, at, 1 << (log_width % 4), value, "little")


@operation("number_head", INDEX, choice(18), CLAIM, families="flv ogg ivf")
def number_head(file: File, index: int, at: int, value: int) -> None:
    """Four bytes of an element's header: times, stream and page numbers."""
    element = pick(file, index)
    element.head = set_number(element.head, at, min(4, max(0, len(element.head) - at)), value, "little")


@operation("grow", INDEX, count(300_000), BYTE)
def grow(file: File, index: int, size: int, fill: int) -> None:
    """More bytes at the end of an element."""
    pick(file, index).body += bytes([fill % 256]) * size


@operation("shrink", INDEX, PERMILLE)
def shrink(file: File, index: int, kept: int) -> None:
    """The first `kept` thousandths of an element."""
    element = pick(file, index)
    element.body = element.body[: len(element.body) * kept // 1000]


def _rewritten(file: File, data: bytes) -> None:
    file.roots = file.grammar.parse(data)


@operation("cut", PERMILLE)
def cut(file: File, kept: int) -> None:
    """The first `kept` thousandths of the file."""
    data = file.data()
    _rewritten(file, data[: len(data) * kept // 1000])


@operation("flip", PERMILLE, OFFSET, choice(8))
def flip(file: File, near: int, offset: int, bit: int) -> None:
    """One bit, anywhere."""
    data = bytearray(file.data())
    if data:
        data[(len(data) * near // 1000 + offset) % len(data)] ^= 1 << (bit % 8)
        _rewritten(file, bytes(data))


@operation("flip_head", INDEX, OFFSET, choice(8))
def flip_head(file: File, index: int, at: int, bit: int) -> None:
    """One bit in an element's fields."""
    element = pick(file, index)
    if element.body:
        body = bytearray(element.body)
        body[at % len(body)] ^= 1 << (bit % 8)
        element.body = bytes(body)


@operation("gap", PERMILLE, count(3000))
def gap(file: File, near: int, size: int) -> None:
    """Some bytes less."""
    data = file.data()
    at = len(data) * near // 1000
    _rewritten(file, data[:at] + data[at + size :])


@operation("again", PERMILLE, count(3000))
def again(file: File, near: int, size: int) -> None:
    """Some bytes twice."""
    data = file.data()
    at = len(data) * near // 1000
    _rewritten(file, data[:at] + data[max(0, at - size) :])


@operation("append", choice(len(NAMES)))
def append(file: File, base: int) -> None:
    """Another base file behind this one."""
    file.roots.append(Element(b"", base_data(NAMES[base % len(NAMES)])))


@operation("id3", count(200_000), choice(3))
def id3(file: File, size: int, kind: int) -> None:
    """An ID3 tag before the file: padding, comments, or pictures. libav reads it before any container."""
    if kind == 0:
        frames = bytes(size)
    else:
        one = (
            b"TXXX" + uint(8, 4) + b"\0\0" + b"\0k\0value"
            if kind == 1
            else b"APIC" + uint(24, 4) + b"\0\0" + b"\0image/png\0\3c\0" + b"\x89PNG\r\n\x1a\n\0\0"
        )
        frames = one * (size // len(one))
    length = bytes((len(frames) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    file.roots.insert(0, Element(b"", b"ID3\3\0\0" + length + frames))
