"""Questions about a scene graph, with answers that follow from it.

Every asker yields all questions of its kind that have one right answer in the video; :func:`questions` draws
from them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

from training.world import COLOURS, DIGITS, PLACES, SCENES, SHAPES, WORDS, Item, Scene, Video, place_of

LETTERS = "ABCD"
MOST_TOLD, MOST_LISTED = 2, 4  # things of a scene, and scenes, that a sentence tells of
Things = tuple[tuple[str, tuple["Item | Scene", ...]], ...]


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        kind: what it tests, a key of :data:`ASKERS` or ``letter``.
        text: the question without options.
        answer: the exact expected answer (a letter where there are options).
        options: the options in order, empty where the answer is free.
        about: frames ``(start, end)`` that must have been seen to answer.
        of: for ``letter``, the kind of the question underneath, else ``kind``.
        things: phrases of ``text`` and what they stand for (nothing, where it is not in the video); only
            training's clues use them (:mod:`training.clues`).
        plain: for ``letter`` and ``option``, the answer without options, else empty.
        told: phrases of ``answer`` in order and what they stand for, where it tells of one thing after
            another; for the clues again.
    """

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    about: tuple[tuple[int, int], ...] = ()
    of: str = field(default="")
    things: Things = ()
    plain: str = ""
    told: Things = ()

    @property
    def prompt(self) -> str:
        """What the user sends beside the video."""
        return format_prompt(self.text, self.options)


def form(q: Question) -> str:
    """What a letter stands for, or what a sentence tells of; for other kinds the kind."""
    if q.kind != "open":
        return q.of or q.kind
    if not q.told:
        return "one thing"
    return f"{len(q.told)} scenes" if isinstance(q.told[0][1][0], Scene) else f"scene of {len(q.told)}"


def format_prompt(text: str, options: tuple[str, ...] | list[str]) -> str:
    """Question and options as the model was trained to read them: one option a line, ``A. red``."""
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    return f"{text}{lines}" + ("\nAnswer with the letter." if options else "")


Asked = Iterator[Question]


def _span(*items: Item) -> tuple[tuple[int, int], ...]:
    return tuple((i.start, i.end) for i in items)


def _about_one(kind: str, text: str, answer: str, phrase: str, item: Item) -> Question:
    """A question about the one item that ``phrase`` picks out."""
    return Question(kind, text, answer, about=_span(item), things=((phrase, (item,)),))


def _single(video: Video) -> list[Item]:
    """Shapes whose name appears once, so that "the star" is one thing."""
    shapes = video.shapes()
    return [i for i in shapes if sum(j.name == i.name for j in shapes) == 1]


def _named(video: Video) -> list[tuple[str, Item]]:
    """(phrase, item) for every shape a phrase picks out: "star", or "red star" if there are several."""
    out = [(i.name, i) for i in _single(video)]
    for i in video.shapes():
        same = [j for j in video.shapes(i.name) if i.colour in (j.colour, j.colour2)]
        if len(same) == 1 and i.colour2 is None and len(video.shapes(i.name)) > 1:
            out.append((f"{i.colour} {i.name}", i))
    return out


def _phrase(item: Item) -> str:
    """How answers call an item: "a red star", "the digit 7", "the word cat"."""
    return a(f"{item.colour} {item.name}") if item.kind == "shape" else f"the {item.kind} {item.name}"


