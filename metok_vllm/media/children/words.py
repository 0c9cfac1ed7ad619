"""What a child says, checked. A file may have taken its child over: then none of it need be true.

What is checked here is that it fits together, so that a lie costs its own request and no other one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from metok_vllm.media.children.messages import Garbled
from metok_vllm.media.settings import VideoSettings

MOST_WORDS = 16
"""Messages of one child. A video takes three, and one more where its frames turn out to have another size."""

_LARGEST = 1 << 53
_LONGEST_SENTENCE = 2000


def number(value: object, most: int = _LARGEST) -> int:
    """A whole number that is not negative."""
    if type(value) is not int or not 0 <= value <= most:
        raise Garbled("no number")
    return value


def reserved(asked: object) -> tuple[int, int]:
    """Bytes of frames, and bytes beside them, that a child asks for."""
    if not isinstance(asked, dict):
        raise Garbled("no sizes")
    return number(asked.get("frames")), number(asked.get("working"))


def room(message: dict[str, Any], settings: VideoSettings) -> tuple[int, int]:
    """Bytes of frames, and how many frames, that a child wants the shared file for."""
    return number(message["frames"]), number(message.get("count"), settings.max_frames)


def sentence(value: object) -> str:
    """What a child says is wrong with its file."""
    if not isinstance(value, str) or len(value) > _LONGEST_SENTENCE or not value.isprintable():
        raise Garbled("no sentence")
    return value


def shape(value: object, size: int, count: int) -> list[int]:
    """[T, H, W, 3] of frames in a file with room for `size` bytes of them and the numbers of `count`."""
    if not isinstance(value, list) or len(value) != 4 or value[3] != 3:
        raise Garbled("no shape")
    sides = [number(side) for side in value]
    if 0 in sides or math.prod(sides) > size or sides[0] > count:
        raise Garbled("a shape that does not fit")
    return sides


def about(value: object) -> dict[str, Any]:
    """The fields of `DecodedVideo` that are numbers."""
    if not isinstance(value, dict):
        raise Garbled("no figures")
    figures: dict[str, Any] = {name: number(value.get(name)) for name in ("total_frames", "missing", "packets_decoded")}
    for name in ("fps", "duration"):
        figure: Any = value.get(name)
        if type(figure) not in (int, float) or not 0 <= figure < math.inf:
            raise Garbled("no figure")
        figures[name] = float(figure)
    return figures


def indices(numbers: npt.NDArray[np.int64], total: int) -> list[int]:
    """[T] numbers of frames of a video of `total`: they rise."""
    if numbers[0] < 0 or numbers[-1] >= total or not (numbers[1:] > numbers[:-1]).all():
        raise Garbled("no frames' numbers")
    listed: list[int] = numbers.tolist()
    return listed
