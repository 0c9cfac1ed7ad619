"""Bombs in both of two API server processes: their pools are counted as one, and end with their process."""

from __future__ import annotations

import os
import signal

from tests.support.clips import stuck
from tests.support.server.live import Server
from tests.support.server.load import (
    Client,
    alive,
    body,
    decoders,
    decoding,
    family,
    idle,
    leaving,
    spawners,
)
from tests.support.until import until


def bombs_in_both(two: Server) -> list[Client]:
    """Bombs one after another, until both processes have one: who takes which is not our choice."""
    clients: list[Client] = []
    while len({one.ppid() for one in decoders(two)}) < 2:
        assert len(clients) < 15, "one process takes all"
        clients.append(Client(two, two.key).post(body(stuck())))
        until(lambda: len(decoders(two)) == len(clients))
    return clients


def test_what_they_decode_adds_up(two: Server) -> None:
    assert len(spawners(two)) == 2, "each has a pool of its own"
    before = decoding(two)
    with leaving(bombs_in_both(two)) as bombs:
        until(lambda: all(decoding(two)["running"] == len(bombs) for _ in range(6)))
    until(lambda: not decoders(two), seconds=20)
    until(lambda: all(idle(two) for _ in range(6)))
    assert decoding(two)["was cancelled"] == before["was cancelled"] + len(bombs)


# --- from here on the server is gone ---


def test_one_that_is_killed_leaves_no_decoder(two: Server) -> None:
    with leaving(bombs_in_both(two)):
        everyone, forked = family(two), decoders(two)
        victim = spawners(two)[0]
        orphans = [one for one in forked if one.ppid() == victim.pid]
        assert orphans
        os.kill(victim.ppid(), signal.SIGKILL)
        until(lambda: not alive([victim, *orphans]), seconds=20)
        two.process.wait(timeout=60)
        until(lambda: not alive(everyone), seconds=30)
