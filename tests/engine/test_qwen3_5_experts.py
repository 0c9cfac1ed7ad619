"""Qwen3.5 with experts under stage 1 alone, against the oracle; what the prefix cache gives both kinds.

As in `test_qwen3_5.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_qwen3 import film
from tests.engine.test_qwen3_5 import cases, check_cut_anywhere, started
from tests.support.coarse import check_near
from tests.support.families import check, check_preempted
from tests.support.gated_delta import in_float32
from tests.support.harness import Case, Engine, observed

LONG = "Who is it that comes in last, and what do they carry, and where do they put it down when all are gone? " * 4


@pytest.fixture(scope="module", params=["qwen3.5-moe", "qwen3.5"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("model")
    with in_float32() as calls, started(request.param, folder, enable_prefix_caching=True) as one:
        yield one
        assert calls, "the layers under test did not run"


def test_counts_in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens alone: where two experts are nearly as good rounding takes another one."""
    asked = [cases(2)[i] for i in (0, 3, 5)]
    with started("qwen3.5-moe", tmp_path_factory.mktemp("model"), dtype="bfloat16") as running:
        check_near(running, asked, pruned=0, near=math.inf)


def test_a_prompt_may_be_cut_anywhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Without the prefix cache, for which vLLM ends chunks where a state can be kept; preempted, too."""
    folder = tmp_path_factory.mktemp("model")
    with in_float32(), started("qwen3.5-moe", folder, num_gpu_blocks_override=16) as running:
        check_cut_anywhere(running)
        check_preempted(running, cases(24))


@pytest.mark.parametrize("running", ["qwen3.5-moe"], indirect=True)
def test_with_experts(running: Engine) -> None:
    asked = [cases(12)[i] for i in (0, 3, 5)]
    check(running, asked, running.run(asked))
    assert running.runner.model_config.is_moe


def hit(running: Engine, case: Case) -> tuple[int, int]:
    """Run one case against the oracle: its tokens that the prefix cache had, and where its video ends."""
    name = running.add(case)
    place = running.scheduler.requests[running.internal[name]].mm_features[0].mm_position
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    check(running, [case], [observed(outputs[name])])
    return int(outputs[name].num_cached_tokens), place.offset + place.length


def test_a_video_is_shared_where_vllm_has_kept_a_state_behind_it(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    case = Case((film(6, 2, 2),), LONG + "Who?", metok={"aligner": "none"}, max_tokens=2)
    assert hit(running, case)[0] == 0
    cached, end = hit(running, replace(case, question=LONG + "Where?"))
    assert cached > end
    assert cached % running.prefix_unit == 0
    assert hit(running, replace(case, metok={"aligner": "none", "events": 2}))[0] == 0
