"""Two tensor-parallel ranks whose features differ by a bit compress a video alike.

Two processes, joined by vLLM's own groups over gloo. On each video a choice hangs on one bit, and rank 1's
features have that bit turned.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch

from metok_vllm.compression.stage1 import CompressedVideo, FrameChoice

CASES = {
    "where an event ends": ["event", "is_key"],
    "the key event": ["is_key", "tier"],
    "the key frame": ["tier"],
}
"""What the bit decides, and which parts of the choice then differ."""

HEIGHT = WIDTH = 4
DIM = 8


def frame(*values: float) -> torch.Tensor:
    """A frame [H, W, D] whose tokens are all alike, so that its vector is exactly theirs."""
    return torch.tensor([*values, *[0.0] * (DIM - len(values))]).expand(HEIGHT, WIDTH, DIM)


def video(case: str, rank: int) -> torch.Tensor:
    """Features [T, H, W, D] as a rank computes them."""
    nudge = float(torch.finfo(torch.float32).eps) * 4 * rank
    if case == "where an event ends":
        # Both neighbours of the middle frame are as far from it; rank 1 finds the second farther.
        return torch.stack([frame(1, 1), frame(1, 0), frame(1, 1 + nudge)])
    # Events (0, 1) and (2, 3), plainly apart. The question is the first axis.
    if case == "the key event":
        return torch.stack([frame(1, 1), frame(1, 1.5), frame(1, -1 + nudge), frame(1, -1.5)])
    return torch.stack([frame(1, 1), frame(1, 1 - nudge), frame(0.5, -1), frame(0.4, -1)])


def choose(case: str, rank: int, agree: Any) -> CompressedVideo:
    """What `MetokModel._compressed` runs, with a question along the first axis."""
    from dataclasses import replace

    from metok_vllm.compression import alignment
    from metok_vllm.compression.alignment import Alignment
    from metok_vllm.compression.pooling import PoolStyle
    from metok_vllm.compression.stage1 import Recipe, compress_video
    from metok_vllm.compression.tiers import quota
    from metok_vllm.worker import ops

    features = video(case, rank)

    def align(vectors: torch.Tensor, event: torch.Tensor, events: int) -> Alignment:
        return alignment.by_question(alignment.embedding(vectors, torch.eye(DIM)[:1]), event, events)

    recipe = Recipe(quota(len(features), 2, 1, 1), 1, 1, (1, 2, 4), PoolStyle("bilinear"))
    operations = ops.STAGE_1 if agree is None else replace(ops.STAGE_1, agree=agree)
    return compress_video(features, recipe, align, torch.ones(DIM), operations)


def rank_main(rank: int, store: str, results: Any) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from metok_vllm.compression.stage1 import alone

    torch.set_num_threads(1)
    os.environ["VLLM_DIST_IDENT"] = str(os.getppid())  # names shared memory; vLLM's CPU worker sets it
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, rank, f"file://{store}", rank, backend="gloo")
        initialize_model_parallel(2)
        videos = {case: (choose(case, rank, alone), choose(case, rank, None)) for case in CASES}
    # As lists: tensors would travel by file descriptors, which die with this process.
    results.put(
        (rank, {case: [[t.tolist() for t in (*v[:3], *v.choice)] for v in pair] for case, pair in videos.items()})
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Of each rank, of each case: the video compressed alone and in agreement."""
    context = multiprocessing.get_context("spawn")
    results, store = context.Queue(), str(tmp_path_factory.mktemp("ranks") / "store")
    processes = [context.Process(target=rank_main, args=(rank, store, results), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return dict(results.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()


def parts(compressed: list[Any]) -> tuple[torch.Tensor, list[Any], FrameChoice]:
    tokens, event, frame_of, *choice = compressed
    return torch.tensor(tokens), [event, frame_of], FrameChoice(*(torch.tensor(part) for part in choice))


@pytest.mark.parametrize("case", CASES)
def test_the_bit_decides_where_each_rank_is_alone(ranks: dict[int, Any], case: str) -> None:
    assert (video(case, 0) != video(case, 1)).sum() == HEIGHT * WIDTH, "one channel of one frame"
    torch.testing.assert_close(video(case, 0), video(case, 1))
    first, second = (parts(ranks[rank][case][0])[2] for rank in (0, 1))
    differ = [name for name, a, b in zip(FrameChoice._fields, first, second, strict=True) if not torch.equal(a, b)]
    assert differ == CASES[case]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_on_everything_that_decides_a_length(ranks: dict[int, Any], case: str) -> None:
    (tokens, places, choice), (other_tokens, other_places, other_choice) = (
        parts(ranks[rank][case][1]) for rank in (0, 1)
    )
    assert places == other_places, "event and frame of every token"
    for name, ours, theirs in zip(FrameChoice._fields, choice, other_choice, strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == (torch.bool if name == "is_key" else torch.int64)
    torch.testing.assert_close(tokens, other_tokens, msg="tokens but for rounding")
    alone = parts(ranks[0][case][0])
    assert torch.equal(tokens, alone[0]), "rank 0 decides, so nothing of its own changes"
    for ours, theirs in zip(choice, alone[2], strict=True):
        assert torch.equal(ours, theirs)
