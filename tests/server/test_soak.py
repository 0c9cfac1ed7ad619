"""A soak: many requests of all kinds one after another; memory stays flat, and nothing is left at the end.

Short in the suite. `make soak REQUESTS=3000` is the long form.

Memory is the sum, over all processes of the server, of what is resident and theirs alone (USS, from
`/proc/*/smaps`). The first half of the requests is warm-up: the KV pool becomes resident page by page, vLLM's
cache of processed items fills up (the server fixture keeps both small), and so do allocators. After it, the
median of the last five readings may exceed the median of the first five by `GROWTH_MIB`, which does not
depend on the number of requests: a leak shows the more, the longer the soak.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import ask, assert_drained, oracle, result
from tests.support.server.clips import mp4
from tests.support.server.live import Server
from tests.support.server.load import lasting

REQUESTS = int(os.environ.get("METOK_SOAK_REQUESTS", "40"))
AT_ONCE = 4
GROWTH_MIB = 48


def resident_mib(server: Server) -> dict[str, float]:
    """Memory that each process of the server holds for itself, by the process's name.

    Without decoders, at work or not: each lives for one video, and that of a request just dropped may be
    about to end, that of the next just forked.
    """
    return {f"{one.name()} {one.pid}": one.memory_full_info().uss / 2**20 for one in lasting(server)}


def growth_of(readings: list[dict[str, float]]) -> dict[str, float]:
    """How much more each process holds at the end than after warm-up; all of it, if it was not there then."""
    warm = readings[len(readings) // 2 :]
    first, last = warm[:5], warm[-5:]
    return {
        name: statistics.median(row.get(name, 0) for row in last) - statistics.median(row.get(name, 0) for row in first)
        for name in sorted({name for row in last for name in row})
    }


@dataclass
class Soak:
    """Requests drawn from a seed, and what came of them."""

    server: Server
    videos: list[bytes]
    tokens: dict[tuple[int, str, str], list[int]] = field(default_factory=dict)  # kind of request -> its answer
    answered: int = 0
    repeated: int = 0
    cancelled: int = 0
    refused: int = 0

    def one(self, number: int) -> None:
        """Request `number`: a video under some settings, sometimes none,
        broken, or dropped while it streams.
        """
        rng = random.Random(number)
        which = rng.randrange(-1, len(self.videos))
        video = None if which < 0 else self.videos[which]
        metok: Any = rng.choice([None, {"decode_retention": 1}, {"decode_retention": 0, "events": 3}, "off"])
        # A new question makes a new item of every cache; an old one hits what is there.
        question = rng.choice(["Who comes in last?", "Where do they go?", f"What happens in scene {number}?"])
        fate = rng.random()
        if fate < 0.1:
            self.drop(video, metok, question, rng.randrange(4))
        elif fate < 0.15:
            self.refuse(video)
        else:
            answer = ask(self.server, video, metok, question, max_tokens=rng.choice([1, 4, 8]))
            tokens = answer.choices[0].token_ids
            known = self.tokens.setdefault((which, str(metok), question), tokens)
            shared = min(len(known), len(tokens))
            assert known[:shared] == tokens[:shared], "one request was answered in two ways"
            self.repeated += known is not tokens
            self.answered += 1

    def drop(self, video: bytes | None, metok: Any, question: str, events: int) -> None:
        stream = ask(self.server, video, metok, question, stream=True, max_tokens=64)
        for _ in range(events):
            next(iter(stream), None)
        stream.close()
        self.cancelled += 1

    def refuse(self, video: bytes | None) -> None:
        try:
            ask(self.server, (video or b"no video")[:200])
        except openai.BadRequestError:
            self.refused += 1


def test_a_soak_leaves_memory_flat_and_nothing_behind(server: Server, sample: Sample) -> None:
    soak = Soak(server, [mp4(scene_video(70 + i, frames)) for i, frames in enumerate((1, 5, 9, 14, 20, 26, 32))])
    readings: list[dict[str, float]] = []
    every = max(1, REQUESTS // 40)
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, REQUESTS, every):
            list(pool.map(soak.one, range(first, min(first + every, REQUESTS))))
            readings.append(resident_mib(server))
    seconds = time.monotonic() - started
    growth = growth_of(readings)
    totals = [round(sum(reading.values())) for reading in readings]
    print(
        f"\n{REQUESTS} requests in {seconds:.0f} s: {soak.answered} answered, {soak.repeated} of them seen before, "
        f"{soak.cancelled} dropped, {soak.refused} refused; MiB since warm-up "
        f"{ {name: round(mib, 1) for name, mib in growth.items()} }; totals {totals}"
    )
    assert min(soak.answered, soak.cancelled, soak.refused) > 0, "the soak had not all kinds of requests"
    assert soak.answered > REQUESTS // 2
    assert sum(growth.values()) < GROWTH_MIB
    fresh = mp4(scene_video(80, 19))
    assert_same(oracle(sample, fresh), result(ask(server, fresh)), 1e-3)
    assert_drained(server)
