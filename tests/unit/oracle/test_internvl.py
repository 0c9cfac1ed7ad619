"""The oracle of InternVL3 without METok against transformers' own answer."""

from __future__ import annotations

import pytest
import torch

from tests.support.oracle import OracleSettings, run
from tests.support.oracle.internvl_samples import load_internvl
from tests.support.oracle.samples import QUESTION, greedy, picture, scene_video


@pytest.mark.parametrize("language", ["qwen2", "qwen3"])
def test_without_metok_it_is_transformers(tmp_path_factory: pytest.TempPathFactory, language: str) -> None:
    """Prompt, pixels and answer are those of transformers' processor and model."""
    sample = load_internvl(tmp_path_factory.mktemp("tiny"), language, seed=5)
    video, image = scene_video(3, 7, side=224)[:, :150], picture(2, 90, 150)
    ids = sample.as_read(sample.prompt_ids(images=1))
    found = run(
        sample.model, ids, [sample.pixels(video)], sample.image_inputs([image]), [], OracleSettings(off=True), 12
    )
    message = {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": QUESTION}]}
    text = sample.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    inputs = sample.processor(text=text, images=[image], videos=[video], return_tensors="pt")
    visual = sample.processor.image_token_id
    read = [visual if token == sample.model.config.video_token_id else token for token in found.prompt_ids]
    assert read == inputs["input_ids"][0].tolist()
    tokens, logprobs = greedy(sample, dict(inputs), 12)
    assert found.tokens == tokens
    assert isinstance(found.logprobs, torch.Tensor)
    assert torch.allclose(found.logprobs, logprobs, atol=1e-4)
