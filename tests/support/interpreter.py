"""Triton's interpreter, without what it does over and over.

For every kernel it looks through all of `triton.language` for what it has to replace, and by what. That takes
as long as many a kernel, and what it finds is always the same.

Every sum and product it computes once more in 64 bits, to see whether it overflows: a third of its time. The
tests of kernels, which run without this module, have that done.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Replacements:
    """In place of the interpreter's scope: what it would replace, by name."""

    def __init__(self) -> None:
        self.found: list[tuple[str, Any]] = []

    def set_attr(self, package: object, name: str, value: object) -> None:
        self.found.append((name, value))


@contextmanager
def quick() -> Iterator[None]:
    """Inside the ``with`` block it remembers what it has found, and does not look for overflow."""
    from triton.runtime import interpreter

    inside: Any = interpreter
    look = inside._patch_builtin
    known: dict[Any, list[tuple[str, Any]]] = {}

    def replace(package: Any, builder: Any, scope: Any) -> None:
        if package not in known:
            found = Replacements()
            look(package, builder, found)
            known[package] = found.found
        members = known[package]
        if members and inspect.getattr_static(package, members[0][0]) is members[0][1]:
            return  # a kernel that another one calls: all is replaced already
        for name, value in members:
            scope.set_attr(package, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inside, "_patch_builtin", replace)
        patch.setattr(inside.interpreter_builder, "options", inside.InterpreterOptions(sanitize_overflow=False))
        yield