def a(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def ask_what(v: Video) -> Asked:
    """Which shape had this colour; which shape was in this scene."""
    for colour in COLOURS:
        hits = [i for i in v.shapes() if colour in (i.colour, i.colour2)]
        if len(hits) == 1 and hits[0].static:
            text = f"Which shape was {colour}?"
            yield Question("what", text, hits[0].name, about=_span(*hits), things=((colour, (*hits,)),))
    for number, scene in enumerate(v.scenes):
        hits = [i for i in v.shapes() if i.scene == number]
        if len(hits) == 1:
            text = f"Which shape appeared in the {scene.kind}?"
            yield Question("what", text, hits[0].name, about=_span(*hits), things=((scene.kind, (*hits,)),))


def ask_colour(v: Video) -> Asked:
    """Colour of a shape that did not change it."""
    for i in _single(v):
        if i.colour2 is None and i.colour is not None:
            yield _about_one("colour", f"What colour was the {i.name}?", i.colour, i.name, i)


def ask_where(v: Video) -> Asked:
    """Quadrant of a shape that did not move."""
    for phrase, i in _named(v):
        if i.xy2 is None:
            yield _about_one("where", f"Where was the {phrase}?", i.place, phrase, i)


def ask_count(v: Video) -> Asked:
    """Appearances of a shape."""
    for name in SHAPES:
        hits = v.shapes(name)
        if hits:
            text = f"How many times did a {name} appear?"
            yield Question("count", text, str(len(hits)), about=_span(*hits), things=((name, (*hits,)),))


def ask_order(v: Video) -> Asked:
    """Which of two things came first or last."""
    things = [(f"{p}", i) for p, i in _named(v)]
    things += [(f"{i.kind} {i.name}", i) for i in v.items if i.kind != "shape"]
    for pa, a in things:
        for pb, b in things:
            if abs(a.start - b.start) >= 2 and a is not b:
                early, late = (pa, pb) if a.start < b.start else (pb, pa)
                both, named = _span(a, b), ((pa, (a,)), (pb, (b,)))
                yield Question("order", f"Which came first, the {pa} or the {pb}?", early, about=both, things=named)
                yield Question("order", f"Which came last, the {pa} or the {pb}?", late, about=both, things=named)


def ask_scene(v: Video) -> Asked:
    """Scene of a shape, a word or a digit."""
    things = _named(v) + [(f"{i.kind} {i.name}", i) for i in v.items if i.kind != "shape"]
    for phrase, i in things:
        yield _about_one("scene", f"In which scene was the {phrase}?", v.scene_of(i), phrase, i)


def ask_exists(v: Video) -> Asked:
    """Did it happen; the drawer balances yes and no."""
    whole = ((0, v.frames),)
    shown = {(i.colour, i.name) for i in v.shapes()} | {(i.colour2, i.name) for i in v.shapes()}
    names, signs = {i.name for i in v.shapes()}, {i.name for i in v.items}
    rng = random.Random(v.seed)
    for i in v.shapes():
        if i.static:
            phrase, same = f"{i.colour} {i.name}", (*v.shapes(i.name),)
            yield Question("exists", f"Did {a(phrase)} appear?", "yes", about=_span(i), things=((phrase, same),))
            wrong = [(c, i.name) for c in COLOURS if (c, i.name) not in shown]
            wrong += [(i.colour or "", s) for s in SHAPES if (i.colour, s) not in shown and s in names]
            colour, name = rng.choice(wrong)
            phrase, same = f"{colour} {name}", (*v.shapes(name),)
            yield Question("exists", f"Did {a(phrase)} appear?", "no", about=whole, things=((phrase, same),))
    for kind, values in (("digit", DIGITS), ("word", WORDS)):
        for i in v.items:
            if i.kind == kind:
                yield _about_one("exists", f"Was the {kind} {i.name} shown?", "yes", f"{kind} {i.name}", i)
                other = rng.choice([x for x in values if x not in signs])
                things: Things = ((f"{kind} {other}", ()),)
                yield Question("exists", f"Was the {kind} {other} shown?", "no", about=whole, things=things)


def _ask_sign(kind: str) -> Callable[[Video], Asked]:
    def ask(v: Video) -> Asked:
        hits = [i for i in v.items if i.kind == kind]
        if len(hits) == 1:
            yield _about_one(kind, f"What was the {kind}?", hits[0].name, kind, hits[0])
        for i in hits:
            text = f"What {kind} was shown in the {v.scene_of(i)}?"
            yield _about_one(kind, text, i.name, v.scene_of(i), i)

    ask.__doc__ = f"Which {kind} was shown."
    return ask


def ask_move(v: Video) -> Asked:
    """Direction of a moving shape."""
    for i in _single(v):
        if i.direction is not None:
            yield _about_one("move", f"Which way did the {i.name} move?", i.direction, i.name, i)


def ask_change(v: Video) -> Asked:
    """Second colour of a changing shape."""
    for i in _single(v):
        if i.colour2 is not None:
            yield _about_one("change", f"What colour did the {i.name} turn into?", i.colour2, i.name, i)


def ask_open(v: Video) -> Asked:
    """Sentences of eight words or more."""
    for i in _single(v):
        scene = v.scene_of(i)
        if i.xy2 is not None:
            end = f"moved {i.direction} from the {i.place}"
            answer = f"In the {scene} {a(f'{i.colour} {i.name}')} {end}."
        elif i.colour2 is not None:
            answer = f"In the {scene} a {i.name} at the {i.place} turned from {i.colour} to {i.colour2}."
        else:
            answer = f"In the {scene} {a(f'{i.colour} {i.name}')} appeared at the {i.place}."
        yield _about_one("open", f"Describe the {i.name} in a sentence.", answer, i.name, i)
    for number, scene in enumerate(v.scenes):
        hits = [i for i in v.items if i.scene == number]
        if 0 < len(hits) <= MOST_TOLD and all(b.start - a.start >= 2 for a, b in pairwise(hits)):
            told = tuple((_phrase(i), (i,)) for i in hits)
            answer = f"In the {scene.kind} one could see {' and then '.join(phrase for phrase, _ in told)}."
            text, shown = f"Describe the {scene.kind} in a sentence.", ((scene.kind, (*hits,)),)
            yield Question("open", text, answer, about=_span(*hits), things=shown, told=told)
    if 3 <= len(v.scenes) <= MOST_LISTED:
        names = ", then the ".join(s.kind for s in v.scenes)
        whole, told = ((0, v.frames),), tuple((s.kind, (s,)) for s in v.scenes)
        yield Question("open", "List the scenes in order.", f"The video showed the {names}.", about=whole, told=told)


ASKERS: dict[str, Callable[[Video], Asked]] = {
    "what": ask_what,
    "colour": ask_colour,
    "where": ask_where,
    "count": ask_count,
    "order": ask_order,
    "scene": ask_scene,
    "exists": ask_exists,
    "word": _ask_sign("word"),
    "digit": _ask_sign("digit"),
    "move": ask_move,
    "change": ask_change,
    "open": ask_open,
}
KINDS = (*ASKERS, "letter")


def ask_from(v: Video) -> Asked:
    """Where a moving shape began."""
    for i in _single(v):
        if i.direction is not None:
            yield _about_one("from", f"Where did the {i.name} move from?", i.place, i.name, i)


def ask_to(v: Video) -> Asked:
    """Where a moving shape ended."""
    for i in _single(v):
        if i.xy2 is not None:
            yield _about_one("to", f"Where did the {i.name} move to?", place_of(i.xy2), i.name, i)


def ask_scenes(v: Video) -> Asked:
    """Which of two scenes came first or last."""
    for early, late in combinations(v.scenes, 2):
        for a, b in ((early, late), (late, early)):
            names = f"the {a.kind} or the {b.kind}"
            about = ((early.start, early.end), (late.start, late.end))
            things = ((a.kind, (a,)), (b.kind, (b,)))
            yield Question("scenes", f"Which came first, {names}?", early.kind, about=about, things=things)
            yield Question("scenes", f"Which came last, {names}?", late.kind, about=about, things=things)


LESSONS: dict[str, Callable[[Video], Asked]] = {"from": ask_from, "to": ask_to, "scenes": ask_scenes}
"""Questions that only training asks: steps on the way to ``move`` and ``order``.

``option`` is one on the way to ``letter``.
"""
_POOLS: dict[str, tuple[str, ...]] = {
    "what": SHAPES,
    "colour": COLOURS,
    "where": PLACES,
    "count": ("1", "2", "3", "4"),
    "scene": SCENES,
    "word": WORDS,
    "digit": DIGITS,
    "move": ("left", "right", "up", "down"),
    "change": COLOURS,
}


def with_options(q: Question, v: Video, rng: random.Random) -> Question:
    """The same question with four options and a letter for an answer.

    Half of the wrong options, where there are any, come from the video itself.
    """
    pool = [x for x in _POOLS[q.kind] if x != q.answer]
    seen = {i.name for i in v.items} | {s.kind for s in v.scenes} | {i.colour for i in v.items}
    near = [x for x in pool if x in seen]
    wrong = rng.sample(near, min(len(near), 2))
    wrong += rng.sample([x for x in pool if x not in wrong], 3 - len(wrong))
    options = [q.answer, *wrong]
    rng.shuffle(options)
    letter = LETTERS[options.index(q.answer)]
    return replace(q, kind="letter", of=q.kind, answer=letter, options=tuple(options), plain=q.answer)


def name_an_option(v: Video, rng: random.Random) -> Question:
    """Which letter stands before a word that the question names: nothing to see, only to find."""
    kind = rng.choice(list(_POOLS))
    answer = rng.choice(_POOLS[kind])
    asked = with_options(Question(kind, f"Which letter is the {answer}?", answer), v, rng)
    return replace(asked, kind="option", of="option")


def all_questions(v: Video, lessons: bool = False) -> dict[str, list[Question]]:
    """Every question of every kind but ``letter`` and ``option``;
    training's own kinds where ``lessons`` are wanted.
    """
    askers = ASKERS | LESSONS if lessons else ASKERS
    return {kind: [replace(q, of=kind) for q in ask(v)] for kind, ask in askers.items()}


def draw(
    v: Video,
    kind: str,
    rng: random.Random,
    stock: dict[str, list[Question]] | None = None,
    lettered: Collection[str] = (),
) -> Question | None:
    """One question of ``kind``, or None if the video has none; yes and no are equally likely.

    ``lettered`` are the kinds that a question with options may be of, where the video has any of them; all by
    default.
    """
    stock = all_questions(v) if stock is None else stock
    if kind == "option":
        return name_an_option(v, rng)
    if kind == "letter":
        kinds = [k for k in _POOLS if stock[k]]
        kinds = [k for k in kinds if k in lettered] or kinds
        base = draw(v, rng.choice(kinds), rng, stock) if kinds else None
        return with_options(base, v, rng) if base else None
    choices = stock[kind]
    if kind == "exists":
        verdict = rng.choice(("yes", "no"))
        choices = [q for q in choices if q.answer == verdict]
    elif kind in ("count", "open") and choices:  # by answer or form first: single appearances are far more frequent
        group = rng.choice(sorted({_group(q) for q in choices}))
        choices = [q for q in choices if _group(q) == group]
        if kind == "count" and group == "1" and rng.random() < 0.6:
            return None
    return rng.choice(choices) if choices else None


def _group(q: Question) -> str:
    return q.answer if q.kind == "count" else q.text.split()[0] + q.answer.split()[-4]


def questions(v: Video, count: int, rng: random.Random, kinds: tuple[str, ...] = KINDS) -> list[Question]:
    """Up to ``count`` different questions, their kinds drawn evenly from those the video can serve."""
    stock, out = all_questions(v), {}
    for _ in range(count * 4):
        q = draw(v, rng.choice(kinds), rng, stock)
        if q is not None:
            out.setdefault((q.text, q.kind), q)
        if len(out) == count:
            break
    return list(out.values())
