"""vLLM's default mode: the stock path of the model compiled,
pruned steps beside it uncompiled, on the same weights.
"""

from __future__ import annotations

import pytest

from tests.support.harness import Case, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, scene_video


def test_a_compiled_model_equals_the_oracle(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=23)
    asked = [
        Case((scene_video(1, 9),), metok={"decode_retention": 0.5}, max_tokens=8),
        Case((scene_video(2, 12),), max_tokens=8),
        Case((scene_video(2, 5),), metok="off", max_tokens=8),
        Case((), "No video here.", max_tokens=8),
    ]
    with engine(sample, enforce_eager=False, max_num_batched_tokens=64, max_num_seqs=8) as running:
        config = running.runner.vllm_config.compilation_config
        assert config.mode is not None
        assert int(config.mode) > 0, "nothing is compiled"
        for case, answer in zip(asked, running.run(asked), strict=True):
            assert_same(running.oracle(case), answer, 1e-3)
        running.check_drained()
        assert type(running.runner.model.language_model.model).__name__ == "Qwen2Model"
        assert running.runner.model.language_model.model.do_not_compile is False
