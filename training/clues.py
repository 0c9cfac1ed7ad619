"""Clues: what training tells the language model besides the answers, read off the scene graph.

An answer teaches one word of a whole video. Three read-outs, thrown away after training, teach more: after a
few layers every visual token must tell what it shows and how that came about, some layers later the last
token of every phrase that stands for something in the video ("the red star") must tell all about that thing,
and later still the last token of every option whether it is the right one. In a sentence that tells of one
thing after another, every token must tell all about the thing that comes next, or that none does. Nothing
here knows of METok, and nothing of it is in the exported model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from training.questions import LETTERS, Question
from training.tower import STRIDES, label_cells
from training.world import COLOURS, DIGITS, PLACES, SCENES, SHAPES, WORDS, Item, Scene, Video, place_of

SEEING, MEANING, CHOOSING = 3, 6, 9
"""Layers after which visual tokens, phrases and options are read out."""
_GROUPS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "colour2": COLOURS,
    "place": PLACES,
    "place2": PLACES,
    "direction": ("left", "right", "up", "down"),
    "digit": DIGITS,
    "word": WORDS,
    "scene": SCENES,
    "before": SCENES,
    "count": ("1", "2", "3", "4"),
    "absent": ("yes",),
    "nth": tuple("123456"),  # thing of its scene
    "scene's nth": tuple("123456"),  # scene of the video
}
_COLUMN = {(g, v): n for n, (g, v) in enumerate((g, v) for g, values in _GROUPS.items() for v in values)}
STATIC = len(_COLUMN)
_NAMES = [n for (group, _), n in _COLUMN.items() if group in ("shape", "digit", "word")]
_LOOK_BACK = [n for (group, _), n in _COLUMN.items() if group in ("colour2", "place2", "direction", "count", "nth")]
_LEAST, _MOST, _STEPS = 4.0, 1100.0, 48
TIMES = torch.tensor(_LEAST * (_MOST / _LEAST) ** (np.arange(_STEPS) / (_STEPS - 1)), dtype=torch.float32)
"""Positions in the prompt that the time columns tell apart: a thermometer on a logarithmic scale."""
WIDTH = STATIC + _STEPS


def _item_columns(video: Video, item: Item, frame: int | None) -> list[int]:
    """What is known of ``item`` on ``frame``; all of it where ``frame`` is None."""
    neighbours = [other for other in video.items if other.scene == item.scene]
    known = {"scene": video.scene_of(item), "scene's nth": str(1 + item.scene), "nth": str(1 + neighbours.index(item))}
    if item.kind != "shape":
        known[item.kind] = item.name
        return [_COLUMN[pair] for pair in known.items()]
    assert item.colour is not None
    same = video.shapes(item.name)
    known |= {"shape": item.name, "colour": item.colour, "place": item.place}
    known["count"] = str(len(same) if frame is None else 1 + same.index(item))
    if item.colour2 is not None and (frame is None or item.colour_at(frame) == item.colour2):
        known["colour2"] = item.colour2
    if item.xy2 is not None and item.direction is not None:
        (x, y), (x1, y1) = item.xy, item.xy2 if frame is None else item.centre(frame)
        if frame is None or abs(x1 - x) + abs(y1 - y) > 10:
            known |= {"direction": item.direction, "place2": place_of((x1, y1))}
    return [_COLUMN[pair] for pair in known.items()]


def seen(video: Video) -> Tensor:
    """What the 21 pooled rows of every frame show, the past included: uint8 ``[T * 21, STATIC]``."""
    out = []
    kinds = [s.kind for s in video.scenes]
    for number, scene in enumerate(video.scenes):
        for frame in range(scene.start, scene.end):
            tables = label_cells(video, frame, lambda item, at: _item_columns(video, item, at), STATIC)
            rows = np.concatenate([tables[s] for s in STRIDES])
            rows[:, [_COLUMN["scene", scene.kind], _COLUMN["scene's nth", str(1 + number)]]] = 1
            if number:
                rows[:, _COLUMN["before", kinds[number - 1]]] = 1
            out.append(rows)
    return torch.from_numpy(np.concatenate(out)).to(torch.uint8)


def when(positions: Tensor) -> Tensor:
    """Time columns of positions in the prompt: ``[...]`` to uint8 ``[..., 48]``."""
    return (positions[..., None] >= TIMES).to(torch.uint8)


def meant(video: Video, things: tuple[Item | Scene, ...], starts: list[int]) -> Tensor:
    """What a phrase for ``things`` stands for: uint8 ``[WIDTH]``;
    ``starts`` are the positions at which frames begin.
    """
    out = torch.zeros(WIDTH, dtype=torch.uint8)
    if not things:
        out[_COLUMN["absent", "yes"]] = 1
        return out
    for thing in things:
        if isinstance(thing, Scene):
            out[[_COLUMN["scene", thing.kind], _COLUMN["scene's nth", str(1 + video.scenes.index(thing))]]] = 1
        else:
            out[_item_columns(video, thing, None)] = 1
    out[STATIC:] = when(torch.tensor(starts[min(t.start for t in things)]))
    return out


def phrases(question: Question) -> list[tuple[int, tuple[Item | Scene, ...]]]:
    """(end in ``question.text``, things) of every phrase that stands for something."""
    out = []
    for phrase, things in question.things:
        found = re.search(rf"\b{re.escape(phrase)}\b", question.text)
        assert found, (phrase, question.text)
        out.append((found.end(), things))
    return out


def sequel(question: Question) -> list[tuple[int, int, tuple[Item | Scene, ...]]]:
    """What comes next while the answer tells of one thing after another: (first, last, things).

    ``first`` and ``last`` are ends of words in ``question.answer``; each token from ``first`` to before
    ``last`` is about ``things``. The word that ends the last phrase is about nothing more.
    """
    out, now = [], None
    for phrase, things in question.told:
        begin = question.answer.index(phrase, now or 0)
        first, now = now or begin - 1, begin + len(phrase)
        out.append((first, now, things))
    return [*out, (now, now + 1, ())] if now else out


def options(question: Question) -> list[tuple[int, bool]]:
    """(end in ``question.prompt``, whether it is right) of every option."""
    out, end = [], len(question.text)
    for letter, option in zip(LETTERS, question.options, strict=False):
        end += len(f"\n{letter}. {option}")
        out.append((end, letter == question.answer))
    return out


@dataclass
class Clues:
    """The labels of a batch of B videos with P prefix tokens and N questions of L tokens.

    Attributes:
        rows: bool ``[B, P]``: visual tokens.
        seen: uint8 ``[M, WIDTH]``: their labels, in order.
        phrases: int64 ``[K]``: the tokens that end a phrase, and those that tell of a thing, in the flat ``[B
            * N * L]``.
        meant: uint8 ``[K, WIDTH]``: their labels.
        options: int64 ``[O]``: the tokens that end an option, in the flat ``[B * N * L]``.
        right: uint8 ``[O, 1]``: their labels.
    """

    rows: Tensor
    seen: Tensor
    phrases: Tensor
    meant: Tensor
    options: Tensor
    right: Tensor


class ReadOuts(nn.Module):
    """The three read-outs, one linear layer each."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.seen, self.meant = nn.Linear(hidden, WIDTH), nn.Linear(hidden, WIDTH)
        self.right = nn.Linear(hidden, 1)
        for layer in (self.seen, self.meant, self.right):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.constant_(layer.bias, -3.0)

    def loss(self, clues: Clues, states: Mapping[int, Tensor], prefix: int) -> list[Tensor]:
        """Mean over tokens of each read-out's losses, summed over its columns.

        ``states`` are ``[B, P + N * L, H]`` after the three layers, ``prefix`` is P. Visual tokens that show
        something weigh as much together as all others do, and what needs a look back weighs more: both are
        rare, and would not be learnt.
        """
        scale = torch.ones(WIDTH, device=clues.rows.device)
        scale[STATIC:] = 0.25  # neighbouring times say nearly the same
        scale[_LOOK_BACK] = 4.0

        def bce(layer: nn.Linear, tokens: Tensor, want: Tensor, scale: Tensor | float) -> Tensor:
            logits = layer(_unit(tokens)).float()
            each = nn.functional.binary_cross_entropy_with_logits(logits, want.float(), reduction="none")
            return (each * scale).sum(-1)

        def mean(each: Tensor) -> Tensor:
            return each.sum() / max(1, len(each))

        busy = clues.seen[:, _NAMES].bool().any(-1)
        asked = {layer: x[:, prefix:].flatten(0, 1) for layer, x in states.items()}
        seen = bce(self.seen, states[SEEING][:, :prefix][clues.rows], clues.seen, scale)
        return [
            mean(seen[busy]) + mean(seen[~busy]),
            mean(bce(self.meant, asked[MEANING][clues.phrases], clues.meant, scale)),
            mean(bce(self.right, asked[CHOOSING][clues.options], clues.right, 4.0)),
        ]


def _unit(x: Tensor) -> Tensor:
    return x / x.float().square().mean(-1, keepdim=True).add(1e-6).sqrt().to(x.dtype)
