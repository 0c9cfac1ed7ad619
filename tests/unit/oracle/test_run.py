"""Whole runs of the oracle, against transformers' own forward wherever that can be made to agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, ALIGNER_WINDOW
from tests.support.oracle import OracleResult, OracleSettings, assert_same, run
from tests.support.oracle.masked import Request, check_survivors, input_rows, masked_forward
from tests.support.oracle.samples import QUESTION, Sample, greedy, picture, scene_video

STEPS = 24
PLAIN = {"seed": 1}
SHAPES = [
    PLAIN,
    {"seed": 2, "layers": 4, "heads": 4, "kv_heads": 4},
    {"seed": 3, "layers": 3, "hidden": 192, "heads": 6, "kv_heads": 1, "image_size": 48, "patch_size": 6},
]


def one_video(sample: Sample, frames: int = 12) -> Request:
    """A question about one video."""
    pixels = sample.pixels(scene_video(3, frames))
    return Request(sample.prompt_ids(), [pixels], None, sample.question_ids())


def mixed_media(sample: Sample) -> Request:
    """A question about two pictures and two videos of different length."""
    videos = [sample.pixels(scene_video(3, 9)), sample.pixels(scene_video(4, 4))]
    images = sample.image_inputs([picture(5, 60, 100), picture(6, 130, 70)])
    ids = sample.prompt_ids(videos=2, images=2, between=" and then")
    return Request(ids, videos, images, sample.question_ids())


def answer(sample: Sample, request: Request, settings: OracleSettings, **kwargs: Any) -> OracleResult:
    """The oracle's run."""
    parts = (request.prompt_ids, request.videos, request.images, request.question_ids)
    return run(sample.model, *parts, settings, STEPS, **kwargs)


@pytest.mark.parametrize("shape", SHAPES)
def test_off_is_the_plain_model(sample: Callable[..., Sample], shape):
    """With METok off, pictures and videos of different length give the logits of `generate`."""
    tiny = sample(**shape)
    request = mixed_media(tiny)
    result = answer(tiny, request, OracleSettings(off=True))

    # `generate` cannot batch videos of different length: each one's rows come from its own encoder call.
    model, ids = tiny.model, torch.tensor([result.prompt_ids])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        encoded = [model.model.get_video_features(video[None]).pooler_output[0] for video in request.videos]
        embeds[ids == model.config.video_token_id] = torch.cat(encoded)
        pictures = model.model.get_image_features(*request.images).pooler_output
        embeds[ids == model.config.image_token_id] = torch.cat(list(pictures))
    tokens, logprobs = greedy(tiny, {"inputs_embeds": embeds}, STEPS)
    assert_same(result, OracleResult(result.prompt_ids, tokens, logprobs), 1e-4)
    assert result.kv_tokens == [len(result.prompt_ids)] * len(model.model.language_model.layers)
    assert [video.strides for video in result.videos] == [[2] * 9, [2] * 4]


def test_off_equals_generate_on_the_processors_own_inputs(sample: Callable[..., Sample]):
    tiny = sample(**PLAIN)
    video, image = scene_video(3, 6), picture(5, 60, 100)
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": QUESTION}]
    text = tiny.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = dict(tiny.processor(text=text, images=[image], videos=[video], return_tensors="pt"))
    request = Request(tiny.prompt_ids(images=1), [tiny.pixels(video)], tiny.image_inputs([image]), [])
    result = answer(tiny, request, OracleSettings(off=True))
    assert_same(result, OracleResult(inputs["input_ids"][0].tolist(), *greedy(tiny, inputs, STEPS)), 1e-4)


def test_a_request_without_video_is_the_plain_model_whatever_the_settings(sample: Callable[..., Sample]):
    tiny = sample(**PLAIN)
    request = Request(tiny.prompt_ids(videos=0), [], None, tiny.question_ids())
    result = answer(tiny, request, OracleSettings())
    tokens, logprobs = greedy(tiny, {"input_ids": torch.tensor([request.prompt_ids])}, STEPS)
    assert_same(result, OracleResult(request.prompt_ids, tokens, logprobs), 1e-4)


