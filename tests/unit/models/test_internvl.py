"""InternVL3 without a model: text of the frames, counts, what is read and refused, in both formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.interns1 import InternS1ForConditionalGeneration
from vllm.model_executor.models.internvl import InternVLChatModel
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

import metok_vllm
from metok_vllm.contract.fields import FRAME_TEXT_FIELD, PIXELS_FIELD, PLAN_FIELD
from metok_vllm.contract.frame_text import of_field
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.demo.checkpoint import ALIGNER_FOLDER, build_checkpoint
from metok_vllm.demo.internvl_chat_checkpoint import build_internvl_chat_checkpoint
from metok_vllm.demo.internvl_checkpoint import build_internvl_checkpoint
from metok_vllm.models.internvl import InternVLTower, side_of
from metok_vllm.models.internvl_chat import MetokInternVLChatModel

# Writer, side of a frame's grid, placeholder of a visual token, stock model, what reading the config takes.
FORMATS: dict[str, tuple[Callable[..., Path], int, str, Any, dict[str, Any]]] = {
    "internvl": (build_internvl_checkpoint, 5, "<video>", InternS1ForConditionalGeneration, {}),
    "internvl-chat": (
        *(build_internvl_chat_checkpoint, 4, "<|video_pad|>", InternVLChatModel, {"trust_remote_code": True}),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: build(tmp_path_factory.mktemp(name), layers=3) for name, (build, *_) in FORMATS.items()}


def engine_args(folder: Path, **options: Any) -> Any:
    shared: dict[str, Any] = {"dtype": "float32", "max_model_len": 2048, "block_size": 32, "enforce_eager": True}
    return EngineArgs(model=str(folder), **{**shared, **options}).create_engine_config()


def config_of(folders: dict[str, Path], name: str, metok: dict[str, Any] | None = None, **options: Any) -> Any:
    return engine_args(folders[name], **metok_vllm.enable(**(metok or {})), **FORMATS[name][-1], **options)


@pytest.fixture(scope="module", params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(folders: dict[str, Path], kind: str) -> Any:
    return config_of(folders, kind)


def film(frames: int, side: int = 40) -> Any:
    return np.zeros((frames, side, side, 3), np.uint8)


def processed(config: Any, videos: list[Any], prompt: str = "<video>\n", **kwargs: Any) -> Any:
    """By the processor of a configuration, or by one that is there already."""
    is_one = isinstance(config, BaseMultiModalProcessor)
    processor = config if is_one else MULTIMODAL_REGISTRY.create_processor(config.model_config)
    text = f"<|im_start|>user\n{prompt * len(videos)}What?<|im_end|>\n<|im_start|>assistant\n"
    return processor(text, processor.info.parse_mm_data({"video": videos}), hf_processor_mm_kwargs=kwargs)


@pytest.mark.parametrize("frames", [1, 2, 12, 101])
def test_the_text_of_the_frames_is_stocks(config: Any, kind: str, frames: int) -> None:
    """METok off the prompt is stock vLLM's own; on, its text is in the field, and the video is a lump."""
    placeholder, stock_class = FORMATS[kind][2:4]
    ours = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    stock = processed(stock_class._processor_factory.build_processor(ours.info.ctx), [film(frames)])["prompt_token_ids"]
    assert processed(config, [film(frames)], metok="off")["prompt_token_ids"] == stock
    result = processed(config, [film(frames)])
    (item,), (place,) = result["mm_kwargs"]["video"], result["mm_placeholders"]["video"]
    tokenizer = ours.info.get_tokenizer()
    visual = tokenizer.convert_tokens_to_ids(placeholder)
    written = [token for token in stock if token != visual]
    plan = VideoPlan.from_tensor(item[PLAN_FIELD].data)
    laid = of_field(item[FRAME_TEXT_FIELD].data, plan.frames)
    start = place.offset
    assert written == [
        *stock[:start],
        *laid.ids.tolist(),
        *stock[len(stock) - (len(written) - start - len(laid.ids)) :],
    ]
    assert tokenizer.decode(laid.ids[: laid.before[0]]) == "Frame1: <img>"
    assert laid.behind.tolist() == [1] * frames
    side = FORMATS[kind][1]
    assert (plan.frames, plan.stock_tokens, plan.text_tokens) == (frames, frames * side**2, len(laid.ids))
    assert result["prompt_token_ids"][start : start + place.length] == [visual] * plan.tokens


def test_videos_are_counted_one_by_one(config: Any, kind: str) -> None:
    side = FORMATS[kind][1]
    plans = [
        VideoPlan.from_tensor(item[PLAN_FIELD].data)
        for item in processed(config, [film(3), film(40, 90)])["mm_kwargs"]["video"]
    ]
    assert [plan.stock_tokens for plan in plans] == [3 * side**2, 40 * side**2]
    assert all(plan.strides == (1, 2, 4) for plan in plans)


