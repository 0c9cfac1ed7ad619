"""How a picture is to be turned and mirrored to stand as its camera saw it: pure functions, numpy alone.

A phone stores pictures as its sensor reads them and adds a display matrix. mp4 and mov state one in each
track's header, h264 and hevc in a message of their own; libav hands both out in one form, with the frame
(libavutil/display.h): nine int32 in the machine's byte order, ``(a, b, u, c, d, v, x, y, w)``. A stored pixel
p columns to the right and q rows down belongs at ``(a * p + c * q, b * p + d * q)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_TOLERANCE = math.sin(math.radians(1))
"""An axis less than one degree off counts as straight: ffmpeg's tools draw the line there too."""


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture on a grid of pixels: transposed first, then mirrored."""

    transposed: bool
    """Rows become columns."""
    left_right: bool
    """Mirrored: what is left goes to the right."""
    top_bottom: bool
    """Mirrored: what is at the top goes to the bottom."""

    def apply(self, picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The picture ``[H, W, C]`` as it is to be shown: a view, ``[W, H, C]`` if `transposed`."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        if self.left_right:
            picture = picture[:, ::-1]
        return picture[::-1] if self.top_bottom else picture

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after `apply`, of a picture of this width and height; and the other way round."""
        return (height, width) if self.transposed else (width, height)


AS_STORED = Orientation(transposed=False, left_right=False, top_bottom=False)


def orientation(matrix: bytes | None) -> Orientation:
    """What a display matrix asks for.

    Only the directions of its two axes count. Their lengths do not, as a pixel aspect ratio does not; nor
    does the shift. A matrix that is none of the eight (it turns by another angle, shears, or maps the picture
    to a line or a point) leaves the picture as it is stored: turning it would take made-up pixels in the
    corners.

    Args:
        matrix: 36 bytes as libav has them; None or another length where a frame has none.
    """
    if matrix is None or len(matrix) != 36:
        return AS_STORED
    a, b, _, c, d, *_ = np.frombuffer(matrix, dtype=np.int32).tolist()
    across, down = _straight(a, b), _straight(c, d)  # where the rows and the columns of the picture lead
    if across is None or down is None or across[0] == down[0]:
        return AS_STORED
    if across[0] == 0:
        return Orientation(transposed=False, left_right=across[1], top_bottom=down[1])
    return Orientation(transposed=True, left_right=down[1], top_bottom=across[1])


def _straight(x: int, y: int) -> tuple[int, bool] | None:
    """Along which axis a direction leads (0: sideways, 1: up or down), and if backwards; None if neither."""
    length = math.hypot(x, y)
    if length == 0 or min(abs(x), abs(y)) > _TOLERANCE * length:
        return None
    return (0, x < 0) if abs(x) > abs(y) else (1, y < 0)
