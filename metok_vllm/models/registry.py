"""Which stock architectures METok serves, and under which name of its own each is registered.

A METok model has an architecture name of its own, so that a server without the plugin refuses it instead of
serving densely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

FORMAT = "metok"
"""For vLLM's `--config-format` and `--tokenizer-mode`; see `frontend/checkpoint_format.py`."""


@dataclass(frozen=True)
class OwnFormat:
    """How a checkpoint is read that transformers cannot read. Functions are named "module:name"."""

    config: str  # (config.json as a mapping, model) -> a config of the family's `model_type`; ValueError
    tokenizer: str  # (arguments of `AutoTokenizer.from_pretrained`) -> a tokenizer of transformers
    complete: str  # (vLLM's `ModelConfig`, tokenizer) -> None, what the config says of the tokenizer; ValueError
    unknown_types: tuple[str, ...] = ()  # `model_type`s that transformers has not heard of


@dataclass(frozen=True)
class SupportedModel:
    """One family: the architecture in a checkpoint's config, and the class that serves it with METok."""

    stock: str
    metok: str
    module: str  # "module:Class", imported only when the model is built
    model_types: tuple[str, ...]  # what `model_type` in the config may be
    about: str  # the checkpoints, for a list of what is served
    own_format: OwnFormat | None = None  # None: as transformers reads it
    levels: Callable[[Any], int] = lambda hf_config: 0  # first layers behind which extra channels are added
    strides: tuple[int, int, int] = (2, 4, 8)  # of the tiers, where nobody says otherwise
    sampling: Mapping[str, Any] = field(default_factory=dict)  # the loader's settings, where nobody says otherwise
    text_types: tuple[str, ...] = ()  # what `model_type` of the language model may be; empty: anything
    unprunable: str = ""  # why its language model cannot be pruned, so that it is served with `stages` 1 alone


MERGED_STRIDES = (1, 2, 4)
"""Where the tower has merged 2 x 2 patches into each of its tokens already."""

QWEN_SAMPLING = {"sampling": "qwen2_vl", "fps": 2, "num_frames": -1}
"""What Qwen2-VL's own processor takes: 2 frames a second, 4 to 768 of them."""

QWEN3_SAMPLING = {"sampling": "qwen3_vl", "fps": 2, "num_frames": -1}
"""What Qwen3-VL's own processor takes: as many, but otherwise placed."""

LINEAR_ATTENTION = "most of its layers carry a state along instead of attending (linear attention)"


def deepstack_levels(hf_config: Any) -> int:
    """Layers of the language model behind which Qwen3-VL's tower adds to its tokens."""
    return len(hf_config.vision_config.deepstack_visual_indexes)


