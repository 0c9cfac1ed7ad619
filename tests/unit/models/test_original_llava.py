"""Checkpoints in the format of LLaVA's authors: what is read of them, and what is refused in which words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig
from vllm.tokenizers.registry import cached_get_tokenizer

import metok_vllm
from metok_vllm.compression.accounting import account, expected_visual_tokens
from metok_vllm.compression.pooling import PoolStyle, tokens_per_frame
from metok_vllm.contract.kv_layout import chosen_layers
from metok_vllm.contract.settings import MetokSettings, resolve_request
from metok_vllm.contract.video_plan import VideoGrid, plan_video
from metok_vllm.demo.checkpoint import make_tokenizer
from metok_vllm.demo.original_checkpoint import SPECIALS, Kind, build_original_checkpoint
from metok_vllm.frontend.checkpoint_format import register_formats
from metok_vllm.frontend.command_line import rewritten
from metok_vllm.frontend.text_behind import with_text_behind
from metok_vllm.models.llava_qwen import MetokLlavaQwenMultiModalProcessor
from metok_vllm.models.original_llava.config import Layout, layout_of, read_config
from metok_vllm.models.original_llava.processor import build_processor
from metok_vllm.models.original_llava.weights import WEIGHTS
from metok_vllm.models.registry import FORMAT
from metok_vllm.worker.report import model_shape

KINDS = get_args(Kind)
METOK = "METokLlavaQwenForCausalLM"
CLIP = "openai/clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("originals")
    return {kind: build_original_checkpoint(where / kind, kind, layers=4) for kind in KINDS}


def stated(folder: Path, **changed: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changed}


PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e9,
    "rope_scaling": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "torch_dtype": "bfloat16",
}
"""Sizes of Qwen2-7B; what the four published configs have in common."""


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14-336", "/models/clip-vit-large-patch14-336/"])
def test_longva_as_published(name: str) -> None:
    config = read_config(
        {
            **PUBLISHED,
            "model_type": "qwen2",
            "mm_vision_tower": name,
            "mm_patch_merge_type": "unires",
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": "(1x1),...,(6x6)",
        },
        "lmms-lab/LongVA-7B",
    )
    vision = config.vision_config
    assert layout_of(config) == Layout("average", "none", "unires", tells_times=False, has_newline=False)
    assert layout_of(config).style == PoolStyle("average", "none")
    assert (vision.model_type, vision.hidden_size, vision.num_hidden_layers) == ("clip_vision_model", 1024, 24)
    assert (vision.image_size // vision.patch_size, vision.num_attention_heads) == (24, 16)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert len(config.image_grid_pinpoints) == 36
    assert [2016, 336] in config.image_grid_pinpoints
    assert config.text_config.rope_parameters["rope_theta"] == 1e9
    assert config.dtype is config.text_config.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "separators", "tells_times"),
    [
        ({}, "event", False),
        ({"mm_newline_position": "one_token"}, "event", False),
        ({"mm_newline_position": "no_token"}, "none", False),
        ({"mm_newline_position": "grid", "add_time_instruction": True}, "row", True),
    ],
)
def test_siglip_as_published(keys: dict[str, Any], separators: Any, tells_times: bool) -> None:
    config = read_config(
        {
            **PUBLISHED,
            "model_type": "llava",
            "mm_vision_tower": "google/siglip-so400m-patch14-384",
            "mm_patch_merge_type": "spatial_unpad",
            "mm_spatial_pool_mode": "bilinear",
            "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": [[384, 768], [768, 384]],
            **keys,
        },
        "lmms-lab/LLaVA-Video-7B-Qwen2",
    )
    assert layout_of(config) == Layout("bilinear", separators, "anyres_max_9", tells_times, has_newline=True)
    vision = config.vision_config
    assert (vision.num_hidden_layers, config.vision_feature_layer) == (26, -1), "the last of 27 is never trained"
    assert vision.image_size // vision.patch_size == 27
    assert config.image_grid_pinpoints == [[768, 384], [384, 768]], "transformers has the height first"


@pytest.mark.parametrize(
    ("key", "value", "needs"),
    [
        ("model_type", "mistral", '"qwen2" or "llava_qwen" or "llava"'),
        ("mm_projector_type", "linear", '"mlp2x_gelu"'),
        ("mm_resampler_type", "spatial_pool", "null"),
        ("mm_vision_select_layer", -1, "-2"),
        ("mm_vision_select_feature", "cls_patch", '"patch"'),
        ("mm_use_im_start_end", True, "false or null"),
        ("add_faster_video", True, "false or null"),
        ("add_time_instruction", "False", "false or true or null"),
        ("mm_spatial_pool_stride", 4, "2 or null"),
        ("mm_spatial_pool_mode", "max", '"average" or "bilinear" or null'),
        ("mm_patch_merge_type", "flat", '"spatial_unpad" or "unires"'),
        ("mm_newline_position", "frame", '"one_token" or "grid" or "no_token"'),
    ],
)
def test_what_is_not_built_is_refused(folders: dict[str, Path], key: str, value: Any, needs: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the whole sentence is compared
        read_config(stated(folders["llava-video"], **{key: value}), "a/model")
    assert str(refused.value) == (
        f"METok cannot serve a/model: its {key} is {json.dumps(value)}, and METok needs {needs}."
    )


def test_an_average_that_the_authors_cut_is_refused(folders: dict[str, Path]) -> None:
    """`avg_pool2d` leaves the last row and column of an odd grid out; METok rounds up."""
    folder = folders["llava-video"]
    with pytest.raises(ValueError, match="it averages a grid of 7 patches a side, and METok needs an even number"):
        read_config(stated(folder, mm_spatial_pool_mode="average"), str(folder))


def test_rope_scaling_is_dropped_as_the_authors_drop_it(folders: dict[str, Path]) -> None:
    folder = folders["longva"]
    config = read_config(stated(folder, rope_scaling={"type": "linear", "factor": 4.0}), str(folder))
    assert config.text_config.rope_parameters == {"rope_type": "default", "rope_theta": 1e9}


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "", None])
def test_an_unknown_tower_is_refused(folders: dict[str, Path], name: str | None) -> None:
    with pytest.raises(ValueError, match=r"its mm_vision_tower is \".*\", and METok needs openai/clip"):
        read_config(stated(folders["longva"], mm_vision_tower=name), str(folders["longva"]))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "clip_vision_model", "hidden_size": "wide"}'])
def test_an_unreadable_tower_is_refused(tmp_path: Path, folders: dict[str, Path], text: str) -> None:
    (tmp_path / "vision_tower").mkdir()
    (tmp_path / "vision_tower" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^METok cannot read the config of .*vision_tower: [^\n]*\.$"):
        read_config(stated(folders["longva"]), str(tmp_path))


def test_sizes_that_do_not_go_together_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^METok cannot read the config of a/model: [^\n]*\.$"):
        read_config(
            stated(folders["longva"], hidden_size="wide", mm_vision_tower="clip-vit-large-patch14-336"), "a/model"
        )


@pytest.mark.parametrize(
    ("pinpoints", "tiles"),
    [
        ("(1x1),...,(2x1)", [[56, 56], [56, 112]]),
        ("[[56, 112], [112, 56]]", [[112, 56], [56, 112]]),
        ([[112, 56]], [[56, 112]]),
        (None, None),
        ("what", None),
        ([[50, 56]], None),
        ([[56]], None),
        ([], None),
    ],
)
def test_pictures_are_taken_where_their_tiles_are_known(folders: dict[str, Path], pinpoints: Any, tiles: Any) -> None:
    folder = folders["longva"]
    config = read_config(stated(folder, image_grid_pinpoints=pinpoints), str(folder))
    assert layout_of(config).images == ("unires" if tiles else "none")
    assert config.image_grid_pinpoints == (tiles or [[56, 56]])


def test_pictures_in_another_way_are_not_taken(folders: dict[str, Path]) -> None:
    folder = folders["llava-onevision"]
    assert layout_of(read_config(stated(folder, image_aspect_ratio="pad"), str(folder))).images == "none"


# --- as vLLM sees it ---


@pytest.fixture(scope="module")
def configured(folders: dict[str, Path]) -> Callable[..., Any]:
    """`configured(kind, **engine_args)`: vLLM's configuration, as `LLM()` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    def make(kind: str, folder: Path | None = None, **kwargs: Any) -> Any:
        options = {"model": str(folder or folders[kind]), "dtype": "float32", "max_model_len": 2048, "block_size": 32}
        return EngineArgs(**options, **{**metok_vllm.enable(), **kwargs}).create_engine_config()

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_vllm_reads_the_folder(configured: Callable[..., Any], kind: str) -> None:
    model = configured(kind).model_config
    assert model.architecture == METOK
    assert model.supports_multimodal_inputs
    config: Any = model.hf_config
    assert config.model_type == "llava_onevision"
    assert (config.image_token_index, config.video_token_index) == (510, 511)


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_are_tokens_and_chatml_has_its_system_prompt(folders: dict[str, Path], kind: str) -> None:
    register_formats()
    tokenizer: Any = cached_get_tokenizer(str(folders[kind]), tokenizer_mode=FORMAT)
    assert tokenizer.encode("<image><video>") == [510, 511]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "<video>\nWho?"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_another_format_is_left_to_vllm(checkpoint: Path) -> None:
    register_formats()
    ours: Any = cached_get_tokenizer(str(checkpoint), tokenizer_mode=FORMAT)
    stock: Any = cached_get_tokenizer(str(checkpoint), tokenizer_mode="hf")
    assert type(ours).__name__ == type(stock).__name__
    assert ours.get_vocab() == stock.get_vocab()
    assert ours.chat_template == stock.chat_template