@pytest.mark.parametrize("third", [8, 5])
def test_keeping_everything_is_off(sample: Callable[..., Sample], third: int):
    """One key event, the stock stride, no token dropped or forgotten: nothing is left of METok."""
    tiny = sample(**PLAIN)
    keep_all = OracleSettings(
        events=1,
        key_events=1,
        strides=(2, 2, 2),
        keep_ratio=1.0,
        prune_layers=(1, 2, third),
        decode_retention=1.0,
        final_keep=1.0,
        quota="video" if third == 5 else "event",
    )
    request = one_video(tiny)
    plain, kept = answer(tiny, request, OracleSettings(off=True)), answer(tiny, request, keep_all)
    assert kept.prune_layers == (1, 2, third)
    assert_same(plain, OracleResult(kept.prompt_ids, kept.tokens, kept.logprobs), 1e-5)
    assert kept.kv_positions == plain.kv_positions


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_what_passes_l3_is_seen_there_and_kept(sample: Callable[..., Sample], shape):
    tiny = sample(**shape)
    request = mixed_media(tiny)
    settings = OracleSettings(decode_retention=0.2, final_keep=0.4, quota="video", frame_smoothing=0.5)
    result = answer(tiny, request, settings)
    logprobs, _ = masked_forward(tiny, input_rows(tiny, request, settings), result)
    assert sum(len(video.after_l3) for video in result.videos) > 2
    assert_same(result, OracleResult(result.prompt_ids, result.tokens, logprobs), 1e-4)


@pytest.mark.parametrize("window", [(0, 8), (1, 4), (3, 5), (2, 8)])
def test_a_window_is_what_decoding_sees(sample: Callable[..., Sample], window):
    """Below L1 all, behind it its survivors, behind L2 those of L2, and from L3 up none."""
    tiny = sample(**SHAPES[0])
    request = mixed_media(tiny)
    settings = OracleSettings(kv_layers=window, prune_layers=(3, 4, 7))
    result = answer(tiny, request, settings)
    logprobs, _ = masked_forward(tiny, input_rows(tiny, request, settings), result)
    assert_same(result, OracleResult(result.prompt_ids, result.tokens, logprobs), 1e-4)
    visual = {p for video in result.videos for p in range(*video.span)}
    first = [p for video in result.videos for p in video.after_l1]
    second = [p for video in result.videos for p in video.after_l2]
    alive = [visual] * 3 + [first] + [second] * 3 + [[]]
    for number, held in enumerate(result.kv_positions):
        assert sorted(visual & set(held)) == (sorted(alive[number]) if number in range(*window) else [])
        assert set(range(len(result.prompt_ids))) - visual <= set(held), "all text is there"