SUPPORTED = (
    SupportedModel(
        stock="LlavaOnevisionForConditionalGeneration",
        metok="METokLlavaOnevisionForConditionalGeneration",
        module="metok_vllm.models.llava_onevision:MetokLlavaOnevisionForConditionalGeneration",
        model_types=("llava_onevision",),
        about="LLaVA-OneVision in Hugging Face format",
    ),
    SupportedModel(
        stock="LlavaQwenForCausalLM",
        metok="METokLlavaQwenForCausalLM",
        module="metok_vllm.models.llava_qwen:MetokLlavaQwenForCausalLM",
        model_types=("llava_onevision",),  # what the config is read as
        about="LongVA, LLaVA-OneVision and LLaVA-Video as their authors published them",
        own_format=OwnFormat(
            config="metok_vllm.models.original_llava.config:read_config",
            tokenizer="metok_vllm.models.original_llava.tokenizer:load_tokenizer",
            complete="metok_vllm.models.original_llava.tokenizer:set_placeholders",
            unknown_types=("llava_qwen",),
        ),
    ),
    SupportedModel(
        stock="Qwen2_5_VLForConditionalGeneration",
        metok="METokQwen2_5_VLForConditionalGeneration",
        module="metok_vllm.models.qwen2_5_vl:MetokQwen2_5_VLForConditionalGeneration",
        model_types=("qwen2_5_vl",),
        about="Qwen2.5-VL, and what is trained from it, as Cosmos-Reason1",
        strides=MERGED_STRIDES,
        sampling=QWEN_SAMPLING,
    ),
    SupportedModel(
        stock="Qwen2VLForConditionalGeneration",
        metok="METokQwen2VLForConditionalGeneration",
        module="metok_vllm.models.qwen2_vl:MetokQwen2VLForConditionalGeneration",
        model_types=("qwen2_vl",),
        about="Qwen2-VL",
        strides=MERGED_STRIDES,
        sampling=QWEN_SAMPLING,
    ),
    SupportedModel(
        stock="Qwen3VLForConditionalGeneration",
        metok="METokQwen3VLForConditionalGeneration",
        module="metok_vllm.models.qwen3_vl:MetokQwen3VLForConditionalGeneration",
        model_types=("qwen3_vl",),
        about="Qwen3-VL",
        levels=deepstack_levels,
        strides=MERGED_STRIDES,
        sampling=QWEN3_SAMPLING,
    ),
    SupportedModel(
        stock="Qwen3VLMoeForConditionalGeneration",
        metok="METokQwen3VLMoeForConditionalGeneration",
        module="metok_vllm.models.qwen3_vl_moe:MetokQwen3VLMoeForConditionalGeneration",
        model_types=("qwen3_vl_moe",),
        about="Qwen3-VL with experts",
        levels=deepstack_levels,
        strides=MERGED_STRIDES,
        sampling=QWEN3_SAMPLING,
    ),
    SupportedModel(
        stock="Qwen3_5ForConditionalGeneration",
        metok="METokQwen3_5ForConditionalGeneration",
        module="metok_vllm.models.qwen3_5:MetokQwen3_5ForConditionalGeneration",
        model_types=("qwen3_5",),
        about="Qwen3.5 and 3.6, stage 1 alone",
        strides=MERGED_STRIDES,
        sampling=QWEN3_SAMPLING,
        unprunable=LINEAR_ATTENTION,
    ),
    SupportedModel(
        stock="Qwen3_5MoeForConditionalGeneration",
        metok="METokQwen3_5MoeForConditionalGeneration",
        module="metok_vllm.models.qwen3_5:MetokQwen3_5MoeForConditionalGeneration",
        model_types=("qwen3_5_moe",),
        about="Qwen3.5 and 3.6 with experts, stage 1 alone",
        strides=MERGED_STRIDES,
        sampling=QWEN3_SAMPLING,
        unprunable=LINEAR_ATTENTION,
    ),
    SupportedModel(
        stock="InternVLForConditionalGeneration",
        metok="METokInternVLForConditionalGeneration",
        module="metok_vllm.models.internvl:MetokInternVLForConditionalGeneration",
        model_types=("internvl",),
        about="InternVL3 and InternVL3.5 in Hugging Face format",
        strides=MERGED_STRIDES,
        text_types=("qwen2", "qwen3", "qwen3_moe", "llama"),
    ),
    SupportedModel(
        stock="InternVLChatModel",
        metok="METokInternVLChatModel",
        module="metok_vllm.models.internvl_chat:MetokInternVLChatModel",
        model_types=("internvl_chat",),
        about="InternVL3 and InternVL3.5 as their authors published them",
        strides=MERGED_STRIDES,
        text_types=("qwen2", "qwen3", "qwen3_moe"),
    ),
)


def named(name: str) -> Any:
    """The object that "module:name" stands for."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def family_of(architectures: list[str] | None) -> SupportedModel | None:
    """The entry of a checkpoint of these architectures, under the stock name or METok's."""
    names = architectures or [""]
    return next((one for one in SUPPORTED if names[0] in (one.stock, one.metok)), None)


def with_own_format(architectures: list[str] | None) -> OwnFormat | None:
    """The format of a checkpoint of these architectures, or None where transformers reads it."""
    family = family_of(architectures)
    return None if family is None else family.own_format


def read_own_format(config: Mapping[str, Any], model: str) -> Any:
    """The config of a checkpoint in a format of its own, or None where transformers reads it.

    Args:
        config: what its config.json says.
        model: the checkpoint's folder or name.

    Raises:
        ValueError: METok cannot serve it, in one sentence.
    """
    own = with_own_format(config.get("architectures"))
    return None if own is None else named(own.config)(config, model)


def metok_architecture(architectures: list[str] | None, model: str) -> str:
    """METok's architecture for a checkpoint.

    Args:
        architectures: what the checkpoint's config names.
        model: the checkpoint's name, for the message.

    Raises:
        ValueError: METok cannot serve it; the message names the architectures that it can serve.
    """
    family = family_of(architectures)
    if family is not None:
        return family.metok
    found = architectures[0] if architectures else "no architecture"
    can = ", ".join(supported.stock for supported in SUPPORTED)
    raise ValueError(f"METok cannot serve {model} ({found}); it can serve: {can}.")


def select_architecture(hf_config: Any) -> Any:
    """Point a checkpoint's config at METok's class: the `hf_overrides` of the Python API."""
    if hf_config.architectures == [""]:
        # vLLM probes the function with an empty config, only to learn whether it changes `model_type`.
        return hf_config
    name = getattr(hf_config, "name_or_path", "") or "this model"
    hf_config.architectures = [metok_architecture(hf_config.architectures, name)]
    return hf_config
