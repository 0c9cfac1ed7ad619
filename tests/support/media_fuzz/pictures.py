"""Operations on what codecs state, and whole videos made to be large: sizes, references, bombs."""

from __future__ import annotations

import zlib
from functools import cache

from tests.support.clips import encode, repeated

from .bombs import zlib_zeros
from .element import Element, File, uint
from .generic import set_number
from .operations import CLAIM, Domain, choice, count, operation

_SIDE = Domain(1, 16_384, also=(4096, 8192, 16383, 1, 2, 65, 5000))

# What comes before width and height in each codec's own header, and how many bytes each takes; order of both.
_SIZES = (
    (b"\x9d\x01\x2a", "little", False),  # vp8 key frame
    (b"\0\0\1\xb3", "twelve", False),  # mpeg-1/2 sequence header
    (b"\xff\xc0\0\x11\x08", "big", True),  # jpeg start of frame: height first
    (b"\xff\xc2\0\x11\x08", "big", True),
)


def resize_in(body: bytes, width: int, height: int) -> bytes:
    """`body` with every codec header in it that is known stating `width` x `height`."""
    for mark, order, height_first in _SIZES:
        at = body.find(mark)
        while at >= 0:
            start = at + len(mark)
            if order == "twelve":
                size = uint((width & 0xFFF) << 12 | height & 0xFFF, 3)
                body = body[:start] + size + body[start + 3 :]
            else:
                one, two = (height, width) if height_first else (width, height)
                body = body[:start] + uint(one, 2, order) + uint(two, 2, order) + body[start + 4 :]
            at = body.find(mark, start)
    return body


