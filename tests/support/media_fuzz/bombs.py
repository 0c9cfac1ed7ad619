"""Compressed streams of zeros: short to send, long to unpack. Made without packing what they hold."""

from __future__ import annotations

import bz2
import zlib
from functools import cache

from .element import uint

MOST = 300_000_000
_BLOCK = 1 << 20
_ADLER = 65521


@cache
def _deflated_block() -> bytes:
    """A megabyte of zeros as deflate data that may stand anywhere in a stream."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(_BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)


def zlib_zeros(size: int) -> bytes:
    """A zlib stream of `size` zeros, `MOST` at most, about a thousandth as long."""
    size = min(size, MOST)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = packer.compress(bytes(size % _BLOCK)) + packer.flush()
    return b"\x78\xda" + _deflated_block() * (size // _BLOCK) + rest + uint(size % _ADLER << 16 | 1, 4)


@cache
def bz2_zeros(size: int) -> bytes:
    """A bz2 stream of `size` zeros, 30 MB at most."""
    return bz2.compress(bytes(min(size, 30_000_000)))


def lzo_zeros(size: int) -> bytes:
    """LZO data: a few zeros, then a copy of what came before, 255 bytes for each zero length byte."""
    return b"\x15\0\0\0\0" + b"\x20" + bytes(min(size // 255, 300_000)) + b"\x1d\0\0\x11\0\0"
