"""Pools of child processes, ended with their test."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from metok_vllm.media.children.pool import DecodePool
from metok_vllm.media.settings import PoolLimits


@pytest.fixture
def make() -> Iterator[Callable[..., DecodePool]]:
    pools: list[DecodePool] = []

    def made(**limits: int) -> DecodePool:
        pools.append(DecodePool(PoolLimits(**limits)))
        pools[-1].start()
        return pools[-1]

    yield made
    for one in pools:
        one.stop()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    made = DecodePool()
    yield made
    gc.collect()
    assert (made.places.used, made.places.waiting, made.memory.used) == (0, 0, 0)
    made.stop()
