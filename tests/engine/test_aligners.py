"""The paper's aligner in the engine: SigLIP and CLIP towers beside the model, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from metok_vllm.demo.checkpoint import ALIGNER_WINDOW
from tests.support.harness import Case, engine
from tests.support.oracle import assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.samples import load_sample, scene_video

LONG_QUESTION = (
    "Who is on the stage, and what do they play, and which of them leaves first when the light goes out there?"
)


def windows(tokenizer: Any, question: str) -> torch.Tensor:
    """The question cut to the tower's window by hand:
    special tokens around every piece, padded to full length.
    """
    ids = tokenizer(question, add_special_tokens=False).input_ids
    special = tokenizer("", add_special_tokens=True).input_ids
    before, after = (special[:1], special[1:]) if len(special) == 2 else ([], special)
    room = ALIGNER_WINDOW - len(special)
    rows = [[*before, *ids[i : i + room], *after] for i in range(0, len(ids), room)]
    return torch.tensor([row + [tokenizer.pad_token_id] * (ALIGNER_WINDOW - len(row)) for row in rows])


@pytest.mark.parametrize("tower", ["siglip", "clip"])
def test_the_folder_beside_the_model_aligns(tower: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=7, aligner=tower)
    folder = sample.path / "metok_aligner"
    model = AutoModel.from_pretrained(folder).eval()
    images, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
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
            pixels = [images(list(v), return_tensors="pt")["pixel_values"] for v in case.videos]
            settings = type(settings)(**{**settings.__dict__, **tall})
            expected = run_oracle(
                sample.model,
                sample.prompt_ids(case.question, videos=len(case.videos)),
                [sample.pixels(video) for video in case.videos],
                None,
                sample.question_ids(case.question),
                settings,
                case.max_tokens,
                aligner=(model, pixels, windows(tokenizer, case.question)),
            )
            assert_same(expected, answer, 1e-3)
            if tall:
                differs += expected.tokens != running.oracle(case).tokens
        assert differs > 0, "the tower decided nothing that the embeddings would not have decided"
        running.check_drained()
