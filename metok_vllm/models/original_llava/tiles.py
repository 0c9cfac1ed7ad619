"""Into how many tiles a picture is cut, and a tile into how many patches."""

from __future__ import annotations

from typing import Any

from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape


def patches_a_side(config: Any) -> int:
    """Of a frame or tile, as the tower sees it."""
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)


def tiles_of(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of `height` x `width` pixels, so that most of it is kept."""
    shape: Any = get_anyres_image_grid_shape
    rows, columns = shape((height, width), config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(columns)
