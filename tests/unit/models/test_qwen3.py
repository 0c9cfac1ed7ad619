"""Qwen3-VL: positions of a whole prompt, text of the frames, what is read and refused without a model."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.multimodal.video import Qwen3VLVideoBackend

import metok_vllm
from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.extents import most_positions, taken
from metok_vllm.contract.fields import FRAME_TEXT_FIELD, PIXELS_FIELD, PLAN_FIELD
from metok_vllm.contract.frame_text import FrameText, of_field, text_tokens, to_field
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.settings import RequestSettings
from metok_vllm.contract.video_plan import VideoGrid, VideoPlan, plan_video
from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, build_checkpoint
from metok_vllm.demo.qwen3_checkpoint import TOKEN, Qwen3Kind, build_qwen3_checkpoint
from metok_vllm.media.loader import MetokVideoLoader
from metok_vllm.models.qwen3_vl import Qwen3Model
from metok_vllm.models.registry import QWEN3_SAMPLING
from metok_vllm.worker.requests import VideoTags
from tests.support import fakes
from tests.support.clips import encode, numbered
from tests.support.oracle import qwen3 as oracle

KINDS: tuple[Qwen3Kind, ...] = get_args(Qwen3Kind)
IMAGE, VIDEO, START, END, MERGE = 90, 91, 92, 93, 2
CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    vision_config=SimpleNamespace(spatial_merge_size=MERGE),
)


class Letters:
    """A tokenizer: as many tokens as letters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text if ord(letter) not in (IMAGE, VIDEO, START, END)]


class Stock:
    """vLLM's own positions, without a model."""

    config, _tokenizer = CONFIG, Letters()
    get_mrope_input_positions = Qwen3VLForConditionalGeneration.get_mrope_input_positions
    _get_mrope_input_positions = staticmethod(Qwen3VLForConditionalGeneration._get_mrope_input_positions)


class Pruning(Qwen3Model, Stock):
    """The same with METok in front."""

    def __init__(self) -> None:
        """Without a model."""


Item = tuple[str, int, int, list[float], list[int] | None]
"""Modality, rows, columns, seconds of each frame; tiers of the frames, None where unpruned."""

SETTINGS = RequestSettings(strides=(1, 2, 4))


@st.composite
def prompts(draw: st.DrawFn, prunes: bool) -> tuple[list[int], list[Item]]:
    """Lengths of text before, between and behind the items, and the items."""
    items: list[Item] = []
    for _ in range(draw(st.integers(0, 3))):
        rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        if draw(st.booleans()):
            items.append(("image", rows, columns, [0.0], None))
            continue
        seconds = draw(st.lists(st.floats(0, 2000), min_size=1, max_size=6))
        tiers = draw(st.lists(st.integers(0, 2), min_size=len(seconds), max_size=len(seconds)))
        items.append(("video", rows, columns, seconds, tiers if prunes and draw(st.booleans()) else None))
    texts = [draw(st.integers(0, 4)) for _ in items]
    return [*texts, draw(st.integers(1, 4))], items


def texts_of(item: Item) -> list[FrameText]:
    if item[0] == "image":
        return [FrameText()]
    return [FrameText((*Letters().encode(f"<{one:.1f} seconds>"), START), (END,)) for one in item[3]]


def counts_of(item: Item) -> list[int]:
    """Visual tokens of each frame."""
    _, rows, columns, seconds, tiers = item
    strides = [1] * len(seconds) if tiers is None else [SETTINGS.strides[tier] for tier in tiers]
    return [math.ceil(rows / stride) * math.ceil(columns / stride) for stride in strides]


def features_of(texts: list[int], items: list[Item]) -> tuple[list[int], list[Any]]:
    """The prompt's ids and its features: of a pruned video placeholders alone, else what stock writes."""
    ids: list[int] = []
    features = []
    for text, item in zip(texts, items, strict=False):
        modality, rows, columns, seconds, tiers = item
        ids += [5] * text
        token = IMAGE if modality == "image" else VIDEO
        labels, counts = texts_of(item), counts_of(item)
        own = [i for label, n in zip(labels, counts, strict=True) for i in (*label.before, *[token] * n, *label.behind)]
        fields: dict[str, Any] = {f"{modality}_grid_thw": torch.tensor([len(seconds), rows * MERGE, columns * MERGE])}
        if modality == "video":
            grid = VideoGrid(len(seconds), rows, columns)
            stock, settings = len(seconds) * rows * columns, None if tiers is None else SETTINGS
            inside = 0 if tiers is None else text_tokens(labels)
            plan = plan_video(grid, PoolStyle("average", "none"), stock, settings, "none", inside)
            fields |= {PLAN_FIELD: plan.to_tensor(), "timestamps": seconds}
            if tiers is not None:
                fields[FRAME_TEXT_FIELD] = to_field(labels)
        features.append(
            MultiModalFeatureSpec(fakes.item(fields), modality, f"{len(ids)}", PlaceholderRange(len(ids), len(own)))
        )
        ids += own if tiers is None else [token] * len(own)
    return [*ids, *[5] * texts[-1]], features


