"""The common form of a video file: a tree of elements, and what a container's grammar must be able to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Element:
    """One part of a file: a box, an EBML element, a chunk, a page, a packet, a tag."""

    name: bytes
    """What kind it is; b"" for bytes that have no header of their own."""
    body: bytes = b""
    """Its content; of an element with children, the fields before the first child."""
    children: list[Element] | None = None
    claim: int | None = None
    """The size that its header states, where that is not the true one."""
    head: bytes = b""
    """Header fields other than name and size, as the grammar needs them."""

    def walk(self) -> Iterator[Element]:
        """This element and all below it, in file order."""
        waiting = [self]
        while waiting:
            element = waiting.pop()
            yield element
            if element.children:
                waiting.extend(reversed(element.children))

    def copy(self) -> Element:
        """A copy that shares nothing which can change."""
        children = None if self.children is None else [child.copy() for child in self.children]
        return Element(self.name, self.body, children, self.claim, self.head)


class Grammar(Protocol):
    """Reads and writes one family of containers. ``write(parse(data)) == data`` for the base files."""

    def parse(self, data: bytes) -> list[Element]:
        """The elements of `data`; damaged ends become an element without a name. Raises nothing."""

    def write(self, elements: list[Element]) -> bytes:
        """The bytes of `elements`; sizes and checksums are made right, but for claims."""


@dataclass
class File:
    """A file that is being changed."""

    grammar: Grammar
    roots: list[Element] = field(default_factory=list)

    @classmethod
    def parse(cls, grammar: Grammar, data: bytes) -> File:
        return cls(grammar, grammar.parse(data))

    def data(self) -> bytes:
        return self.grammar.write(self.roots)

    def all(self) -> list[Element]:
        """Every element, in file order."""
        return [element for root in self.roots for element in root.walk()]

    def find(self, name: bytes) -> Element | None:
        """The first element called `name`."""
        return next((element for element in self.all() if element.name == name), None)

    def siblings(self, wanted: Element) -> list[Element]:
        """The list that holds `wanted` itself."""
        lists = [self.roots, *(element.children for element in self.all() if element.children)]
        return next(items for items in lists if any(item is wanted for item in items))

    def child(self, parent: bytes, element: Element, *, replacing: bool = True) -> None:
        """Put `element` into the first `parent`, in the place of its like; without a parent, at the end."""
        holder = self.find(parent)
        items = self.roots if holder is None or holder.children is None else holder.children
        at = next((i for i, item in enumerate(items) if item.name == element.name), None)
        if replacing and at is not None:
            items[at] = element
        else:
            items.append(element)


def place(items: list[Element], element: Element) -> int:
    """Where `element` itself stands in `items`."""
    return next(i for i, item in enumerate(items) if item is element)


def uint(value: int, width: int, order: str = "big") -> bytes:
    """The lowest `width` bytes of `value`."""
    return (value & ((1 << (8 * width)) - 1)).to_bytes(width, "little" if order == "little" else "big")
