"""Which frames a text is about, read off text and scene graph alone:
the labels of the paired text/image tower.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from training.world import COLOURS, DIGITS, SCENES, SHAPES, WORDS, Item, Video


@dataclass(frozen=True)
class Focus:
    """One thing a text speaks of; a None attribute is not mentioned."""

    kind: str | None = None  # shape, digit or word
    name: str | None = None
    colour: str | None = None
    scene: str | None = None

    def shown(self, video: Video, frame: int) -> bool:
        """True if ``frame`` shows it."""
        if self.scene is not None:
            scene = next(s for s in video.scenes if s.start <= frame < s.end)
            if scene.kind != self.scene:
                return False
        if self.kind is None:
            return self.scene is not None
        return any(self._is(item, frame) for item in video.visible(frame))

    def _is(self, item: Item, frame: int) -> bool:
        return (
            item.kind == self.kind and self.name in (None, item.name) and self.colour in (None, item.colour_at(frame))
        )


def focus_of(text: str) -> list[Focus]:
    """What the first line of ``text`` speaks of; "the X or the Y" is two things, no known noun is nothing."""
    out = []
    for part in re.split(r" or ", text.split("\n")[0]):
        words = re.findall(r"[a-z]+|\d", part.lower())

        def one(values: tuple[str, ...], among: list[str] = words) -> str | None:
            return next((w for w in among if w in values), None)

        shape, colour, scene = one(SHAPES), one(COLOURS), one(SCENES)
        if shape or "shape" in words:
            out.append(Focus("shape", shape, colour, scene))
        elif "digit" in words:
            out.append(Focus("digit", one(DIGITS), None, scene))
        elif "word" in words:
            out.append(Focus("word", one(WORDS), None, scene))
        elif scene:
            out.append(Focus(scene=scene))
    return out
