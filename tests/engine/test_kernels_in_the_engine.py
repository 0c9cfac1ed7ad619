"""The Triton kernels inside the engine: run by Triton's interpreter in vLLM's CPU worker, against the oracle."""

from __future__ import annotations

import pytest

from metok_vllm.engine import ops
from tests.engine.harness import Case, engine
from tests.oracle import assert_same
from tests.oracle.samples import load_sample, scene_video


def test_forced_kernels_equal_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import metok_kernels.pruned_slots as slots
    import metok_kernels.text_to_visual_scores as scoring

    monkeypatch.setenv(ops.VARIABLE, "triton")
    calls = 0
    ranked = 0
    launch = scoring.text_to_visual_scores

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return launch(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "text_to_visual_scores", counted)
    rank = slots.pruned_slots

    def counted_ranks(*args: object, **kwargs: object) -> None:
        nonlocal ranked
        ranked += 1
        rank(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(slots, "pruned_slots", counted_ranks)
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=13)
    asked = [
        Case((scene_video(1, 9),), max_tokens=8),
        Case((scene_video(2, 5), scene_video(3, 8)), metok={"decode_retention": 0.5}, max_tokens=8),
        Case((), "No video here.", max_tokens=8),
    ]
    with engine(sample, max_num_batched_tokens=64, max_num_seqs=8) as running:
        for case, answer in zip(asked, running.run(asked), strict=True):
            assert_same(running.oracle(case), answer, 1e-3)
        running.check_drained()
    assert ranked > 0
    assert calls == 2 * 3, "three videos, each scored at L1 and at L2"


def test_an_unknown_choice_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv(ops.VARIABLE, "fast")
    with pytest.raises(ValueError, match="METOK_KERNELS must be one of auto, torch, triton, not 'fast'"):
        ops.uses_triton(torch.device("cpu"))
