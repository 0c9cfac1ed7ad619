"""Qwen2.5-VL and Qwen2-VL: positions of a whole prompt, and what is read and refused without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.transformers_utils.config import get_config
from vllm.v1.worker.encoder_cudagraph_defs import EncoderCudaGraphConfig

import metok_vllm
from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.extents import most_positions, taken
from metok_vllm.contract.fields import EXTENT_FIELD, PIXELS_FIELD, PLAN_FIELD
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.settings import RequestSettings
from metok_vllm.contract.video_plan import VideoGrid, VideoPlan, plan_video
from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, build_checkpoint
from metok_vllm.demo.qwen_checkpoint import QwenKind, build_qwen_checkpoint
from metok_vllm.frontend.checkpoint_format import register_formats
from metok_vllm.models import qwen2_5_vl
from metok_vllm.models.mrope import MropePositions
from metok_vllm.models.qwen2_5_vl import QwenModel
from metok_vllm.models.registry import FORMAT, metok_architecture
from metok_vllm.worker.requests import VideoTags
from tests.support import fakes
from tests.support.oracle import qwen as oracle
from tests.support.oracle.qwen import Pixels

KINDS: tuple[QwenKind, ...] = ("qwen2.5-vl", "qwen2-vl")
IMAGE, VIDEO, MERGE, RATE = 90, 91, 2, 2
CONFIG = SimpleNamespace(
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_config=SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=RATE),
)


class Stock:
    """vLLM's own positions, without a model."""

    config = CONFIG
    iter_mm_grid_thw = Qwen2_5_VLForConditionalGeneration.iter_mm_grid_thw
    get_mrope_input_positions = Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions


class Pruning(MropePositions, Stock):
    """The same with METok in front."""


Item = tuple[str, int, int, int, float, list[int] | None]
"""Modality, frames, rows, columns, seconds between frames; tiers of the frames, None where unpruned."""

SETTINGS = RequestSettings(strides=(1, 2, 4))


@st.composite
def prompts(draw: st.DrawFn, prunes: bool) -> tuple[list[int], list[Item]]:
    """Lengths of text before, between and behind the items, and the items."""
    items: list[Item] = []
    for _ in range(draw(st.integers(0, 3))):
        rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        if draw(st.booleans()):
            items.append(("image", 1, rows, columns, 1.0, None))
            continue
        frames = draw(st.integers(1, 6))
        # What float32 holds, as it travels.
        seconds = float(np.float32(draw(st.floats(0.01, 20))))
        tiers = draw(st.lists(st.integers(0, 2), min_size=frames, max_size=frames))
        items.append(("video", frames, rows, columns, seconds, tiers if prunes and draw(st.booleans()) else None))
    texts = [draw(st.integers(0, 4)) for _ in items]
    return [*texts, draw(st.integers(1, 4))], items


def tokens_of(item: Item) -> list[tuple[int, int]]:
    """Frame and stride of each of an item's tokens."""
    _, frames, rows, columns, _, tiers = item
    strides = [1] * frames if tiers is None else [SETTINGS.strides[tier] for tier in tiers]
    return [
        (frame, stride)
        for frame, stride in enumerate(strides)
        for _ in range(math.ceil(rows / stride) * math.ceil(columns / stride))
    ]


def features_of(texts: list[int], items: list[Item]) -> tuple[list[int], list[Any]]:
    """The prompt's ids and its features; the plan states what the positions need of it."""
    ids: list[int] = []
    features = []
    for text, item in zip(texts, items, strict=False):
        modality, frames, rows, columns, seconds, tiers = item
        ids += [5] * text
        length = len(tokens_of(item))
        fields: dict[str, Any] = {f"{modality}_grid_thw": torch.tensor([frames, rows * MERGE, columns * MERGE])}
        if modality == "video":
            grid = VideoGrid(frames, rows, columns)
            settings = None if tiers is None else SETTINGS
            plan = plan_video(grid, PoolStyle("average", "none"), frames * rows * columns, settings, "none")
            fields |= {"second_per_grid_ts": torch.tensor(seconds), PLAN_FIELD: plan.to_tensor()}
        place = PlaceholderRange(len(ids), length)
        features.append(MultiModalFeatureSpec(fakes.item(fields), modality, f"{len(ids)}", place))
        ids += [IMAGE if modality == "image" else VIDEO] * length
    return [*ids, *[5] * texts[-1]], features