def test_a_tokenizer_of_another_folder_is_refused(configured: Callable[..., Any], tmp_path: Path) -> None:
    make_tokenizer(SPECIALS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"with the tokenizer of {tmp_path}: it needs the checkpoint's config.json"):
        configured("longva", tokenizer=str(tmp_path))


def test_overrides_are_read_like_the_config(configured: Callable[..., Any]) -> None:
    overrides = {"architectures": [METOK], "max_position_embeddings": 2048, "mm_newline_position": "no_token"}
    config = configured("llava-video", hf_overrides=overrides).model_config.hf_config
    assert config.text_config.max_position_embeddings == 2048
    assert layout_of(config).separators == "none"


def test_modules_without_a_dot_are_renamed_too() -> None:
    """As the lists of a quantised copy name them."""
    modules = ["model.mm_projector", "model.mm_projector.2", "model.vision_tower", "lm_head", "model.layers.3.mlp"]
    assert WEIGHTS.apply_list(modules) == [
        "multi_modal_projector",
        "multi_modal_projector.linear_2",
        "vision_tower",
        "language_model.lm_head",
        "language_model.model.layers.3.mlp",
    ]


def test_another_tokenizer_mode_is_refused(configured: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="METok reads the tokenizer of this checkpoint's format by itself: use"):
        configured("longva", tokenizer_mode="hf")