@given(prompts(prunes=False))
def test_with_metok_off_positions_are_stocks(prompt: tuple[list[int], list[Item]]) -> None:
    ids, features = features_of(*prompt)
    ours, theirs = (which().get_mrope_input_positions(ids, features) for which in (Pruning, Stock))
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


@given(prompts(prunes=True))
def test_positions_are_the_oracles_once_the_tiers_are_known(prompt: tuple[list[int], list[Item]]) -> None:
    """And stock's where a video is not pruned beside others that are."""
    texts, items = prompt
    ids, features = features_of(texts, items)
    model = Pruning()
    positions, delta = model.get_mrope_input_positions(ids, features)
    pruned = [(f, i) for f, i in zip(features, items, strict=True) if i[4] is not None]
    axes = model.video_axes(features, torch.device("cpu"))
    assert len(axes) == len(pruned)
    for (feature, item), of_video in zip(pruned, axes, strict=True):
        labels, counts = texts_of(item), counts_of(item)
        frame = torch.tensor([f for f, n in enumerate(counts) for _ in range(n)])
        is_text = [
            one
            for label, n in zip(labels, counts, strict=True)
            for one in [True] * len(label.before) + [False] * n + [True] * len(label.behind)
        ]
        place = torch.tensor([i for i, text in enumerate(is_text) if not text])
        tier = torch.tensor(item[4])[frame]
        tags = VideoTags(torch.zeros_like(frame), torch.ones_like(frame, dtype=torch.bool), frame, tier, place)
        start = feature.mm_position.offset
        positions[:, start : start + feature.mm_position.length] = of_video.positions(tags)

    grids = [torch.tensor([[len(item[3]), item[1] * MERGE, item[2] * MERGE]]) for item in items]
    videos, strides = [], []
    for item, grid in zip(items, grids, strict=True):
        if item[0] == "video":
            text = [(list(label.before), list(label.behind)) for label in texts_of(item)]
            videos.append(oracle.Pixels(torch.empty(0), grid, text))
            strides.append([SETTINGS.strides[tier] for tier in item[4] or [0] * len(item[3])])
    pictures = [grid for item, grid in zip(items, grids, strict=True) if item[0] == "image"]
    images = (torch.empty(0), torch.cat(pictures)) if pictures else None
    lumps = list(ids)
    for feature in features:  # the oracle finds an item by its first placeholder
        token = VIDEO if feature.modality == "video" else IMAGE
        lumps[feature.mm_position.offset : feature.mm_position.offset + feature.mm_position.length] = [
            token
        ] * feature.mm_position.length
    expected, upcoming = oracle.rotary(SimpleNamespace(config=CONFIG), lumps, videos, images, strides)
    assert torch.equal(positions, expected)
    assert delta == upcoming - len(ids)


def test_tags_of_another_video_under_the_same_name_stay_inside_the_table() -> None:
    """A client may give one uuid to two videos; the encoder's output is then the first's."""
    _, features = features_of([1, 1], [("video", 2, 2, [0.0, 1.0], [0, 0])])
    (axes,) = Pruning().video_axes(features, torch.device("cpu"))
    frame = torch.arange(30)
    tags = VideoTags(frame, frame > 0, frame, torch.zeros_like(frame), frame)
    assert int(axes.positions(tags).max()) < 200


# --- before any model is built ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("qwen3")
    return {kind: build_qwen3_checkpoint(where / kind, kind, layers=4, deepstack=(1, 3)) for kind in KINDS}


def engine_args(folder: Path, **options: Any) -> Any:
    return EngineArgs(model=str(folder), dtype="float32", max_model_len=1024, **options).create_engine_config()


def config_of(folder: Path, **options: Any) -> Any:
    return engine_args(folder, **metok_vllm.enable(prune_layers=[2, 3, 4], **options.pop("metok", {})), **options)


