"""The paper's aligner in the engine: SigLIP and CLIP towers beside the model, against the oracle.

Beside a model that takes frames in pairs: `test_qwen3_experts.py`.
"""

from __future__ import annotations

import pytest

from metok_vllm.demo.checkpoint import AlignerKind
from tests.support.harness import Case, engine
from tests.support.oracle import assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.samples import load_sample, scene_video
from tests.support.towers import load_dual_tower

LONG_QUESTION = (
    "Who is on the stage, and what do they play, and which of them leaves first when the light goes out there?"
)


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_the_folder_beside_the_model_aligns(tower: AlignerKind, tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=7, aligner=tower)
    towers = load_dual_tower(sample.path)
    asked = [
        Case((scene_video(1, 22),)),
        Case((scene_video(2, 13), scene_video(3, 19)), LONG_QUESTION, metok={"decode_retention": 1}),
        Case((scene_video(4, 18),), metok={"aligner": "embedding"}),
        Case((scene_video(5, 18),), metok="off"),
    ]
    with engine(sample, max_num_batched_tokens=2048) as running:
        assert running.runner.model.metok_aligner is not None
        answers = running.run(asked)
        differs = 0
        for case, answer in zip(asked, answers, strict=True):
            settings = case.settings(running.server)
            tall = {} if settings.off or case.metok == {"aligner": "embedding"} else {"aligner": "dual-tower"}
            settings = type(settings)(**{**settings.__dict__, **tall})
            expected = run_oracle(
                sample.model,
                sample.prompt_ids(case.question, videos=len(case.videos)),
                [sample.pixels(video) for video in case.videos],
                None,
                sample.question_ids(case.question),
                settings,
                case.max_tokens,
                aligner=towers.of(case.videos, case.question),
            )
            assert_same(expected, answer, 1e-3)
            if tall:
                differs += expected.tokens != running.oracle(case).tokens
        assert differs > 0, "the tower decided nothing that the embeddings would not have decided"
        running.check_drained()