@given(prompts(prunes=False))
def test_with_metok_off_positions_are_stocks(prompt: tuple[list[int], list[Item]]) -> None:
    ids, features = features_of(*prompt)
    ours, theirs = (which().get_mrope_input_positions(ids, features) for which in (Pruning, Stock))
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]


@given(prompts(prunes=True))
def test_positions_are_the_oracles_once_the_tiers_are_known(prompt: tuple[list[int], list[Item]]) -> None:
    texts, items = prompt
    ids, features = features_of(texts, items)
    model = Pruning()
    positions, delta = model.get_mrope_input_positions(ids, features)
    pruned = [(f, i) for f, i in zip(features, items, strict=True) if i[5] is not None]
    axes = model.video_axes(features, torch.device("cpu"))
    assert len(axes) == len(pruned)
    for (feature, item), of_video in zip(pruned, axes, strict=True):
        frame, stride = (torch.tensor(column) for column in zip(*tokens_of(item), strict=True))
        tier = torch.tensor([SETTINGS.strides.index(int(one)) for one in stride])
        tags = VideoTags(torch.zeros_like(frame), torch.ones_like(frame, dtype=torch.bool), frame, tier)
        start = feature.mm_position.offset
        positions[:, start : start + feature.mm_position.length] = of_video.positions(tags)

    grids = [torch.tensor([[item[1], item[2] * MERGE, item[3] * MERGE]]) for item in items]
    videos, strides = [], []
    for item, grid in zip(items, grids, strict=True):
        if item[0] == "video":
            videos.append(Pixels(torch.empty(0), grid, item[4]))
            strides.append([1 if item[5] is None else SETTINGS.strides[tier] for tier in item[5] or [0] * item[1]])
    pictures = [grid for item, grid in zip(items, grids, strict=True) if item[0] == "image"]
    images = (torch.empty(0), torch.cat(pictures)) if pictures else None
    expected, upcoming = oracle.rotary(SimpleNamespace(config=CONFIG), ids, videos, images, strides)
    assert torch.equal(positions, expected)
    assert delta == upcoming - len(ids)


def test_text_behind_a_pruned_video_stands_where_it_would_unpruned() -> None:
    shapes: list[list[Item]] = [[("video", 4, 5, 7, 1.0, tiers)] for tiers in (None, [0, 2, 2, 2])]
    behind = []
    for items in shapes:
        ids, features = features_of([3, 6], items)
        positions, delta = Pruning().get_mrope_input_positions(ids, features)
        behind.append(positions[:, -6:])
        assert int(positions[0, -1]) + 1 == len(ids) + delta
    assert torch.equal(*behind)


# --- before any model is built ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("qwen")
    return {kind: build_qwen_checkpoint(where / kind, kind, layers=4) for kind in KINDS}


def config_of(folder: Path, **options: Any) -> Any:
    arguments = {**metok_vllm.enable(**options.pop("metok", {})), **options}
    return EngineArgs(model=str(folder), dtype="float32", max_model_len=1024, **arguments).create_engine_config()


