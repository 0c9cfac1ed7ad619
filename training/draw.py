"""Pixels of a scene graph: ``uint8 [T, 64, 64, 3]``, drawn with numpy only."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from training.world import SIZE, Item, Scene, Video

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

RGB = {
    "red": (220, 30, 30),
    "green": (40, 190, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 225, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "purple": (160, 40, 190),
    "orange": (245, 140, 20),
}
# 5 x 7 glyphs, one string per row
_GLYPHS = {
    "0": ".###. #...# #..## #.#.# ##..# #...# .###.", "1": "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    "2": ".###. #...# ....# ..##. .#... #.... #####", "3": "####. ....# ....# .###. ....# ....# ####.",
    "4": "#...# #...# #...# ##### ....# ....# ....#", "5": "##### #.... ####. ....# ....# #...# .###.",
    "6": ".###. #.... #.... ####. #...# #...# .###.", "7": "##### ....# ...#. ..#.. ..#.. .#... .#...",
    "8": ".###. #...# #...# .###. #...# #...# .###.", "9": ".###. #...# #...# .#### ....# ....# .###.",
    "A": ".###. #...# #...# ##### #...# #...# #...#", "B": "####. #...# #...# ####. #...# #...# ####.",
    "C": ".#### #.... #.... #.... #.... #.... .####", "D": "####. #...# #...# #...# #...# #...# ####.",
    "E": "##### #.... #.... ####. #.... #.... #####", "F": "##### #.... #.... ####. #.... #.... #....",
    "G": ".#### #.... #.... #..## #...# #...# .####", "H": "#...# #...# #...# ##### #...# #...# #...#",
    "I": "##### ..#.. ..#.. ..#.. ..#.. ..#.. #####", "J": "....# ....# ....# ....# ....# #...# .###.",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#", "L": "#.... #.... #.... #.... #.... #.... #####",
    "M": "#...# ##.## #.#.# #.#.# #...# #...# #...#", "N": "#...# ##..# ##..# #.#.# #..## #..## #...#",
    "O": ".###. #...# #...# #...# #...# #...# .###.", "P": "####. #...# #...# ####. #.... #.... #....",
    "R": "####. #...# #...# ####. #.#.. #..#. #...#", "S": ".#### #.... #.... .###. ....# ....# ####.",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..", "U": "#...# #...# #...# #...# #...# #...# .###.",
    "W": "#...# #...# #...# #.#.# #.#.# ##.## #...#", "X": "#...# #...# .#.#. ..#.. .#.#. #...# #...#",
    "Y": "#...# #...# .#.#. ..#.. ..#.. ..#.. ..#..", "Z": "##### ....# ...#. ..#.. .#... #.... #####",
}  # fmt: skip
_ROWS, _COLS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


@lru_cache(maxsize=64)
def _text(text: str) -> Mask:
    """Glyphs at twice their size, one pixel between letters: bool ``[14, w]``."""
    letters = []
    for char in text.upper():
        glyph = np.array([[c == "#" for c in row] for row in _GLYPHS[char].split()])
        letters += [np.kron(glyph, np.ones((2, 2), bool)), np.zeros((14, 1), bool)]
    return np.concatenate(letters[:-1], axis=1)


def _shape_mask(name: str, x: float, y: float, r: float) -> Mask:
    """Pixels of a shape with centre (x, y) and half width r: bool ``[64, 64]``."""
    u, v = (_COLS - x) / r, (_ROWS - y) / r
    au, av, rr = np.abs(u), np.abs(v), u * u + v * v
    if name == "circle":
        return rr <= 1
    if name == "square":
        return np.maximum(au, av) <= 0.88
    if name == "triangle":
        return (v <= 0.85) & (au <= (v + 1) * 0.55)
    if name == "star":
        angle = np.arctan2(u, -v)
        return np.sqrt(rr) <= 0.72 + 0.38 * np.cos(5 * angle)
    if name == "cross":
        return ((au <= 0.3) & (av <= 1)) | ((av <= 0.3) & (au <= 1))
    if name == "ring":
        return (rr <= 1.05) & (rr >= 0.36)
    if name == "diamond":
        return au * 1.35 + av <= 1.08
    if name == "heart":
        w = -(v - 0.1) * 1.15
        return (u * u * 1.3 + w * w - 0.55) ** 3 <= 1.6 * u * u * w**3
    raise ValueError(f"unknown shape {name!r}")


def _grow(mask: Mask) -> Mask:
    """The mask and its four-neighbours."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def item_mask(item: Item, frame: int) -> Mask:
    """Pixels the item covers on ``frame`` (its sign for digits and words): bool ``[64, 64]``."""
    x, y = item.centre(frame)
    if item.kind == "shape":
        return _shape_mask(item.name, x, y, item.size)
    h, w = _text(item.name).shape
    top, left = round(y - h / 2), round(x - w / 2)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[max(0, top - 2) : top + h + 2, max(0, left - 2) : left + w + 2] = True
    return mask


