"""Which setting passes on questions that the search never saw. No engine in here."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from metok_vllm.calibrate.search import Evaluate, Search, Seen
from metok_vllm.calibrate.settings import Setting

CANDIDATES = 5
"""Settings that are checked, the cheapest first, until one passes; each with all of its tokens' KV too."""

GENTLER = 1.25
"""Where one fails, the next takes at least so many times its tokens: settings of the same cost fail alike. If
none does, the last to be checked is the one of most tokens.
"""


def first_that_passes(
    tried: Search, on_held_out: Evaluate, target: float, presets: Mapping[Setting, Seen]
) -> tuple[Setting, Seen, bool]:
    """The cheapest setting that passes on the search's questions and on the held-out ones; else a preset that
    does; else, of those that do not, the one that comes nearest on the held-out ones.

    Args:
        tried: what the search saw.
        on_held_out: what settings do to the held-out questions.
        target: share of the answers that must agree.
        presets: what these do to the held-out questions; the search saw them too.

    Returns:
        The setting, what it does to the held-out questions, and whether it passes on both.
    """
    order = tried.ranked() or sorted(tried.seen, key=lambda s: (-tried.seen[s].agreement, tried.seen[s].worst))[:1]
    checked: dict[Setting, Seen] = {}

    def passes(one: Setting) -> bool:
        return tried.good(one) and checked[one].passes(target)

    for _ in range(CANDIDATES):
        both = [order[0], *(one for one in order[1:] if one == order[0].with_all_kv())]
        for _, engine in groupby(both, key=Setting.server):
            here = list(engine)
            checked.update(zip(here, on_held_out(here), strict=True))
            for one in here:
                if passes(one):
                    return one, checked[one], True
        failed = tried.seen[both[-1]].tokens
        dearer = [one for one in order if one not in checked and tried.seen[one].tokens > failed]
        if not dearer:
            break
        order = [one for one in dearer if tried.seen[one].tokens >= GENTLER * failed]
        order = order or [max(dearer, key=lambda one: (tried.seen[one].tokens, tried.seen[one].kv))]
    checked |= presets
    passing = [one for one in checked if passes(one)]
    if passing:
        best = min(passing, key=lambda one: (checked[one].tokens, checked[one].kv))
        return best, checked[best], True
    best, seen = max(checked.items(), key=lambda pair: (pair[1].agreement, -pair[1].worst))
    return best, seen, False
