"""LongVA, LLaVA-OneVision and LLaVA-Video from folders in their authors' format, against the oracle.

One engine a layout, with small steps: prompts are deferred over several chunks, and requests share batches.
"""

from __future__ import annotations

from typing import Any

import pytest

from metok_vllm.demo.original_checkpoint import Kind
from tests.engine.test_oracle import ATOL, cases
from tests.support.harness import Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.originals import load_original

# Seed and server settings of each.
KINDS: dict[Kind, tuple[int, dict[str, Any]]] = {
    "longva": (31, {}),
    "longva-dpo": (33, {"decode_retention": 0.5, "aligner": "none"}),
    "llava-onevision": (35, {}),
    "llava-video": (37, {"preset": "balanced", "keep_ratio": 0.6}),
}


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed, server = KINDS[request.param]
    sample = load_original(tmp_path_factory.mktemp("model"), request.param, seed=seed)
    with engine(sample, server, max_num_batched_tokens=400) as started:
        yield started


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = cases(seed=8, max_tokens=12)
    answers = running.run(asked)
    for case, answer in zip(asked, answers, strict=True):
        expected = running.oracle(case)
        assert expected.score_margin > 1e-5, f"choose another seed for {case}"
        assert_same(expected, answer, ATOL)
    running.check_drained()
