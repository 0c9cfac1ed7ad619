"""What the package may not do: import an engine, or make the host wait for the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metok_vllm.compression import alignment, events, ordering, pooling, retention, scoring, selection, tiers
from metok_vllm.compression.ratios import to_micro
from tests.support.guards.host_sync import HostSyncError, no_host_sync

ROOT = Path(__file__).resolve().parents[3]
FRAMES, EVENTS, GRID, WIDTH = 21, 5, 6, 8
STYLE = pooling.PoolStyle("bilinear")


def test_imports_neither_vllm_nor_triton() -> None:
    script = """
import importlib, pkgutil, sys
import metok_vllm.compression as package
names = [module.name for module in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(f"metok_vllm.compression.{name}")
assert len(names) >= 10, names
loaded = sorted({module.split(".")[0] for module in sys.modules} & {"vllm", "triton", "transformers"})
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def inputs(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "features": torch.randn(FRAMES, GRID, GRID, WIDTH, generator=generator),
        "question": torch.randn(4, WIDTH, generator=generator),
        "separator": torch.randn(WIDTH, generator=generator),
        "q": torch.randn(5, 4, 16, generator=generator),
        "k": torch.randn(1000, 2, 16, generator=generator),
        "positions": torch.arange(1000),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def whole_method(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor function of the package, as an engine would chain them."""
    vectors = events.frame_vectors(x["features"].flatten(1, 2))
    ids = events.segment(events.adjacent_similarity(vectors), EVENTS)
    alone, lengths = alignment.none(vectors, ids, EVENTS)
    r = alignment.embedding(vectors, x["question"]) + alignment.dual_tower(vectors, x["question"]) + alone
    key = alignment.key_events(alignment.event_scores(r, ids, EVENTS) + lengths, 3)
    quota = tiers.quota(FRAMES, EVENTS, 3, 2)
    per_frame = pooling.tokens_per_frame(GRID, GRID, (2, 4, 8), STYLE)
    quota = tiers.with_budget(quota, per_frame, True, tiers.video_tokens(quota, per_frame, True) - 9)
    chosen = tiers.assign(ids, r, key, 2, quota)
    video = pooling.pool_video(x["features"], chosen, (2, 4, 8), quota, STYLE, x["separator"], ids)
    pooling.pool_video(x["features"], chosen, (1, 2, 3), quota, pooling.PoolStyle("average", "none"), None, ids)
    pooling.pool_video(
        x["features"], chosen, (1, 2, 3), quota, pooling.PoolStyle("average", "row"), x["separator"], ids
    )

    n = video.tokens.shape[0]
    visual = x["positions"][10 : 10 + n]
    scores = scoring.text_to_visual_scores(
        x["q"], x["k"][: n + 20], visual, x["positions"][n + 15 : n + 20], x["positions"][: n + 20], 0.25, 2
    )
    counts = selection.keep_counts(events.event_lengths(video.token_event, EVENTS), key, to_micro(0.76), 1)
    mask = selection.select_per_event(scores, video.token_event, counts)
    return {
        "tokens": video.tokens,
        "counts": counts,
        "mask": mask,
        "alive": ordering.true_indices(mask, 20),
        "retained": retention.retain(scores, to_micro(0.5)),
    }


def test_nothing_waits_for_the_device() -> None:
    x = inputs("cpu")
    with no_host_sync():
        result = whole_method(x)
    assert int(result["mask"].sum()) == int(result["counts"].sum()) >= 20


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.bincount(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.equal(x, x.clone()),
        lambda x: torch.tensor([1, 2]),
    ],
)
def test_the_guard_sees_what_waits(waiting) -> None:  # type: ignore[no-untyped-def]
    x = torch.arange(3)
    with no_host_sync(), pytest.raises(HostSyncError):
        waiting(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_a_real_gpu() -> None:
    x = inputs("cuda")
    whole_method(x)  # library handles are created, and may wait, on first use
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = whole_method(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = whole_method(inputs("cpu"))
    torch.testing.assert_close(result["tokens"].cpu(), expected["tokens"])
    assert result["counts"].tolist() == expected["counts"].tolist()