def test_the_published_sizes_give_16_by_16() -> None:
    vision = {"image_size": 448, "patch_size": 14}
    for sizes in (vision, {"image_size": [448, 448], "patch_size": (14, 14)}):
        assert side_of(SimpleNamespace(downsample_ratio=0.5, vision_config=SimpleNamespace(**sizes))) == 16


def test_what_the_config_comes_to(config: Any, kind: str) -> None:
    assert config.model_config.architectures[0].startswith("METokInternVL")
    assert server_choices(config.model_config.hf_config).settings.strides == (1, 2, 4)
    assert not config.model_config.uses_mrope


@pytest.mark.parametrize("language", ["gpt_oss", "internlm2"])
def test_other_language_models_are_refused(
    folders: dict[str, Path], kind: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads their configs; METok does not know how their layers are called."""
    from metok_vllm.frontend import startup

    honest = startup._refuse_model

    def another(model_config: Any) -> None:
        monkeypatch.setattr(model_config.hf_text_config, "model_type", language)
        honest(model_config)

    monkeypatch.setattr(startup, "_refuse_model", another)
    stock = {"internvl": "InternVLForConditionalGeneration", "internvl-chat": "InternVLChatModel"}[kind]
    can = {"internvl": "qwen2, qwen3, qwen3_moe, llama", "internvl-chat": "qwen2, qwen3, qwen3_moe"}[kind]
    with pytest.raises(ValueError, match="METok cannot serve") as refused:
        config_of(folders, kind)
    assert f"METok cannot serve a {stock} with the language model {language}; it can serve it with: {can}." in str(
        refused.value
    )


def test_a_tokenizer_without_a_token_for_videos_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["internvl-chat"], tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text()
        assert "<|video_pad|>" in text
        (folder / name).write_text(text.replace("<|video_pad|>", "<|no_video|>"))
    with pytest.raises(ValueError, match="METok: the processor of") as refused:
        engine_args(folder, trust_remote_code=True, **metok_vllm.enable())
    assert (
        f"METok: the processor of {folder} cannot be loaded: its tokenizer has no token with which vLLM would write "
        "videos (<|video_pad|>)." in str(refused.value)
    )


def test_a_config_read_by_its_own_code_needs_stocks_flag(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"loading .* contains custom code|trust.remote.code"):
        engine_args(folders["internvl-chat"], **metok_vllm.enable())


def test_a_processor_that_samples_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """The frames that METok counts, and an aligner sees, would be others."""
    folder = shutil.copytree(folders["internvl"], tmp_path / "model")
    for name in ("processor_config.json", "video_preprocessor_config.json"):
        stated = json.loads((folder / name).read_text())
        stated.get("video_processor", stated).update(do_sample_frames=True, num_frames=4)
        (folder / name).write_text(json.dumps(stated))
    config = engine_args(folder, **metok_vllm.enable())
    with pytest.raises(
        ValueError, match=r"^METok: this checkpoint's processor takes 4 of a video's 9 frames: [^\n]*\.$"
    ):
        processed(config, [film(9)])


def test_a_dual_tower_looks_at_every_frame(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tower = build_checkpoint(tmp_path, layers=3, aligner="siglip") / ALIGNER_FOLDER
    config = config_of(folders, kind, {"aligner_model": str(tower)})
    shown = film(5)
    shown[:] = np.arange(5, dtype=np.uint8)[:, None, None, None] * 40
    (item,) = processed(config, [shown])["mm_kwargs"]["video"]
    seen = (item[PIXELS_FIELD].data.float().mean((1, 2, 3)) + 1) / 2 * 255
    assert torch.allclose(seen, torch.arange(5) * 40.0, atol=1.5)


# --- the worker ---


class Tower(InternVLTower):
    """Makes of a frame's first channel its tokens."""

    config = SimpleNamespace(
        downsample_ratio=0.5, vision_config=SimpleNamespace(image_size=[12, 12], patch_size=[2, 2])
    )

    def __init__(self) -> None:
        """Without a model."""

    def extract_feature(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, 0, ::4, ::4].flatten(1).unsqueeze(-1)


def test_each_video_gets_its_own_frames_row_by_row() -> None:
    """Of a batch whose frames lie one behind the other."""
    pixels = torch.arange(7 * 3 * 12 * 12, dtype=torch.float32).view(7, 3, 12, 12)
    fields = {"pixel_values_videos": pixels, "video_num_patches": torch.tensor([2, 4, 1])}
    for item, (first, last) in enumerate([(0, 2), (2, 6), (6, 7)]):
        found = Tower().video_features(fields, item)
        assert torch.equal(found[..., 0], pixels[first:last, 0, ::4, ::4])
        assert found.shape == (last - first, 3, 3, 1)
        assert torch.equal(Tower().stock_video(found), found.reshape(-1, 1))


def test_graphs_of_the_encoder_leave_videos_out() -> None:
    """They would bypass stage 1."""
    bare: Any = MetokInternVLChatModel.__new__(MetokInternVLChatModel)
    torch.nn.Module.__init__(bare)
    bare.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=8))
    assert bare.get_encoder_cudagraph_config().modalities == ["image"]
