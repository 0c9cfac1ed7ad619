"""Qwen3.5 under stage 1 alone, against the oracle: a hybrid model, its states and blocks vLLM's own.

In float32, where vLLM's CPU kernel of the gated delta rule does not run, that one operation is the tests' own
(`tests/support/gated_delta.py`). The first test runs vLLM's, in bfloat16. With experts, and the prefix cache:
`test_qwen3_5_experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from metok_vllm.contract.extents import TABLE_FACTOR
from metok_vllm.demo.qwen3_5_checkpoint import Qwen3_5Kind
from tests.engine.test_qwen import kind_of_border
from tests.engine.test_qwen3 import film, timed
from tests.support.coarse import check_near
from tests.support.families import check_cut, check_preempted
from tests.support.gated_delta import in_float32
from tests.support.harness import Case, Engine, engine
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.samples import picture

NEAR = 0.3
"""Of the log-probabilities of chosen tokens. Up to 0.12 was seen, METok on and off alike: rounding."""


def started(kind: Qwen3_5Kind, folder: Any, **options: Any) -> Any:
    # What vLLM launches at every step for prefix caching takes Triton's interpreter half a second.
    limits = {"max_num_batched_tokens": 160, "max_num_seqs": 12, "max_model_len": 832, "enable_prefix_caching": False}
    return engine(load_qwen3_5(folder, kind, seed=3, layers=4), {"stages": 1}, **{**limits, **options})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with in_float32() as calls, started("qwen3.5", tmp_path_factory.mktemp("model"), num_gpu_blocks_override=16) as one:
        yield one
        assert calls, "the layers under test did not run"


def cases(max_tokens: int = 24) -> list[Case]:
    asked = [
        Case((film(24, 2, 3),)),
        Case((film(17, 3, 2),), metok={"aligner": "none"}),
        Case((film(14, 2, 4),), metok={"token_budget": 30}),
        Case((film(6, 3, 3, 2),), metok="off"),
        Case((), "Say something without a video."),
        Case((film(9, 1, 4), film(8, 3, 1)), "When?", images=(picture(3, 60, 60),), between="\nand then\n"),
        Case((timed(film(12, 2, 3), 477.0, 23.976),), metok={"strides": [2, 3, 5], "query": "Who plays the drums?"}),
        Case((timed(film(15, 2, 2), 0, 5, resampled=True),)),
    ]
    return [replace(case, max_tokens=max_tokens) for case in asked]


def test_vllms_own_kernel_is_near(tmp_path_factory: pytest.TempPathFactory) -> None:
    """First: of two engines in one process the second has to wait for the first's end."""
    asked = [cases(4)[i] for i in (0, 3, 5)]
    with started("qwen3.5", tmp_path_factory.mktemp("model"), dtype="bfloat16") as running:
        check_near(running, asked, pruned=0, near=NEAR)


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    """In a pool too small for all of them."""
    check_preempted(running, cases())


def check_cut_anywhere(running: Engine) -> None:
    """A chunk ends inside a frame, inside a timestamp, and between two pairs; the states are handed on."""
    shown = film(20, 3, 3)
    check_cut(
        running,
        lambda words: Case((shown,), before="so " * words, max_tokens=4),
        lambda expected, border: kind_of_border(running.sample, shown, expected, border),
        ("in a frame", "in a timestamp", "between pairs"),
    )


def test_a_prompt_may_be_cut_anywhere(running: Engine) -> None:
    check_cut_anywhere(running)


def test_states_and_blocks_are_stocks(running: Engine) -> None:
    specs = [manager.kv_cache_spec for manager in running.managers]
    assert 0 < sum(isinstance(spec, MambaSpec) for spec in specs) < len(specs)
    assert isinstance(running.runner.model_state, MambaHybridModelState)
    assert running.runner.vllm_config.cache_config.mamba_ssm_cache_dtype == "float32"  # as the checkpoint says
    assert running.runner.model_config.architectures == ["METokQwen3_5ForConditionalGeneration"]


def test_positions_of_lost_tokens_have_their_place_in_the_table(running: Engine) -> None:
    """Of the layers that attend."""
    layers = [layer.self_attn for layer in running.runner.model.decoder().layers if hasattr(layer, "self_attn")]
    most = running.runner.model_config.hf_text_config.max_position_embeddings
    assert [len(layer.rotary_emb.cos_sin_cache) for layer in layers] == [TABLE_FACTOR * most]


@pytest.mark.parametrize(
    ("stated", "why"),
    [({"stages": 3}, "this server was started with stages 1"), ({"keep_ratio": 0.5}, "'keep_ratio' has no effect")],
)
def test_no_request_can_prune(running: Engine, stated: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        running.add(Case((film(6, 2, 2),), metok=stated))