def test_a_full_vocabulary_is_refused(configured: Callable[..., Any], folders: dict[str, Path], tmp_path: Path) -> None:
    linked(folders["longva"], tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(stated(folders["longva"], vocab_size=511)))
    with pytest.raises(ValueError, match="its vocabulary of 511 rows has none to spare for <image> and <video>"):
        configured("longva", tmp_path)


def linked(source: Path, folder: Path) -> Path:
    """A folder with the same files, of which single ones may be replaced."""
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def test_a_checkpoint_without_its_tower_is_refused(
    configured: Callable[..., Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = linked(folders["longva"], tmp_path)
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    for file in folder.glob("model*"):
        file.unlink()
    save_file({k: v for k, v in tensors.items() if "vision_tower" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the weights of its vision tower are not in it, and METok fetches no others"):
        configured("longva", folder)


def test_a_file_that_was_cut_off_is_refused(
    configured: Callable[..., Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = linked(folders["longva"], tmp_path)
    file = next(folder.glob("*.safetensors"))
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=f"METok cannot serve {folder}: {file.name} is no whole safetensors file"):
        configured("longva", folder)


def test_transformers_has_heard_of_the_type() -> None:
    """Else vLLM logs errors where it looks at the config beside a tokenizer."""
    register_formats()
    assert AutoConfig.for_model("llava_qwen").model_type == "llava_qwen"


# --- the command line ---


def test_the_command_line_says_how_to_read_it(folders: dict[str, Path]) -> None:
    argv = rewritten(["vllm", "serve", str(folders["longva"]), "--plugin", "metok"])
    for option in ("--config-format", "--tokenizer-mode"):
        assert argv[argv.index(option) + 1] == "metok"
    assert f'{{"architectures": ["{METOK}"]}}' in argv


def test_a_checkpoint_of_transformers_is_read_as_always(checkpoint: Path) -> None:
    argv = rewritten(["vllm", "serve", str(checkpoint), "--plugin", "metok"])
    assert "--config-format" not in argv
    assert "--tokenizer-mode" not in argv


def test_an_override_that_would_do_nothing_is_refused(folders: dict[str, Path]) -> None:
    model, given = str(folders["longva"]), json.dumps({"rope_scaling": {"type": "linear", "factor": 2.0}})
    with pytest.raises(ValueError, match=f"'rope_scaling' does nothing for {model}; state it inside 'text_config'"):
        rewritten(["vllm", "serve", model, "--plugin", "metok", "--hf-overrides", given])


@pytest.mark.parametrize("option", ["--config-format", "--tokenizer-mode"])
def test_another_format_on_the_command_line_is_refused(folders: dict[str, Path], option: str) -> None:
    model = str(folders["longva"])
    with pytest.raises(ValueError, match=f"^METok reads the format of {model} by itself: leave {option} at auto.$"):
        rewritten(["vllm", "serve", model, "--plugin", "metok", option, "hf"])


def test_what_cannot_be_served_is_refused_before_vllm_starts(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(stated(folders["longva"], mm_projector_type="linear")))
    with pytest.raises(ValueError, match='its mm_projector_type is "linear"'):
        rewritten(["vllm", "serve", str(tmp_path), "--plugin", "metok"])


# --- pixels ---


@pytest.mark.parametrize("kind", ["longva", "llava-video"])
def test_frames_become_the_authors_pixels(configured: Callable[..., Any], kind: str) -> None:
    """PIL's, as the authors' own processors have them, to within a rounding of a byte."""
    import numpy as np
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    from tests.support.oracle.samples import scene_video

    config = configured(kind).model_config
    tokenizer = cached_get_tokenizer(config.model, tokenizer_mode=FORMAT)
    processor: Any = build_processor(config.hf_config, tokenizer)
    video = np.concatenate([scene_video(3, 4, side=90), scene_video(4, 4, side=90)[:, :, ::-1]], axis=2)
    ours = processor.video_processor([video], return_tensors="pt")["pixel_values_videos"][0]
    square = {"height": 56, "width": 56}
    authors: Any = SiglipImageProcessorPil(size=square, resample=3)
    if kind == "longva":
        authors = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    theirs = authors(list(video), return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (4, 3, 56, 56)
    byte = 1 / 255 / (0.26 if kind == "longva" else 0.5)
    assert (ours - theirs).abs().max() <= 2.5 * byte
    assert (ours - theirs).abs().mean() <= 0.2 * byte


# --- the paper's figures ---


def test_the_papers_figures_come_out_of_the_engines_accounting() -> None:
    """LongVA-7B as published, 64 frames, 200 text tokens: FLOPs down by 80 %, KV while decoding by 93 %."""
    config = read_config(
        {**PUBLISHED, "model_type": "qwen2", "mm_patch_merge_type": "unires", "mm_vision_tower": CLIP}, "LongVA-7B"
    )
    grid, style = VideoGrid(64, 24, 24), layout_of(config).style
    plan = plan_video(grid, style, 64 * 144, resolve_request(MetokSettings(), None), "embedding")
    per_frame = tokens_per_frame(24, 24, plan.strides, style)
    expected = expected_visual_tokens(64, 5, 3, 6, per_frame, False, plan.keep_ratio_micro, stock=plan.stock_tokens)
    assert (plan.stock_tokens, plan.tokens) == (9216, expected.encoded)
    shape = model_shape(SimpleNamespace(hf_text_config=config.text_config, get_head_size=lambda: 128))  # type: ignore
    layers = chosen_layers(28, None)
    costs = account(shape, layers, 200, expected)
    assert layers == (3, 10, 19)
    assert 100 * costs.prefill_flops.saved(costs.prefill_flops_stock) == pytest.approx(80, abs=1.5)
    assert 100 * costs.kv_bytes.saved(costs.kv_bytes_stock) == pytest.approx(93, abs=1)


# --- the times of frames ---


class Words:
    """A tokenizer in which a full stop and the line that it ends are one token, as in Qwen2's."""

    all_special_ids = (90, 91)

    def __init__(self) -> None:
        self.known = ["<image>", "<video>", "<|im_end|>"]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        found = []
        for word in re.findall(r"\.\n|\n|\.|[^.\n]+", text):
            if word not in self.known:
                self.known.append(word)
            found.append(100 + self.known.index(word))
        return found

    def decode(self, ids: list[int]) -> str:
        return "<special>" if ids[0] < 100 else "".join(self.known[number - 100] for number in ids)


@pytest.mark.parametrize("follows", ["\nWho?", "Who?", "\n", ""])
def test_the_end_of_the_told_line_is_tokenized_with_what_follows(follows: str) -> None:
    words = Words()
    prompt = [*words.encode("user\n", False), 91, *words.encode(follows, False), 90, *words.encode("x.", False)]
    found = with_text_behind(prompt, 91, ["At 0.00s."], words)
    line = "" if follows.startswith("\n") else "\n"
    expected = words.encode(f"\nAt 0.00s.{line}{follows}", False)
    assert found == [*words.encode("user\n", False), 91, *expected, 90, *words.encode("x.", False)]
    assert words.encode(".\n", False)[0] in expected, "one token, not two"


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"fps": 0, "total_num_frames": 4, "frames_indices": [0, 1]},
        {"fps": float("nan"), "total_num_frames": 4, "frames_indices": [0, 1]},
        {"fps": "fast", "total_num_frames": 4, "frames_indices": [0, 1]},
        {"fps": 2.0, "total_num_frames": None, "frames_indices": [0, 1]},
        {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0]},
        {"fps": 2.0, "total_num_frames": 4},
    ],
)
def test_nothing_is_told_where_times_are_not_known(metadata: dict[str, Any]) -> None:
    told = MetokLlavaQwenMultiModalProcessor.text_behind(SimpleNamespace(), 2, metadata)  # type: ignore[arg-type]
    assert told == ""


def test_each_video_is_told_of_its_own_times_and_the_rest_is_left() -> None:
    words = Words()
    a, b = words.encode("\nA", False), words.encode("\nB", False)
    found = with_text_behind([91, *a, 91, *b, 91, 90, 91], 91, ["one", "", "three"], words)
    assert found == [91, *words.encode("\none\nA", False), 91, *b, 91, *words.encode("\nthree\n", False), 90, 91]
