"""A case: a base file and the operations on it. Drawn from a seed, built, printed, read, shrunk."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import ebml_parts, generic, mp4_parts, other_parts, pictures, ts_parts  # noqa: F401  (they register operations)
from .bases import BASES, NAMES, base_data, base_file
from .operations import OPERATIONS, fitting

MAX_BYTES = 400_000
"""No case is larger: an operation that would make it so is left out."""
_STEP = re.compile(r"([a-zA-Z0-9_.]+)\(([0-9,\s]*)\)")


@dataclass(frozen=True)
class Step:
    """An operation and its arguments."""

    name: str
    args: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({','.join(map(str, self.args))})"


@dataclass(frozen=True)
class Case:
    """A base file and what is done to it, in order. ``str()`` is the line that makes it again."""

    base: str
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.base}:", *map(str, self.steps)])

    @property
    def family(self) -> str:
        return BASES[self.base].family

    def data(self) -> bytes:
        """The file, at most `MAX_BYTES` long; the same bytes each time."""
        file, done, data = base_file(self.base), [], base_data(self.base)
        for step in self.steps:
            OPERATIONS[step.name].apply(file, step.args)
            grown = file.data()
            if len(grown) <= MAX_BYTES:
                done.append(step)
                data = grown
            else:
                file = base_file(self.base)
                for kept in done:
                    OPERATIONS[kept.name].apply(file, kept.args)
        return data


def parse(line: str) -> Case:
    """The case that a line says. Raises ValueError for what is not one."""
    base, _, steps = line.strip().partition(":")
    if base not in BASES:
        raise ValueError(f"unknown base file {base!r}; known are {', '.join(NAMES)}")
    found = []
    for name, args in _STEP.findall(steps):
        if name not in OPERATIONS:
            raise ValueError(f"unknown operation {name!r}; known are {', '.join(sorted(OPERATIONS))}")
        numbers = tuple(int(arg) for arg in args.split(",") if arg.strip())
        if len(numbers) != len(OPERATIONS[name].domains):
            raise ValueError(f"{name} takes {len(OPERATIONS[name].domains)} numbers, not {len(numbers)}")
        found.append(Step(name, numbers))
    if _STEP.sub("", steps).strip():
        raise ValueError(f"cannot read {_STEP.sub('', steps).strip()!r}")
    return Case(base, tuple(found))


def draw(seed: int) -> Case:
    """The case of `seed`: base files take turns; one to six operations, those of the container first."""
    dice = random.Random(seed)
    base = NAMES[seed % len(NAMES)]
    operations = fitting(BASES[base].family)
    own = [op for op in operations if op.families]
    steps = []
    for _ in range(dice.choice((1, 1, 2, 2, 3, 4, 6))):
        op = dice.choice(own if dice.random() < 0.65 else operations)
        steps.append(Step(op.name, tuple(domain.draw(dice) for domain in op.domains)))
    return Case(base, tuple(steps))


def shrunk(case: Case, fails: Callable[[Case], bool], seconds: float = 40.0) -> Case:
    """The smallest case found in `seconds` that still fails: fewer operations first, then smaller numbers."""
    improved, end = True, time.monotonic() + seconds
    while improved and time.monotonic() < end:
        improved = False
        for smaller in _smaller(case):
            if time.monotonic() > end:
                break
            if fails(smaller):
                case, improved = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases a little smaller than `case`: halves of the operations, single ones, then numbers."""
    steps = case.steps
    width = len(steps) // 2
    while width >= 1:
        for at in range(0, len(steps), width):
            if width < len(steps):
                yield Case(case.base, steps[:at] + steps[at + width :])
        width //= 2
    for at, step in enumerate(steps):
        for place, (value, domain) in enumerate(zip(step.args, OPERATIONS[step.name].domains, strict=True)):
            for less in dict.fromkeys((domain.low, value // 16, value // 2, value * 3 // 4)):
                if domain.low <= less < value:
                    args = (*step.args[:place], less, *step.args[place + 1 :])
                    yield Case(case.base, (*steps[:at], Step(step.name, args), *steps[at + 1 :]))
