"""One result from several runs: variants that were measured at different times, side by side."""

from __future__ import annotations

from typing import Any


def mismatch(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs so that figures of two results must not stand side by side; None where they may.

    Commits may differ: each variant says which code it is of.
    """
    for what, one, other in (
        ("workload", before["workload"], now["workload"]),
        ("device", before["hardware"]["device"], now["hardware"]["device"]),
        ("versions", before["versions"], now["versions"]),
    ):
        if one != other:
            return f"{what}: {_difference(one, other)}"
    return None


def _difference(one: Any, other: Any) -> str:
    """Where two values differ; of mappings the keys alone that do."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        return ", ".join(f"{key} {one.get(key)!r}, now {other.get(key)!r}" for key in keys)
    return f"{one!r}, now {other!r}"


def continued(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`now`, a result without variants so far, with those of `before`, its commands and its commits.

    What decoding a file took is taken over, too: it is the same for all, and would only differ by chance.
    """
    return {
        **now,
        "command": " ; ".join([before["command"], now["command"]]),
        "commit": " and ".join(dict.fromkeys([*before["commit"].split(" and "), now["commit"]])),
        "file_decode_ms": before["file_decode_ms"],
        "variants": dict(before["variants"]),
    }


def add(variants: dict[str, dict[str, Any]], name: str, entry: dict[str, Any]) -> None:
    """Put a variant's entry among the others, in place of an earlier one of that name.

    One that failed, or only counted, takes no times away: those of an earlier run stay.
    """
    if "levels" in entry or "levels" not in variants.get(name, {}):
        variants[name] = entry
