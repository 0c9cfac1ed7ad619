"""The random tiny checkpoint loads unchanged where a published one would, and sets engines a real test."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, LlavaOnevisionForConditionalGeneration

from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, ALIGNER_WINDOW, build_checkpoint
from tests.support.oracle import OracleSettings, run, stage1
from tests.support.oracle.samples import Sample, scene_video

SMALL = {"layers": 3, "seed": 7}


def plain_tokens(sample: Sample, video_seed: int, steps: int = 24) -> tuple[list[int], torch.Tensor]:
    videos = [sample.pixels(scene_video(video_seed, 8))]
    result = run(sample.model, sample.prompt_ids(), videos, None, [], OracleSettings(off=True), steps)
    return result.tokens, result.logprobs


def test_every_tensor_has_its_published_name_and_place(tmp_path: Path):
    path = build_checkpoint(tmp_path / "model", **SMALL)
    _, info = LlavaOnevisionForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    names = set(load_file(path / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {
        "image_newline",
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    assert "language_model.model.layers.2.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight" in names


def test_the_same_arguments_give_the_same_tensors(tmp_path: Path):
    first, again = (load_file(build_checkpoint(tmp_path / n, **SMALL) / "model.safetensors") for n in "ab")
    other = load_file(build_checkpoint(tmp_path / "c", layers=3, seed=8) / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_config_state_the_dtype(tmp_path: Path, dtype):
    path = build_checkpoint(tmp_path, dtype=dtype, **SMALL)
    assert {str(t.dtype) for t in load_file(path / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize(
    "shape",
    [{}, {"image_size": 48, "patch_size": 6}, {"hidden": 96, "heads": 3, "kv_heads": 3, "vision_hidden": 32}],
)
def test_the_processor_lays_down_what_the_model_returns(tmp_path: Path, shape):
    path = build_checkpoint(tmp_path, **SMALL, **shape)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    inputs = processor(text="<video>\nHow many?", videos=[scene_video(1, 5)], return_tensors="pt")
    side = shape.get("image_size", 56)
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, side, side)
    with torch.no_grad():
        rows = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
    placeholders = (inputs["input_ids"] == model.config.video_token_id).sum().item()
    assert placeholders == rows.shape[1] == 5 * 16 + 1  # a 7 x 7 or 8 x 8 grid pooled to 4 x 4


def test_the_chat_template_puts_media_before_text(sample: Callable[..., Sample]):
    tiny = sample(**SMALL)
    parts = [{"type": "text", "text": "Who?"}, {"type": "video"}, {"type": "image"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    text = tiny.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system \nBe brief.<|im_end|><|im_start|>user <image><video>\nWho?<|im_end|><|im_start|>assistant\n"
    )


def test_the_tokenizer_reads_any_text_and_knows_its_special_tokens(sample: Callable[..., Sample]):
    tokenizer = sample(**SMALL).processor.tokenizer
    text = "A café, 20 km away: naïve?\n\n\N{PARTY POPPER}"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    assert [tokenizer(token).input_ids for token in specials] == [[507], [508], [509], [510], [511]]
    assert len(tokenizer) == sample(**SMALL).model.config.text_config.vocab_size
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("<video>no<|im_end|>").input_ids, skip_special_tokens=True) == "no"


@pytest.mark.parametrize("shape", [{"seed": 0}, {"seed": 1}, {"seed": 2, "layers": 4}, {"seed": 3, "layers": 12}])
def test_answers_vary_and_depend_on_the_video(sample: Callable[..., Sample], shape):
    tiny = sample(**shape)
    answers = [plain_tokens(tiny, seed) for seed in (1, 2)]
    for tokens, logprobs in answers:
        assert len(set(tokens)) >= 12
        assert max(tokens) < 507  # no special token: nothing ends an answer by chance
        best = logprobs.exp().max(-1).values
        assert 0.1 < best.mean() < 0.7  # neither a coin toss nor a certainty
    assert answers[0][0][:6] != answers[1][0][:6]
    assert (answers[0][1][0] - answers[1][1][0]).abs().max() > 0.5


def test_attention_tells_visual_tokens_apart(sample: Callable[..., Sample]):
    """Some tokens of a video score several times the median, in every layer: selection is no coin toss."""
    tiny = sample(seed=0)
    ids = torch.tensor(tiny.prompt_ids())
    inputs = tiny.processor(text=tiny.processor.tokenizer.decode(ids), videos=[scene_video(1, 8)], return_tensors="pt")
    visual = (inputs["input_ids"][0] == tiny.model.config.video_token_id).nonzero().flatten()
    with torch.no_grad():
        layers = tiny.model(**inputs, output_attentions=True).attentions
    for attention in layers:
        scores = attention[0][:, visual[-1] + 1 :][:, :, visual].mean((0, 1))
        assert scores.max() > 2 * scores.median() > 3 * scores.min()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_frames_of_different_scenes_have_different_features(sample: Callable[..., Sample], seed):
    tiny = sample(seed=seed, layers=3)
    scenes = [scene_video(10 + n, 2, scenes=1) for n in range(6)]
    with torch.no_grad():
        vectors = [stage1.features(tiny.model, tiny.pixels(scene)).mean((1, 2)) for scene in scenes]
    within = [stage1.cosine(pair[0], pair[1]).item() for pair in vectors]
    across = [stage1.cosine(a[1], b[0]).item() for a, b in pairwise(vectors)]
    assert min(within) > max(across) + 0.1


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_aligner_is_a_pair_of_towers_that_tells_texts_and_frames_apart(tmp_path: Path, kind):
    folder = build_checkpoint(tmp_path, aligner=kind, **SMALL) / ALIGNER_FOLDER
    towers, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == ALIGNER_WINDOW == towers.config.text_config.max_position_embeddings
    texts = tokenizer(["Who sings?", "Where is the dog?"], padding="max_length", return_tensors="pt")
    assert texts["input_ids"].shape == (2, ALIGNER_WINDOW)
    frames = processor.image_processor(list(scene_video(1, 4)), return_tensors="pt")
    with torch.no_grad():
        read = towers.get_text_features(input_ids=texts["input_ids"]).pooler_output
        seen = towers.get_image_features(pixel_values=frames["pixel_values"]).pooler_output
    assert read.shape[1] == seen.shape[1]
    assert torch.cosine_similarity(read[0], read[1], dim=0) < 0.95
    assert torch.cosine_similarity(seen[:1], seen[1:]).min() < 0.95


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"hidden": 100}, "hidden"), ({"kv_heads": 3}, "kv_heads"), ({"aligner": "blip"}, "aligner")],
)
def test_impossible_shapes_are_refused(tmp_path: Path, wrong, says):
    with pytest.raises(ValueError, match=says):
        build_checkpoint(tmp_path, **wrong)