@pytest.fixture(scope="module")
def configs(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: config_of(folder) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_sampling_are_the_familys(configs: dict[str, Any], kind: str) -> None:
    config = configs[kind].model_config
    assert server_choices(config.hf_config).settings.strides == (1, 2, 4)
    video = config.get_multimodal_config().media_io_kwargs["video"]
    assert video == {"video_backend": "metok", "sampling": "qwen2_vl", "fps": 2, "num_frames": -1}


def test_what_is_stated_goes_before_the_familys(folders: dict[str, Path]) -> None:
    stated = {"video": {"num_frames": 16}}
    config = config_of(folders["qwen2.5-vl"], metok={"strides": [2, 4, 4]}, media_io_kwargs=stated).model_config
    assert server_choices(config.hf_config).settings.strides == (2, 4, 4)
    video = config.get_multimodal_config().media_io_kwargs["video"]
    assert video == {"video_backend": "metok", "sampling": "qwen2_vl", "num_frames": 16}


COSMOS_REASON1: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "hidden_size": 1280,
        "in_chans": 3,
        "model_type": "qwen2_5_vl",
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "torch_dtype": "bfloat16",
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
    "vocab_size": 152064,
}
"""In the form in which Qwen2.5-VL-7B and what is trained from it were published."""


def test_cosmos_reason1_is_qwen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(COSMOS_REASON1))
    register_formats()
    config = get_config(str(tmp_path), trust_remote_code=False, config_format=FORMAT)
    assert (
        metok_architecture(config.architectures, "nvidia/Cosmos-Reason1-7B")
        == "METokQwen2_5_VLForConditionalGeneration"
    )
    assert config.text_config.num_hidden_layers == 28
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert (config.vision_config.temporal_patch_size, config.vision_config.tokens_per_second) == (2, 2)


def video(frames: int, rate: float | None = 2.0, total: int | None = None, side: int = 56) -> Any:
    total = total or frames
    indices = np.linspace(0, total - 1, frames, dtype=int).tolist()
    metadata = {"fps": rate, "total_num_frames": total, "frames_indices": indices, "do_sample_frames": False}
    return np.zeros((frames, side, side, 3), np.uint8), metadata


def processed(config: Any, videos: list[Any], **kwargs: Any) -> Any:
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    prompt = "<|im_start|>user\n" + "<|vision_start|><|video_pad|><|vision_end|>" * len(videos)
    items = processor.info.parse_mm_data({"video": videos})
    return processor(f"{prompt}What?<|im_end|>\n<|im_start|>assistant\n", items, hf_processor_mm_kwargs=kwargs)


def test_frames_count_in_pairs(configs: dict[str, Any]) -> None:
    result = processed(configs["qwen2.5-vl"], [video(7), video(8, side=84)])
    plans = [VideoPlan.from_tensor(item[PLAN_FIELD].data) for item in result["mm_kwargs"]["video"]]
    assert [plan.frames for plan in plans] == [4, 4]
    assert [plan.stock_tokens for plan in plans] == [4 * 2 * 2, 4 * 3 * 3]
    assert all(plan.strides == (1, 2, 4) for plan in plans)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"fps": 0}, "METok: this model must know a video's frame rate, and this one does not tell it."),
        ({"fps": float("nan")}, "METok: this model must know a video's frame rate, and this one does not tell it."),
        ({"fps": "2"}, "METok: this model must know a video's frame rate, and this one does not tell it."),
        ({"total_num_frames": 0}, "METok: a video of 0 frames (total_num_frames) cannot be placed in time."),
        ({"frames_indices": [0]}, "METok: a video has 4 frames and 1 frames_indices in its metadata."),
        (
            {"fps": 0.00001},
            "METok: the request has a video with 400001 positions in time, and this model has 130048: send a shorter "
            "one, or fewer.",
        ),
    ],
)
def test_videos_that_cannot_be_placed_in_time(configs: dict[str, Any], changed: dict[str, Any], sentence: str) -> None:
    frames, metadata = video(4)
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the whole sentence is compared
        processed(configs["qwen2.5-vl"], [(frames, {**metadata, **changed})])
    assert str(refused.value) == sentence