@operation("picture.size", _SIDE, _SIDE, choice(3))
def size(file: File, width: int, height: int, start: int) -> None:
    """Codec headers that state another size: all of them, or those of the second half, or the last third."""
    elements = file.all()
    for element in elements[(0, len(elements) // 2, len(elements) * 2 // 3)[start % 3] :]:
        element.body = resize_in(element.body, width, height)


class _Bits:
    """Writes H.264's bit fields."""

    def __init__(self) -> None:
        self.text = ""

    def u(self, value: int, width: int) -> None:
        self.text += format(value & ((1 << width) - 1), f"0{width}b")

    def ue(self, value: int) -> None:
        code = format(min(value, 2**32 - 2) + 1, "b")
        self.text += "0" * (len(code) - 1) + code

    def data(self) -> bytes:
        text = self.text + "1"
        text += "0" * (-len(text) % 8)
        raw = int(text, 2).to_bytes(len(text) // 8, "big")
        for low in (0, 1, 2, 3):
            raw = raw.replace(bytes([0, 0, low]), bytes([0, 0, 3, low])) if low == 0 else raw
        return raw


def h264_sps(width: int, height: int, references: int, reorder: int, profile: int) -> bytes:
    """A sequence parameter set that states the size, its references, and the frames to hold back."""
    bits = _Bits()
    bits.u((66, 77, 100, 244)[profile % 4], 8)
    bits.u(0, 8)
    bits.u(62, 8)
    bits.ue(0)
    if profile % 4 >= 2:
        for value in (1 if profile % 4 == 2 else 3, 0, 0):
            bits.ue(value)
            if value == 3:
                bits.u(0, 1)
        bits.u(0, 2)
    bits.ue(0)
    bits.ue(2)
    bits.ue(references)
    bits.u(0, 1)
    bits.ue(max(0, (width + 15) // 16 - 1))
    bits.ue(max(0, (height + 15) // 16 - 1))
    bits.u(0b1100, 4)
    bits.u(0, 1) if not reorder else _vui(bits, reorder)
    return b"\x67" + bits.data()


def _vui(bits: _Bits, reorder: int) -> None:
    """The part on display that states `reorder` frames to hold back."""
    bits.u(0b1, 1)
    bits.u(0, 4)
    bits.u(0, 4)
    bits.u(1, 1)
    bits.u(1, 1)
    for value in (0, 0, 16, 16, reorder, reorder):
        bits.ue(value)


@operation("h264.header", _SIDE, _SIDE, count(20), count(17), choice(4), choice(2))
def h264_header(file: File, width: int, height: int, references: int, reorder: int, profile: int, where: int) -> None:
    """Another sequence parameter set, in the codec's private data and in the stream."""
    sps = h264_sps(width, height, references, reorder - 1, profile)
    pps = b"\x68\xce\x38\x80"
    config = b"\1" + sps[1:4] + b"\xff\xe1" + uint(len(sps), 2) + sps + b"\1" + uint(len(pps), 2) + pps
    for element in file.all():
        if element.name in (b"avcC", b"\x63\xa2"):
            element.body = config
        elif where % 2 and element.name in (b"\x09",) and element.body[:2] == b"\x17\0":
            element.body = element.body[:5] + config
        at = element.body.find(b"\0\0\1\x67")
        if at >= 0:
            # In place: a packet of a transport stream must keep its length.
            element.body = (element.body[: at + 3] + sps + element.body[at + 3 + len(sps) :])[: len(element.body)]


@operation("hevc.header", count(200), CLAIM, choice(8), families="mp4")
def hevc_header(file: File, at: int, value: int, width: int) -> None:
    """A number anywhere in the parameter sets of an hevc file."""
    for element in file.all():
        if element.name == b"hvcC":
            element.body = set_number(element.body, at % max(1, len(element.body)), width % 8 + 1, value)


@cache
def _still(width: int, height: int, frames: int) -> bytes:
    import numpy as np

    black = np.zeros((height, width, 3), np.uint8)
    pair = encode([black, black], options={"preset": "superfast", "g": "1", "threads": "1"})
    return repeated(pair, max(1, frames // 2))


@operation("black", _SIDE, _SIDE, count(600, also=(32, 64)), families="mp4")
def black(file: File, width: int, height: int, frames: int) -> None:
    """A good video of black pictures: large when decoded, small when sent."""
    width, height = max(16, min(width, 4096) // 2 * 2), max(16, min(height, 4096) // 2 * 2)
    file.roots = file.grammar.parse(_still(width, height, min(frames, 600)))


# ---- gif


def lzw_zeros(pixels: int, limit: int) -> bytes:
    """LZW codes of 12 bits at most that paint `pixels` dots of colour 0, or as many as `limit` bytes hold."""
    clear, code_width, text, done, code = 4, 3, [], 0, 6
    text.append(format(clear, "03b")[::-1])
    text.append(format(0, "03b")[::-1])
    done, run = 1, 1
    while done < pixels and code < 4096 and len(text) * 1.5 < limit:
        text.append(format(code, f"0{code_width}b")[::-1])
        run += 1
        done += run
        code += 1
        if code == 1 << code_width and code_width < 12:
            code_width += 1
    last, more = format(code - 1, "012b")[::-1], max(0, (pixels - done) // run)
    text.append(last * min(more, max(0, limit * 8 // 12 - len(text))))
    bits = "".join(text)
    bits += "0" * (-len(bits) % 8)
    return int(bits[::-1], 2).to_bytes(len(bits) // 8, "little") if bits else b""


def gif_picture(left: int, top: int, width: int, height: int, codes: bytes) -> Element:
    """A picture without a palette of its own."""
    blocks = b"".join(bytes([len(part)]) + part for part in (codes[at : at + 255] for at in range(0, len(codes), 255)))
    place = uint(left, 2, "little") + uint(top, 2, "little") + uint(width, 2, "little") + uint(height, 2, "little")
    return Element(b",", place + b"\0\2" + blocks + b"\0")


@operation("gif.canvas", _SIDE, _SIDE, families="gif")
def canvas(file: File, width: int, height: int) -> None:
    """The screen's size."""
    if file.roots:
        file.roots[0].body = set_number(set_number(file.roots[0].body, 6, 2, width, "little"), 8, 2, height, "little")


@operation("gif.frames", count(12_000), choice(8), families="gif")
def frames(file: File, many: int, disposal: int) -> None:
    """Pictures of one dot, each after a change that the whole screen may need."""
    control = Element(b"!", b"\xf9\4" + bytes([disposal % 8 << 2, 1, 0, 0, 0]))
    dot = gif_picture(0, 0, 1, 1, b"\x44\1")
    end = file.roots[-1:] if file.roots and file.roots[-1].body == b";" else []
    keep = file.roots[: len(file.roots) - len(end)]
    file.roots = keep + [part for _ in range(min(many, 16_000)) for part in (control, dot)] + end


@operation("gif.lzw", _SIDE, _SIDE, count(60), families="gif")
def lzw(file: File, width: int, height: int, many: int) -> None:
    """Pictures that fill the screen from few codes."""
    canvas(file, width, height)
    many = max(1, min(many, 60))
    picture = gif_picture(0, 0, width, height, lzw_zeros(width * height, 390_000 // many))
    file.roots[1:1] = [picture.copy() for _ in range(many)]


@operation("gif.extensions", count(100_000), choice(4), families="gif")
def extensions(file: File, many: int, kind: int) -> None:
    """Extensions that hold nothing."""
    one = (b"\xfe\0", b"\xf9\0", b"\xff\0", b"\x01\0")[kind % 4]
    file.roots[1:1] = [Element(b"", (b"!" + one) * min(many, 130_000))]


# ---- apng


@operation("png.canvas", _SIDE, _SIDE, choice(7), choice(5), families="png")
def png_canvas(file: File, width: int, height: int, colour: int, depth: int) -> None:
    """The picture's size, colours and depth."""
    header = file.find(b"IHDR")
    if header is not None:
        header.body = (
            uint(width, 4) + uint(height, 4) + bytes([(1, 2, 4, 8, 16)[depth % 5], colour % 7]) + header.body[10:]
        )


@operation("png.frames", count(8000), CLAIM, choice(3), families="png")
def png_frames(file: File, many: int, claimed: int, kind: int) -> None:
    """Many frames of one dot, and how many there are said to be."""
    control, picture = file.find(b"acTL"), zlib.compress(bytes(4))
    if control is not None:
        control.body = uint(claimed, 4) + control.body[4:]
    made = []
    for i in range(min(many, 6000)):
        frame = uint(2 * i + 99, 4) + uint(1, 4) + uint(1, 4) + bytes(8) + b"\0\1\0\x64" + bytes([kind % 3, 0])
        made += [Element(b"fcTL", frame), Element(b"fdAT", uint(2 * i + 100, 4) + picture)]
    file.roots[-1:-1] = made[: 390_000 // 35]


@operation("png.inflate", choice(5), count(300_000_000, also=(300_000_000,)), families="png")
def inflate(file: File, kind: int, size: int) -> None:
    """Compressed chunks of zeros: pixels, texts, colour profile."""
    name, head = (
        (b"IDAT", b""),
        (b"zTXt", b"k\0\0"),
        (b"iTXt", b"k\0\1\0\0\0"),
        (b"iCCP", b"k\0\0"),
        (b"fdAT", b"\0\0\0\1"),
    )[kind % 5]
    chunk = Element(name, head + zlib_zeros(size))
    at = next((i for i, root in enumerate(file.roots) if root.name == b"IDAT"), len(file.roots))
    file.roots.insert(at, chunk)


@operation("png.chunks", count(30_000), choice(5), families="png")
def chunks(file: File, many: int, kind: int) -> None:
    """Chunks of a few bytes."""
    name, body = (
        (b"tEXt", b"k\0v"),
        (b"zTXt", b"k\0\0" + zlib.compress(b"v")),
        (b"fcTL", bytes(26)),
        (b"fdAT", bytes(4)),
        (b"PLTE", bytes(3)),
    )[kind % 5]
    at = next((i for i, root in enumerate(file.roots) if root.name == b"IDAT"), len(file.roots))
    file.roots[at:at] = [Element(name, body)] * min(many, 390_000 // (12 + len(body)))