@pytest.mark.parametrize("retention", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [one_video, mixed_media])
def test_a_run_is_one_masked_forward_of_the_plain_model(sample: Callable[..., Sample], make, shape, retention):
    """Told who is alive, transformers gives the oracle's logprobs and, by its attention, its survivors."""
    tiny = sample(**shape)
    settings = OracleSettings(decode_retention=retention)
    request = make(tiny)
    result = answer(tiny, request, settings)
    logprobs, attentions = masked_forward(tiny, input_rows(tiny, request, settings), result)
    assert_same(result, OracleResult(result.prompt_ids, logprobs.argmax(-1).tolist(), logprobs), 1e-4)

    vision = tiny.model.config.vision_config
    visual = {tiny.model.config.video_token_id, tiny.model.config.image_token_id}
    survivors: dict[int, float] = {}
    for video in result.videos:
        rows = [p for p, t in enumerate(result.prompt_ids) if p >= video.span[1] and t not in visual]
        used = [attentions[limit - 1][0] for limit in result.prune_layers[:2]]
        survivors |= check_survivors(video, used, rows, vision.image_size // vision.patch_size, 0.76)
    count = {0.0: 0, 0.5: (len(survivors) + 1) // 2, 1.0: len(survivors)}[retention]
    assert result.retained == sorted(sorted(survivors, key=lambda p: -survivors[p])[:count])


def test_kv_counts_by_layer(sample: Callable[..., Sample]):
    """12 frames: 8 of 16 tokens, 4 of 4, and 5 separators; the pruning layers of 8 layers are 1, 3 and 5."""
    tiny = sample(**PLAIN)
    request = one_video(tiny)
    text = len(request.prompt_ids) - 1
    result = answer(tiny, request, OracleSettings())
    assert len(result.prompt_ids) == text + 149
    assert result.kv_tokens == [text + 149] + [text] * 7
    half = answer(tiny, request, OracleSettings(decode_retention=0.5))
    after = len(half.videos[0].after_l2)
    assert 0 < after < len(half.videos[0].after_l1) < 149
    assert half.kv_tokens == [text + 149] + [text + (after + 1) // 2] * 4 + [text] * 3


def test_the_question_decides(sample: Callable[..., Sample]):
    """Another question moves the key frames, even where the prompt stays the same."""
    tiny = sample(**PLAIN)
    request = one_video(tiny, frames=24)
    asked = answer(tiny, request, OracleSettings(key_frames=2))
    other = tiny.question_ids("Name one colour.")
    changed = answer(tiny, Request(request.prompt_ids, request.videos, None, other), OracleSettings(key_frames=2))
    assert asked.videos[0].strides != changed.videos[0].strides
    assert asked.videos[0].events == changed.videos[0].events
    assert len(asked.prompt_ids) == len(changed.prompt_ids)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_dual_tower_alignment_on_a_real_pair_of_towers(sample: Callable[..., Sample], kind):
    tiny = sample(seed=4, layers=4, aligner=kind)
    folder = tiny.path / ALIGNER_FOLDER
    towers, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    halves = [QUESTION[:30], QUESTION[30:]]
    windows = tokenizer(halves, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert windows.shape == (2, ALIGNER_WINDOW)
    request = one_video(tiny)
    frames = torch.nn.functional.interpolate(request.videos[0], size=(48, 48), mode="bilinear")
    aligner = (towers, [frames], windows)
    result = answer(tiny, request, OracleSettings(aligner="dual-tower"), aligner=aligner)

    with torch.no_grad():
        seen = towers.get_image_features(pixel_values=frames).pooler_output
        read = [towers.get_text_features(input_ids=row[None]).pooler_output[0] for row in windows]
    expected = torch.nn.functional.cosine_similarity(seen, torch.maximum(*read)[None])
    torch.testing.assert_close(torch.tensor(result.videos[0].relevance), expected)
    assert result.videos[0].strides != answer(tiny, request, OracleSettings()).videos[0].strides


def test_forced_tokens_replace_the_answer_so_far(sample: Callable[..., Sample]):
    tiny = sample(**PLAIN)
    request = one_video(tiny)
    free = answer(tiny, request, OracleSettings(decode_retention=1.0))
    same = answer(tiny, request, OracleSettings(decode_retention=1.0), force_tokens=free.tokens)
    assert_same(free, same, 0.0)
    other = answer(tiny, request, OracleSettings(decode_retention=1.0), force_tokens=[7] * STEPS)
    assert other.tokens[0] == free.tokens[0] != 7
    assert other.tokens != free.tokens


def test_a_prompt_that_ends_in_its_video_has_no_answer(sample: Callable[..., Sample]):
    tiny = sample(**PLAIN)
    request = one_video(tiny, frames=2)
    cut = request.prompt_ids[: request.prompt_ids.index(tiny.model.config.video_token_id) + 1]
    with pytest.raises(ValueError, match="end with text"):
        answer(tiny, Request(cut, request.videos, None, []), OracleSettings())