@pytest.fixture(scope="module")
def config(folders: dict[str, Path]) -> Any:
    return config_of(folders["qwen3-vl"])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_sampling_are_the_familys(folders: dict[str, Path], kind: str) -> None:
    model = config_of(folders[kind]).model_config
    assert server_choices(model.hf_config).settings.strides == (1, 2, 4)
    video = model.get_multimodal_config().media_io_kwargs["video"]
    assert video == {"video_backend": "metok", "sampling": "qwen3_vl", "fps": 2, "num_frames": -1}


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_comes_behind_deepstack(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(ValueError, match="behind its first 2 layers") as refused:
        engine_args(folders[kind], **metok_vllm.enable(prune_layers=[1, 2, 3]))
    assert (
        "METok (additional_config): this model adds to its visual tokens behind its first 2 layers, so the first of "
        "prune_layers must be 2 or more, not 1." in str(refused.value)
    )


@pytest.mark.parametrize("options", [{"data_parallel_size": 2}, {"enable_expert_parallel": True}])
def test_experts_are_served_under_tensor_parallelism_alone(folders: dict[str, Path], options: dict[str, Any]) -> None:
    folder = folders["qwen3-vl-moe"]
    assert config_of(folder, tensor_parallel_size=2).model_config.is_moe
    with pytest.raises(ValueError, match="METok does not support a mixture of experts with data or expert") as refused:
        config_of(folder, tensor_parallel_size=2, **options)
    assert (
        "METok does not support a mixture of experts with data or expert parallelism: "
        "use --tensor-parallel-size instead of --data-parallel-size and --enable-expert-parallel." in str(refused.value)
    )


def video(frames: int, rate: float | None = 2.0, total: int | None = None, side: int = 2 * TOKEN) -> Any:
    total = total or frames
    indices = np.linspace(0, total - 1, frames, dtype=int).tolist()
    metadata = {"fps": rate, "total_num_frames": total, "frames_indices": indices, "do_sample_frames": False}
    return np.zeros((frames, side, side, 3), np.uint8), metadata


def processed(config: Any, videos: list[Any], **kwargs: Any) -> Any:
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    prompt = "<|im_start|>user\n" + "<|vision_start|><|video_pad|><|vision_end|>" * len(videos)
    items = processor.info.parse_mm_data({"video": videos})
    return processor(f"{prompt}What?<|im_end|>\n<|im_start|>assistant\n", items, hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "7", "3/2", "60000/1001"])
@pytest.mark.parametrize("frames", [2, 5, 61, 231])
def test_the_prompt_is_stocks_for_videos_of_any_rate(
    folders: dict[str, Path], config: Any, rate: str, frames: int
) -> None:
    """From the file on: the same frames by METok's loader, the same times in the prompt."""
    file = encode((numbered(number) for number in range(frames)), rate=Fraction(rate))
    loaded = MetokVideoLoader.load_bytes(file, **QWEN3_SAMPLING)
    theirs = Qwen3VLVideoBackend.load_bytes(file)
    assert loaded[1]["frames_indices"] == theirs[1]["frames_indices"]
    assert loaded[1]["fps"] == pytest.approx(theirs[1]["fps"])
    stock = processed(engine_args(folders["qwen3-vl"]), [theirs])["prompt_token_ids"]
    off = processed(config, [loaded], metok="off")
    assert off["prompt_token_ids"] == stock
    tokenizer = MULTIMODAL_REGISTRY.create_processor(config.model_config).info.get_tokenizer()
    text = tokenizer.decode(stock)
    result = processed(config, [loaded])
    (item,), (place,) = result["mm_kwargs"]["video"], result["mm_placeholders"]["video"]
    plan = VideoPlan.from_tensor(item[PLAN_FIELD].data)
    laid = of_field(item[FRAME_TEXT_FIELD].data, plan.frames)
    written = tokenizer.decode(laid.ids)
    assert written == text[text.index("<|vision_start|>") + 16 : text.rindex("<|vision_end|>")].replace(
        "<|video_pad|>", ""
    )
    assert laid.behind.tolist() == [1] * plan.frames
    assert plan.text_tokens == len(laid.ids)
    ids = result["prompt_token_ids"][place.offset : place.offset + place.length]
    assert ids == [config.model_config.hf_config.video_token_id] * plan.tokens


def test_frames_count_in_pairs(config: Any) -> None:
    result = processed(config, [video(7), video(8, side=3 * TOKEN)])
    plans = [VideoPlan.from_tensor(item[PLAN_FIELD].data) for item in result["mm_kwargs"]["video"]]
    assert [plan.frames for plan in plans] == [4, 4]
    assert [plan.stock_tokens for plan in plans] == [4 * 2 * 2, 4 * 3 * 3]


def test_positions_are_counted_with_the_text(config: Any) -> None:
    """Of a pair: its text, and the larger of its rows and columns."""
    result = processed(config, [video(8), video(2, total=900)])
    features = [
        MultiModalFeatureSpec(item, "video", "name", place)
        for item, place in zip(result["mm_kwargs"]["video"], result["mm_placeholders"]["video"], strict=True)
    ]
    plans = [VideoPlan.from_tensor(item[PLAN_FIELD].data) for item in result["mm_kwargs"]["video"]]
    assert taken(features) == sum(plan.text_tokens + 2 * plan.frames for plan in plans)
    assert most_positions(config.model_config) == 4 * 32768 - 1024