def _paint(canvas: Pixels, item: Item, frame: int) -> None:
    mask = item_mask(item, frame)
    if item.kind == "shape":
        colour = item.colour_at(frame)
        assert colour is not None
        canvas[_grow(mask)] = (235, 235, 235) if colour == "black" else (10, 10, 10)
        canvas[mask] = RGB[colour]
        return
    text = _text(item.name)
    x, y = item.centre(frame)
    top, left = round(y - text.shape[0] / 2), round(x - text.shape[1] / 2)
    canvas[mask] = (25, 25, 35) if item.kind == "digit" else (240, 235, 215)
    ink = (250, 250, 120) if item.kind == "digit" else (30, 20, 20)
    canvas[top : top + text.shape[0], left : left + text.shape[1]][text] = ink


def background(scene: Scene) -> Pixels:
    """Background of a scene, with details drawn from ``scene.look``: ``uint8 [64, 64, 3]``."""
    rng = np.random.default_rng(scene.look)
    horizon = rng.uniform(22, 40)
    sky, ground = horizon > _ROWS, horizon <= _ROWS
    image = np.zeros((SIZE, SIZE, 3), np.float32)

    def fill(where: Mask, rgb: tuple[float, float, float]) -> None:
        image[where] = np.asarray(rgb) + rng.uniform(-12, 12, 3)

    phase = rng.uniform(0, 6)
    if scene.kind == "beach":
        fill(sky, (140, 200, 240))
        fill(ground, (225, 200, 140))
        fill((horizon - 6 <= _ROWS) & sky, (60, 140, 190))
    elif scene.kind == "forest":
        fill(sky, (90, 130, 90))
        fill(ground, (50, 90, 45))
        fill((np.sin(_COLS * rng.uniform(0.5, 0.7) + phase) > 0.55) & (_ROWS > 10), (80, 60, 40))
    elif scene.kind == "city":
        fill(sky, (170, 175, 190))
        fill(ground, (95, 95, 100))
        for left in range(0, SIZE, 11):
            fill((left <= _COLS) & (left + 8 > _COLS) & (rng.uniform(5, 30) < _ROWS) & sky, (120, 115, 125))
    elif scene.kind == "desert":
        fill(sky, (235, 190, 130))
        fill(ground, (200, 130, 70))
        fill(50 + 5 * np.sin(_COLS * 0.15 + phase) < _ROWS, (180, 110, 60))
    elif scene.kind == "snow":
        fill(sky, (190, 200, 215))
        fill(ground, (228, 232, 240))
        image[rng.random((SIZE, SIZE)) < 0.04] = 255
    elif scene.kind == "night":
        fill(sky, (25, 25, 60))
        fill(ground, (30, 40, 45))
        image[(rng.random((SIZE, SIZE)) < 0.03) & sky] = 230
    elif scene.kind == "sea":
        fill(sky, (120, 180, 220))
        fill(ground, (30, 90, 140))
        fill((np.sin(_COLS * 0.5 + _ROWS * 0.9 + phase) > 0.7) & ground, (80, 150, 190))
    elif scene.kind == "cave":
        fill(sky, (70, 60, 70))
        fill(ground, (95, 80, 75))
        fill(rng.uniform(0.95, 1.2) < ((_COLS - 32) / 34) ** 2 + ((_ROWS - 34) / 28) ** 2, (35, 28, 35))
    else:
        raise ValueError(f"unknown scene {scene.kind!r}")
    image += rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_frame(video: Video, frame: int, base: Pixels) -> Pixels:
    """One frame on a copy of its background ``base``."""
    canvas = base.copy()
    for item in video.visible(frame):
        _paint(canvas, item, frame)
    return canvas


def draw_video(video: Video) -> Pixels:
    """All frames: ``uint8 [T, 64, 64, 3]``, RGB."""
    out = np.empty((video.frames, SIZE, SIZE, 3), np.uint8)
    for scene in video.scenes:
        base = background(scene)
        for frame in range(scene.start, scene.end):
            out[frame] = draw_frame(video, frame, base)
    return out
