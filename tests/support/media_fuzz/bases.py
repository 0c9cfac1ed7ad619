"""The valid files from which cases start, one or more of each container that the decoder reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.support.clips import clip, tone

from .element import File, Grammar
from .streams import Flv, Gif, Ivf, Ogg, Png, Ps, Ts
from .trees import Asf, Boxes, Ebml, Riff

_FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


@dataclass(frozen=True)
class Base:
    """A kind of file: its container family, its grammar, and how `clips.clip` makes it."""

    family: str
    grammar: Grammar
    how: dict[str, Any]


def _base(family: str, grammar: Grammar, **how: Any) -> Base:
    return Base(family, grammar, how)


BASES: dict[str, Base] = {
    "mp4": _base("mp4", Boxes(), options={"g": "6"}),
    "mp4-hevc": _base("mp4", Boxes(), codec="libx265", options={"x265-params": "log-level=none"}),
    "mp4-mpeg4": _base("mp4", Boxes(), codec="mpeg4"),
    "mov-mjpeg": _base("mp4", Boxes(), codec="mjpeg", container="mov", pix_fmt="yuvj420p"),
    "mp4-fragments": _base("mp4", Boxes(), options={"g": "4"}, container_options=_FRAGMENTED),
    "mp4-sound": _base("mp4", Boxes()),
    "mkv": _base("ebml", Ebml(), container="matroska"),
    "mkv-ffv1": _base("ebml", Ebml(), container="matroska", codec="ffv1"),
    "webm-vp8": _base("ebml", Ebml(), container="webm", codec="libvpx"),
    "webm-vp9": _base("ebml", Ebml(), container="webm", codec="libvpx-vp9"),
    "ts": _base("ts", Ts(), container="mpegts"),
    "ts-mpeg2": _base("ts", Ts(), container="mpegts", codec="mpeg2video"),
    "ps": _base("ps", Ps(), container="mpeg", codec="mpeg1video"),
    "vob": _base("ps", Ps(), container="vob", codec="mpeg2video"),
    "avi": _base("avi", Riff(), container="avi", codec="mpeg4"),
    "avi-mjpeg": _base("avi", Riff(), container="avi", codec="mjpeg", pix_fmt="yuvj420p"),
    "flv": _base("flv", Flv(), container="flv", codec="flv"),
    "flv-h264": _base("flv", Flv(), container="flv"),
    "ogg": _base("ogg", Ogg(), container="ogg", codec="libvpx"),
    "asf": _base("asf", Asf(), container="asf", codec="wmv2"),
    "ivf": _base("ivf", Ivf(), container="ivf", codec="libvpx"),
    "gif": _base("gif", Gif(), container="gif", codec="gif", pix_fmt="gray", rate=10),
    "apng": _base("png", Png(), container="apng", codec="apng", pix_fmt="rgb24", rate=10),
}
NAMES = tuple(BASES)
FAMILIES = tuple(dict.fromkeys(base.family for base in BASES.values()))


@cache
def base_data(name: str) -> bytes:
    """The bytes of the base `name`: twelve numbered frames; or a second of sound without a picture."""
    return tone() if name == "mp4-sound" else clip(12, **BASES[name].how)


def base_file(name: str) -> File:
    """The base `name`, as elements of its own."""
    return File.parse(BASES[name].grammar, base_data(name))