NO_RATE = "METok: this model must know a video's frame rate, and this one does not tell it."


@pytest.mark.parametrize(
    ("frames", "changed", "sentence"),
    [
        (4, {"fps": 0}, NO_RATE),
        (4, {"fps": float("nan")}, NO_RATE),
        (4, {"fps": None}, "METok: this model reads when a video's frames are, and this one has no fps."),
        (
            4,
            {"frames_indices": None},
            "METok: this model reads when a video's frames are, and this one has no frames_indices.",
        ),
        (4, {"frames_indices": [0]}, "METok: a video has 4 frames and 1 frames_indices in its metadata."),
        (4, {"total_num_frames": 0}, "METok: a video of 0 frames (total_num_frames) cannot be placed in time."),
        (1, {}, "METok: this model takes videos of 2 frames or more, not of 1."),
        (
            4,
            {"total_num_frames": 90, "do_sample_frames": True},
            "METok: of a video of 90 frames 4 are there, so none can be sampled from it.",
        ),
    ],
)
def test_videos_that_cannot_be_labelled(config: Any, frames: int, changed: dict[str, Any], sentence: str) -> None:
    sent, metadata = video(frames)
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the whole sentence is compared
        processed(config, [(sent, {**metadata, **changed})])
    assert str(refused.value) == sentence


def test_one_video_may_be_processed_twice(config: Any) -> None:
    """transformers writes into the list of an odd number of indices that it is given."""
    sent = video(5)
    assert processed(config, [sent])["prompt_token_ids"] == processed(config, [sent])["prompt_token_ids"]


@pytest.mark.parametrize(
    ("frames", "sampled", "seen"), [(5, False, [0, 2, 4]), (9, True, [1, 6]), (8, True, [1, 6]), (4, True, [0, 2])]
)
def test_a_dual_tower_looks_at_one_frame_of_each_pair(
    folders: dict[str, Path], tmp_path: Path, frames: int, sampled: bool, seen: list[int]
) -> None:
    """The first; or the middle one where transformers samples from the frames, here four, at 2 a second."""
    tower = build_checkpoint(tmp_path, layers=3, aligner="siglip") / ALIGNER_FOLDER
    config = config_of(folders["qwen3-vl"], metok={"aligner_model": str(tower)})
    film, metadata = video(frames, rate=frames)
    film[:] = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 25
    metadata["do_sample_frames"] = sampled
    (item,) = processed(config, [(film, metadata)])["mm_kwargs"]["video"]
    pixels = item[PIXELS_FIELD].data
    assert pixels.shape[0] == VideoPlan.from_tensor(item[PLAN_FIELD].data).frames
    shown = (pixels.float().mean((1, 2, 3)) + 1) / 2 * 255
    assert torch.allclose(shown, torch.tensor(seen) * 25.0, atol=1.5)


def test_embeddings_are_refused(config: Any) -> None:
    sent = {"video_embeds": torch.zeros(4, 128), "video_grid_thw": torch.tensor([[1, 4, 4]]), "timestamps": [[0.0]]}
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    items = processor.info.get_data_parser().parse_mm_data({"video": sent})
    with pytest.raises(ValueError, match=r"^METok: precomputed video embeddings are not supported"):
        processor("<|video_pad|>What?", items)


# --- deepstack ---


class Buffers:
    """vLLM's own buffers, without a model."""

    deepstack_num_level, multiscale_dim = 2, 6
    _get_deepstack_input_embeds = Qwen3VLForConditionalGeneration._get_deepstack_input_embeds
    _set_deepstack_input_embeds = Qwen3VLForConditionalGeneration._set_deepstack_input_embeds
    _clear_deepstack_input_embeds = Qwen3VLForConditionalGeneration._clear_deepstack_input_embeds


def test_what_the_tower_adds_is_handed_over_once() -> None:
    class Model(Qwen3Model, Buffers):
        def __init__(self) -> None:
            self.deepstack_input_embeds = [torch.zeros(8, 3) for _ in range(2)]

    model: Any = Model()
    assert model.extra_channels == 6
    with model.deepstack(8) as levels:
        assert list(levels) == []
    given = torch.randn(2, 5, 3)
    model._set_deepstack_input_embeds(given)
    with model.deepstack(6) as levels:
        assert torch.equal(torch.stack(list(levels))[:, :5], given)
        assert all(len(level) == 6 and not level[5].any() for level in levels)
    with model.deepstack(8) as levels:
        assert list(levels) == []
    assert not any(buffer.any() for buffer in model.deepstack_input_embeds)


def test_the_config_as_published_has_its_levels(tmp_path: Path, folders: dict[str, Path]) -> None:
    stated = json.loads((folders["qwen3-vl-moe"] / "config.json").read_text())
    assert stated["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert stated["vision_config"]["deepstack_visual_indexes"] == [1, 3]
