"""METok's step path reads the device once in a video request's prefill, and never while decoding;
no copy to the device makes the host wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metok_vllm.worker import ops
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, scene_video

ON_THE_HOST = {
    "video_plan.py:from_tensor tolist",  # the plan stays on the host (`keep_on_cpu`)
    "base.py:_fit __int__",  # so does the length of the question
    "requests.py:_numbers tolist",  # and the question and its rows, read once when their request comes
    "spans.py:_counted tolist",  # where these are looked at, to be what their length says
    "beside.py:with_fields numpy",  # the engine core names a video by its plan and the question
    "attn_metadata.py:others_metadata numpy",  # vLLM keeps bounds of the lengths on the host
}
"""Reads of tensors that never were on the device."""

THE_READ = "survivors.py:survivors_of_l1 tolist"


DIALS = {"quota": "video", "score_rows": "question", "frame_smoothing": 0.5, "final_keep": 0.5}


def cases() -> list[Case]:
    return [
        Case((scene_video(1, 9),), metok={"decode_retention": 0.5, "report": True}, max_tokens=6),
        Case((scene_video(2, 5), scene_video(3, 8)), metok=DIALS, max_tokens=6),
        Case((), "No video here.", max_tokens=6),
        Case((scene_video(4, 6),), metok="off", max_tokens=6),
    ]


def check(running: Engine) -> None:
    asked = cases()
    with waits_of_metok() as found:
        answers = running.run(asked)
    pruned = 2
    assert 1 <= found.pop(THE_READ) <= pruned, "prompts that end in one step share the read"
    assert set(found) <= ON_THE_HOST, found
    for case, answer in zip(asked, answers, strict=True):
        assert_same(running.oracle(case), answer, 1e-3)


def read(index: torch.Tensor) -> None:
    assert int(index.sum()) >= 0


def copy_from_a_list(index: torch.Tensor) -> None:
    torch.tensor([0, 1], device=index.device)


def copy_from_pageable_memory(index: torch.Tensor) -> None:
    torch.ones(index.shape[0], dtype=torch.int64).to(index.device, non_blocking=True)


def meet(index: torch.Tensor) -> None:
    index.index_select(0, torch.arange(1))


FAULTS: list[Callable[[torch.Tensor], None]] = [read, copy_from_a_list, copy_from_pageable_memory, meet]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_one_read_in_a_prefill_and_none_in_decoding(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=19)
    monkeypatch.setenv(ops.VARIABLE, kernels)
    with engine(sample, max_num_batched_tokens=64, max_num_seqs=8) as running:
        check(running)
        # The finder finds: the same run with an operation that waits must be caught.
        original = ops.gather
        for fault in FAULTS if kernels == "torch" else FAULTS[:1]:

            def waiting(index: torch.Tensor, *tensors: Any, fault: Any = fault) -> object:
                fault(index)
                return original(index, *tensors)

            monkeypatch.setattr(ops, "gather", waiting)
            with pytest.raises(AssertionError, match=r"step\.py:_(gather|at_l1)"):
                check(running)
