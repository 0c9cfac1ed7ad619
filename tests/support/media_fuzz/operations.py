"""The registry of operations: each a named, pure change of a file, with whole numbers as its arguments."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from .element import File

Change = Callable[..., None]


@dataclass(frozen=True)
class Domain:
    """From where an argument is drawn."""

    low: int
    high: int
    small: bool = True
    """Draw small numbers far more often than large ones."""
    also: tuple[int, ...] = ()
    """Numbers of which one is drawn half of the time."""

    def draw(self, dice: random.Random) -> int:
        if self.also and dice.random() < 0.5:
            return dice.choice(self.also)
        if not self.small:
            return dice.randint(self.low, self.high)
        return self.low + int(math.exp(dice.uniform(0, math.log(self.high - self.low + 1)))) - 1


_EDGES = (2**31 - 1, 2**31, 2**32 - 1, 2**28, 80_000_000, 2**24, 2**63 - 1, 2**64 - 1, 65535, 255, 0, 1, 2**26)
INDEX = Domain(0, 999, small=False)
"""Which element: taken modulo how many there are."""
OFFSET = Domain(0, 400)
CLAIM = Domain(0, 2**40, also=_EDGES)
"""A number that a header states."""
BYTE = Domain(0, 255, small=False)
PERMILLE = Domain(0, 1000, small=False)


def count(high: int, also: tuple[int, ...] = ()) -> Domain:
    """How many of something are really there."""
    return Domain(1, high, also=also)


def choice(options: int) -> Domain:
    """One of `options` kinds, by its number."""
    return Domain(0, options - 1, small=False)


@dataclass(frozen=True)
class Operation:
    """A change of a file, and what its arguments may be."""

    name: str
    families: frozenset[str]
    """Container families that it fits; empty for all."""
    domains: tuple[Domain, ...]
    change: Change

    def apply(self, file: File, args: tuple[int, ...]) -> None:
        """Change `file`. Where there is nothing to change, leave it as it is."""
        self.change(file, *args)


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, *domains: Domain, families: str = "") -> Callable[[Change], Change]:
    """Register the decorated function as the operation `name`, for `families` separated by spaces."""

    def register(change: Change) -> Change:
        assert name not in OPERATIONS, name
        OPERATIONS[name] = Operation(name, frozenset(families.split()), domains, change)
        return change

    return register


def fitting(family: str) -> list[Operation]:
    """The operations for a container family: its own first, then those for all."""
    own = [op for op in OPERATIONS.values() if family in op.families]
    return own + [op for op in OPERATIONS.values() if not op.families]
