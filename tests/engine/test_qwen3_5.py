"""Qwen3.5 under stage 1 alone, against the oracle: a hybrid model, its states and blocks vLLM's own.

In float32, where vLLM's CPU kernel of the gated delta rule does not run, that one operation is the tests' own
(`tests/support/gated_delta.py`). The last test runs vLLM's, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec

from metok_vllm.demo.qwen3_5_checkpoint import Qwen3_5Kind
from tests.engine.test_qwen3 import film, timed
from tests.support.families import check
from tests.support.gated_delta import in_float32
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.samples import picture

LONG = "Who is it that comes in last, and what do they carry, and where do they put it down when all are gone? " * 4


def started(kind: Qwen3_5Kind, folder: Any, **options: Any) -> Any:
    limits = {"max_num_batched_tokens": 272, "max_num_seqs": 12, "max_model_len": 832}
    return engine(load_qwen3_5(folder, kind, seed=3), {"stages": 1}, **{**limits, **options})


@pytest.fixture(scope="module", params=["qwen3.5", "qwen3.5-moe"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with ExitStack() as stack:
        calls = stack.enter_context(in_float32())
        folder = tmp_path_factory.mktemp("model")
        options = {"enable_prefix_caching": True, "num_gpu_blocks_override": 24}
        yield stack.enter_context(started(request.param, folder, **options))
        assert calls, "the layers under test did not run"


def cases(max_tokens: int = 24) -> list[Case]:
    asked = [
        Case((film(24, 5, 7),)),
        Case((film(17, 3, 3),), metok={"aligner": "none"}),
        Case((film(3, 6, 2, 2),), metok={"events": 2, "key_events": 1, "key_frames": 1}),
        Case((film(26, 5, 5),), metok={"token_budget": 90}),
        Case((film(12, 5, 3),), metok="off"),
        Case((), "Say something without a video."),
        Case((film(9, 3, 5), film(18, 5, 3)), "When?", images=(picture(3, 90, 60),), between="\nand then\n"),
        Case((timed(film(12, 3, 4), 477.0, 23.976),), metok={"strides": [2, 3, 5], "query": "Who plays the drums?"}),
        Case((timed(film(15, 2, 3), 0, 5, resampled=True),), images=(picture(4, 150, 170),)),
    ]
    return [replace(case, max_tokens=max_tokens) for case in asked]


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = cases()
    preempted: set[str] = set()
    cut: set[str] = set()

    def watch(seen: Engine) -> None:
        for name, request in seen.scheduler.requests.items():
            if request.num_preemptions:
                preempted.add(name)
            if 0 < request.num_computed_tokens < request.num_prompt_tokens:
                cut.add(name)

    answers = running.run(asked, watch)
    check(running, asked, answers)
    assert preempted, "nobody was preempted"
    assert cut, "no prompt went over several steps"


def test_states_and_blocks_are_stocks(running: Engine) -> None:
    specs = [manager.kv_cache_spec for manager in running.managers]
    assert 0 < sum(isinstance(spec, MambaSpec) for spec in specs) < len(specs)
    assert running.scheduler.slot_counts == {}
    assert running.runner.model_config.is_hybrid
    assert running.runner.vllm_config.cache_config.mamba_ssm_cache_dtype == "float32"
    assert running.runner.model_config.architectures[0].startswith("METokQwen3_5")


def hit(running: Engine, case: Case) -> tuple[int, int]:
    """Run one case against the oracle: its tokens that the prefix cache had, and where its video ends."""
    name = running.add(case)
    place = running.scheduler.requests[running.internal[name]].mm_features[0].mm_position
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    check(running, [case], [observed(outputs[name])])
    return int(outputs[name].num_cached_tokens), place.offset + place.length


def test_a_video_comes_from_the_prefix_cache_as_far_as_states_were_kept(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    blind = {"aligner": "none"}
    case = Case((film(14, 4, 5),), LONG + "Who?", metok=blind, max_tokens=6)
    assert hit(running, case)[0] == 0
    cached, end = hit(running, replace(case, question=LONG + "Where?"))
    assert cached > end
    assert hit(running, replace(case, metok={**blind, "events": 2}))[0] == 0
    running.scheduler.reset_prefix_cache()
