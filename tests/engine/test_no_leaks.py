"""Requests come and go; what is alive in the process stays the same."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.support.harness import Case, Engine, engine
from tests.support.oracle.samples import load_sample, scene_video

SETTINGS = (None, {"decode_retention": 1}, {"events": 3}, "off")


def alive() -> tuple[int, int]:
    """Live tensors, and the bytes behind them."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return len(tensors), sum(storages.values())


def serve(running: Engine, first: int, count: int) -> None:
    """Requests that no cache has seen: a question of its own each."""
    videos = [scene_video(seed, frames) for seed, frames in enumerate((2, 7, 12, 17))]
    for number in range(first, first + count, 4):
        running.run(
            [
                Case((videos[(number + i) % 4],), f"What happens in scene {number + i}?", metok=metok, max_tokens=3)
                for i, metok in enumerate(SETTINGS)
            ]
        )
        running.groups_seen.clear()
        running.internal.clear()


def test_no_tensor_is_left_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=31)
    # A small cache of items, so that it is full before the first count.
    with engine(sample, max_num_batched_tokens=96, max_num_seqs=8, mm_processor_cache_gb=0.002) as running:
        # Enough to fill the records of the latest requests, which are kept on purpose.
        serve(running, 0, 72)
        running.check_drained()
        before = alive()
        serve(running, 72, 24)
        running.check_drained()
        assert alive()[0] <= before[0], "tensors of finished requests are alive"
        assert alive()[1] <= before[1] * 1.01
