"""Qwen3-VL with experts against the oracle; what it shares with the dense one is in `test_qwen3.py`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.test_qwen3 import cases, started
from tests.support.families import check, check_in_chunks
from tests.support.harness import Engine


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    server = {"preset": "balanced", "keep_ratio": 0.6}
    with started("qwen3-vl-moe", 7, tmp_path_factory.mktemp("model"), server) as engine:
        yield engine


def test_the_model_has_experts(running: Engine) -> None:
    assert running.runner.model_config.is_moe
    assert running.runner.model_config.architectures == ["METokQwen3VLMoeForConditionalGeneration"]


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = cases(8)
    check_in_chunks(running, [asked[i] for i in (0, 1, 4, 7, 8, 9, 11)])


def test_each_alone(running: Engine) -> None:
    for case in (cases(6)[2], cases(6)[10]):
        (answer,) = running.run([case])
        check(running, [case], [answer])
