"""The generated world: scenes, and the things that appear in them for a few frames.

A video is a scene graph first (:class:`Video`) and pixels second (:mod:`training.draw`); questions are
answered from the graph (:mod:`training.questions`), so every answer can be checked without a model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
DIGITS = tuple("0123456789")
WORDS = (
    "cat", "dog", "sun", "map", "key", "box", "cup", "hat",
    "bus", "pen", "egg", "fox", "jam", "net", "owl", "zip",
)  # fmt: skip
SCENES = ("beach", "forest", "city", "desert", "snow", "night", "sea", "cave")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZE = 64  # pixels, both sides
MIN_FRAMES, MAX_FRAMES = 16, 64
LIVELY = 0.66
_DIRECTIONS = {("left", "right"): "right", ("right", "left"): "left", ("top", "bottom"): "down"}
_DIRECTIONS[("bottom", "top")] = "up"


@dataclass(frozen=True)
class Scene:
    """One background; frames ``start .. end - 1``. ``look`` seeds its random details."""

    kind: str
    start: int
    end: int
    look: int


@dataclass(frozen=True)
class Item:
    """One appearance, visible on frames ``start .. end - 1`` of scene number ``scene``.

    ``kind`` is ``shape``, ``digit`` or ``word`` and ``name`` its value. A shape has a ``colour`` and may
    either turn into ``colour2`` halfway or move from ``xy`` to ``xy2``; the others are ``None``. ``xy`` and
    ``xy2`` are the centre in pixels, (column, row), multiples of 8 that ``jitter`` shifts by a pixel at most:
    a tower of 8 x 8 patches learns shapes many times faster when they are not at every offset.
    """

    kind: str
    name: str
    scene: int
    start: int
    end: int
    xy: tuple[float, float]
    xy2: tuple[float, float] | None = None
    colour: str | None = None
    colour2: str | None = None
    size: float = 8.0  # half the width of a shape, pixels
    jitter: tuple[float, float] = (0.0, 0.0)

    def centre(self, frame: int) -> tuple[float, float]:
        """Centre in pixels on ``frame``."""
        (x, y), (x2, y2) = self.xy, self.xy2 or self.xy
        t = (frame - self.start) / max(1, self.end - 1 - self.start)
        x, y = (8 * round((a + t * (b - a)) / 8) for a, b in ((x, x2), (y, y2)))
        return (x + self.jitter[0], y + self.jitter[1])

    def colour_at(self, frame: int) -> str | None:
        """Colour on ``frame`` (None for digits and words)."""
        if self.colour2 is not None and frame >= (self.start + self.end) // 2:
            return self.colour2
        return self.colour

    @property
    def static(self) -> bool:
        """True if it neither moves nor changes colour."""
        return self.xy2 is None and self.colour2 is None

    @property
    def place(self) -> str:
        """Quadrant of the first frame."""
        return place_of(self.xy)

    @property
    def direction(self) -> str | None:
        """``left``, ``right``, ``up`` or ``down`` for a moving shape."""
        if self.xy2 is None:
            return None
        (v1, h1), (v2, h2) = place_of(self.xy).split(), place_of(self.xy2).split()
        return _DIRECTIONS[(h1, h2) if h1 != h2 else (v1, v2)]


@dataclass(frozen=True)
class Video:
    """A whole scene graph; ``counted`` is the one shape that may appear more than once."""

    seed: int
    frames: int
    scenes: tuple[Scene, ...]
    items: tuple[Item, ...]  # by start frame
    counted: str

    def visible(self, frame: int) -> list[Item]:
        """Items on screen on ``frame``."""
        return [item for item in self.items if item.start <= frame < item.end]

    def scene_of(self, item: Item) -> str:
        """Kind of the scene the item appears in."""
        return self.scenes[item.scene].kind

    def shapes(self, name: str | None = None) -> list[Item]:
        """All shapes, or all called ``name``."""
        return [i for i in self.items if i.kind == "shape" and name in (None, i.name)]


def place_of(xy: tuple[float, float]) -> str:
    """Quadrant name of a centre in pixels."""
    vertical = "top" if xy[1] < SIZE / 2 else "bottom"
    return f"{vertical} {'left' if xy[0] < SIZE / 2 else 'right'}"


def _point(rng: random.Random, place: str) -> tuple[float, float]:
    vertical, horizontal = place.split()
    x, y = rng.choice((8, 16, 24)), rng.choice((8, 16, 24))
    return (x if horizontal == "left" else SIZE - x, y if vertical == "top" else SIZE - y)


def _cut(rng: random.Random, frames: int, pieces: int, least: int) -> list[int]:
    """Random lengths, each at least ``least``, that add up to ``frames``."""
    spare = frames - pieces * least
    cuts = sorted(rng.randint(0, spare) for _ in range(pieces - 1))
    return [least + b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]


def make_video(
    seed: int, frames: tuple[int, int] = (MIN_FRAMES, MAX_FRAMES), max_scenes: int = 6, lively: float = LIVELY
) -> Video:
    """The video that ``seed`` names; same arguments, same video.

    Args:
        seed: see :mod:`training.seeds`.
        frames: least and greatest number of frames. Training's curriculum starts below 16; validation and
            test always use the default.
        max_scenes: most scenes (2 at least are made, 1 where ``max_scenes`` is 1 or the video is too short).
        lively: share of the shapes, of those that can, that move or change colour; validation and test always
            use the default.
    """
    rng = random.Random(seed)
    total = rng.randint(*frames)
    most = max(1, min(max_scenes, total // 5))
    count = rng.randint(min(2, most), most)
    kinds = rng.sample(SCENES, count)
    scenes, start = [], 0
    for kind, length in zip(kinds, _cut(rng, total, count, min(5, total // count)), strict=True):
        scenes.append(Scene(kind, start, start + length, rng.getrandbits(30)))
        start += length
    return Video(seed, total, tuple(scenes), *_populate(rng, scenes, lively))


def _populate(rng: random.Random, scenes: list[Scene], lively: float) -> tuple[tuple[Item, ...], str]:
    """Items of all scenes, and the counted shape.

    Every shape name but the counted one appears once at most; the counted one has a new colour every time.
    Words and digits are distinct in a video, one of each at most in a scene. At most one thing is in a
    quadrant at a time.
    """
    counted, *others = rng.sample(SHAPES, len(SHAPES))
    colours = rng.sample(COLOURS, len(COLOURS))
    repeats = rng.choice((1, 2, 2, 3, 3, 4))
    names = [counted] * repeats + others[: rng.randint(2, 6)]
    rng.shuffle(names)
    digits, words = rng.sample(DIGITS, len(DIGITS)), rng.sample(WORDS, len(WORDS))
    items: list[Item] = []
    for number, scene in enumerate(scenes):
        room = scene.end - scene.start
        wanted = min(1 + room // 4, 4)
        kinds = ["shape"] * rng.randint(1, max(1, wanted))
        kinds += ["digit"] * (rng.random() < 0.4) + ["word"] * (rng.random() < 0.4)
        rng.shuffle(kinds)
        placed: list[Item] = []
        for kind in kinds:
            if kind == "shape" and not names:
                continue
            stock = {"shape": names, "digit": digits, "word": words}[kind]
            item = _place(rng, kind, stock[-1], number, scene, placed, colours, stock[-1] == counted, lively)
            if item is not None:
                stock.pop()
                placed.append(item)
        items += placed
    items.sort(key=lambda i: (i.start, i.name))
    return tuple(items), counted


def _place(
    rng: random.Random,
    kind: str,
    name: str,
    number: int,
    scene: Scene,
    placed: list[Item],
    colours: list[str],
    counted: bool,
    lively: float,
) -> Item | None:
    """One item at a free time and place, or None after a few tries; ``colours`` are the counted shape's."""
    room = scene.end - scene.start
    for _ in range(6):
        length = min(room, rng.randint(2, 6))
        start = scene.start + rng.randint(0, room - length)
        end = start + length
        near = [p for p in placed if p.start < end and start < p.end]
        if any(abs(p.start - start) < 2 for p in placed) or len(near) > 1:
            continue
        if kind == "word":
            xy, xy2 = (rng.choice((24, 32, 40)), rng.choice((16, SIZE - 16))), None
        else:
            first = rng.choice(PLACES)
            xy, xy2 = _point(rng, first), None
        colour = colour2 = None
        if kind == "shape":
            colour = colours[-1] if counted else rng.choice(COLOURS)
            change = rng.random()
            if length >= 4 and not counted and change < lively / 2:
                xy2 = _moved(rng, xy)
            elif length >= 4 and not counted and change < lively:
                colour2 = rng.choice([c for c in COLOURS if c != colour])
        jitter = (rng.uniform(-1, 1), rng.uniform(-1, 1))
        item = Item(kind, name, number, start, end, xy, xy2, colour, colour2, rng.uniform(7.5, 8.5), jitter)
        if any(_close(item, p) for p in near):
            continue
        if kind == "shape" and counted:
            colours.pop()
        return item
    return None


def _moved(rng: random.Random, xy: tuple[float, float]) -> tuple[float, float]:
    """End point of a move: the neighbouring quadrant, sideways or up and down."""
    return (SIZE - xy[0], xy[1]) if rng.random() < 0.5 else (xy[0], SIZE - xy[1])


def _close(a: Item, b: Item) -> bool:
    """True if the two would touch on any common frame."""
    for frame in range(max(a.start, b.start), min(a.end, b.end)):
        (ax, ay), (bx, by) = a.centre(frame), b.centre(frame)
        wide = 29 if "word" in (a.kind, b.kind) else 18
        if abs(ax - bx) < wide and abs(ay - by) < 18:
            return True
    return False
