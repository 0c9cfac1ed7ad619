"""The Triton kernels inside the engine: run by Triton's interpreter in vLLM's CPU worker,
against the oracle.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest

from metok_vllm.worker import ops
from tests.support.harness import Case, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, scene_video

KERNELS = (
    "event_similarity",
    "tiered_pool",
    "text_to_visual_scores",
    "smooth_by_frame",
    "select_per_event",
    "gather_rows",
    "deep_slots",
)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of every kernel's launcher from here on."""
    launches: Counter[str] = Counter()
    for name in KERNELS:
        module = importlib.import_module(f"metok_kernels.{name}")
        monkeypatch.setattr(module, name, counted(name, getattr(module, name), launches))
    return launches


def counted(name: str, launch: Any, launches: Counter[str]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        launches[name] += 1
        return launch(*args, **kwargs)

    return call


def test_forced_kernels_equal_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ops.VARIABLE, "triton")
    launches = count_launches(monkeypatch)
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=13)
    asked = [
        Case((scene_video(1, 9),), max_tokens=8),
        Case((scene_video(2, 5), scene_video(3, 8)), metok={"decode_retention": 0.5}, max_tokens=8),
        Case((scene_video(4, 7),), metok={"frame_smoothing": 0.5, "quota": "video"}, max_tokens=8),
        Case((), "No video here.", max_tokens=8),
    ]
    with engine(sample, max_num_batched_tokens=64, max_num_seqs=8) as running:
        assert set(launches) == set(KERNELS), "the warm-up has launched each of them"
        launches.clear()
        for case, answer in zip(asked, running.run(asked), strict=True):
            assert_same(running.oracle(case), answer, 1e-3)
        running.check_drained()
    videos = 4
    assert launches["event_similarity"] == launches["tiered_pool"] == videos
    assert launches["text_to_visual_scores"] == 2 * videos, "each video is scored at L1 and at L2"
    assert launches["smooth_by_frame"] == 2, "once at L1 and once at L2, where it was asked for"
    # Prompts that end in the same step share a launch.
    assert 2 <= launches["select_per_event"] <= 6
    assert launches["gather_rows"] >= 2
    assert launches["deep_slots"] > 0


def test_an_unknown_choice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv(ops.VARIABLE, "fast")
    with pytest.raises(ValueError, match="METOK_KERNELS must be one of auto, torch, triton, not 'fast'"):
        ops.uses_triton(torch.device("cpu"))