def test_videos_that_reach_too_far_together(configs: dict[str, Any]) -> None:
    """The front end has the data of new ones alone; the scheduler adds all of them up."""
    config = configs["qwen2.5-vl"]
    most = most_positions(config.model_config)
    assert most == 4 * 32768 - 1024
    result = processed(config, [video(4, rate=0.00004), video(4, rate=0.00004, side=84)])
    features = [
        MultiModalFeatureSpec(item, "video", "name", place)
        for item, place in zip(result["mm_kwargs"]["video"], result["mm_placeholders"]["video"], strict=True)
    ]
    assert taken(features[:1]) == int(features[0].data[EXTENT_FIELD].data) == 100_001
    assert taken(features[:1]) <= most < taken(features)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_refused(configs: dict[str, Any], kind: str) -> None:
    sent = {"video_embeds": torch.zeros(4, 128), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    config = configs[kind].model_config
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    items = processor.info.get_data_parser().parse_mm_data({"video": sent})
    with pytest.raises(ValueError, match=r"^METok: precomputed video embeddings are not supported"):
        processor("<|video_pad|>What?", items)


def test_a_dual_tower_looks_at_the_first_frame_of_each_pair(folders: dict[str, Path], tmp_path: Path) -> None:
    tower = build_checkpoint(tmp_path, layers=3, aligner="siglip") / ALIGNER_FOLDER
    config = config_of(folders["qwen2.5-vl"], metok={"aligner_model": str(tower)})
    frames, metadata = video(5)
    frames[:] = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40
    (item,) = processed(config, [(frames, metadata)])["mm_kwargs"]["video"]
    pixels = item[PIXELS_FIELD].data
    assert pixels.shape[0] == VideoPlan.from_tensor(item[PLAN_FIELD].data).frames == 3
    seen = (pixels.float().mean((1, 2, 3)) + 1) / 2 * 255
    assert torch.allclose(seen, torch.tensor([0.0, 80, 160]), atol=1.5)


def test_older_qwen_takes_frames_without_a_rate(configs: dict[str, Any]) -> None:
    result = processed(configs["qwen2-vl"], [video(4)[0]])
    assert len(result["mm_placeholders"]["video"]) == 1


def test_graphs_of_the_tower_are_for_pictures_alone() -> None:
    """They bypass `embed_multimodal`, and with it stage 1."""

    class Tower:
        def get_encoder_cudagraph_config(self) -> Any:
            return EncoderCudaGraphConfig(["image", "video"], ["pixel_values"], 128, max_frames_per_video=4)

    class Model(QwenModel, Tower):
        pass

    model: Any = object.__new__(Model)
    assert model.get_encoder_cudagraph_config().modalities == ["image"]


def test_a_tower_takes_long_videos_in_blocks_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's pixels are its own, of the right video; where ranks share the work, all in one call."""
    monkeypatch.setattr(qwen2_5_vl, "PATCHES_PER_BLOCK", 3 * 24)
    monkeypatch.setattr(qwen2_5_vl, "get_tensor_model_parallel_world_size", lambda: 4)
    calls: list[list[int]] = []

    class Tower:
        config, use_data_parallel = CONFIG, False

        def _process_video_input(self, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            grids = given["video_grid_thw"]
            calls.append(grids[:, 0].tolist())
            merged = given["pixel_values_videos"].view(-1, 4, 1).mean(1)
            return merged.split((grids.prod(1) // 4).tolist())

    class Model(QwenModel, Tower):
        pass

    grids = torch.tensor([[2, 4, 4], [8, 4, 6]])
    pixels = torch.arange(2 * 16 + 8 * 24, dtype=torch.float32)[:, None]
    fields = {"video_grid_thw": grids, "pixel_values_videos": pixels}
    expected = pixels[32:].view(-1, 4).mean(1).view(8, 2, 3, 1)
    for shared, blocks in ((False, [[3], [3], [2]]), (True, [[2, 2, 2, 2]])):
        model: Any = object.__new__(Model)
        model.use_data_parallel = shared
        calls.clear()
        assert torch.equal(model.video_features(fields, 1), expected)
        assert calls == blocks
        assert torch.equal(model.stock_video(expected), expected.view(-1, 1))
