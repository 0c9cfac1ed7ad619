"""Which setting passes on questions that the search never saw. No engine in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from metok_vllm.calibrate.search import Evaluate, Search, Seen
from metok_vllm.calibrate.settings import Setting

CANDIDATES = 4
"""Settings that are checked, the cheapest first, until one passes; each with all of its tokens' KV too."""

GENTLER = 1.1
"""Where one fails, the next takes at least so many times its tokens. Settings of the same cost fail alike."""


def first_that_passes(tried: Search, on_held_out: Evaluate, target: float) -> tuple[Setting, Seen]:
    """The cheapest setting that passes on the held-out questions too; else the one that comes nearest.

    Args:
        tried: what the search saw.
        on_held_out: what settings do to the held-out questions.
        target: share of the answers that must agree.
    """
    order = tried.ranked() or sorted(tried.seen, key=lambda s: (-tried.seen[s].agreement, tried.seen[s].worst))[:1]
    checked: dict[Setting, Seen] = {}
    for _ in range(CANDIDATES):
        both = _with_all_kv(order[0], order)
        checked.update(zip(both, on_held_out(both), strict=True))
        for one in both:
            if checked[one].passes(target):
                return one, checked[one]
        least = GENTLER * tried.seen[both[-1]].tokens
        order = [one for one in order if one not in checked and tried.seen[one].tokens >= least]
        if not order:
            break
    return max(checked.items(), key=lambda pair: (pair[1].agreement, -pair[1].worst))


def _with_all_kv(setting: Setting, order: Sequence[Setting]) -> list[Setting]:
    """A setting, and the same with more KV if the search saw that: one engine's work."""
    whole = replace(setting, decode_retention=1.0)
    return [setting, *([whole] if whole in order and whole != setting else [])]
