"""Disjoint seeds: one integer names one video for ever, and its range names the split it belongs to."""

from __future__ import annotations

SPLITS: dict[str, range] = {
    "train": range(0, 2_000_000_000),
    "valid": range(2_000_000_000, 2_100_000_000),
    "test": range(2_100_000_000, 2_200_000_000),
    "demo": range(2_200_000_000, 2_200_001_000),
}


def seed_of(split: str, index: int) -> int:
    """Seed of the ``index``-th video of ``split``.

    Raises:
        KeyError: unknown split.
        IndexError: ``index`` outside the split (negative indices are refused too).
    """
    seeds = SPLITS[split]
    if index < 0:
        raise IndexError(f"negative index {index} in split {split!r}")
    return seeds[index]


def split_of(seed: int) -> str:
    """Name of the split that owns ``seed``; ``ValueError`` if none does."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"seed {seed} belongs to no split")
