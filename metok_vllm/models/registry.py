"""Which stock architectures METok serves, and under which name of its own each is registered.

A METok model has an architecture name of its own, so that a server without the plugin refuses it instead of
serving densely.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SupportedModel:
    """One family: the architecture in a checkpoint's config, and the class that serves it with METok."""

    stock: str
    metok: str
    module: str  # "module:Class", imported only when the model is built
    model_types: tuple[str, ...]  # what `model_type` in the config may be
    levels: Callable[[Any], int] = lambda hf_config: 0  # first layers behind which extra channels are added


SUPPORTED = (
    SupportedModel(
        stock="LlavaOnevisionForConditionalGeneration",
        metok="METokLlavaOnevisionForConditionalGeneration",
        module="metok_vllm.models.llava_onevision:MetokLlavaOnevisionForConditionalGeneration",
        model_types=("llava_onevision",),
    ),
)


def metok_architecture(architectures: list[str] | None, model: str) -> str:
    """METok's architecture for a checkpoint.

    Args:
        architectures: what the checkpoint's config names.
        model: the checkpoint's name, for the message.

    Raises:
        ValueError: METok cannot serve it; the message names the architectures that it can serve.
    """
    for supported in SUPPORTED:
        if architectures and architectures[0] in (supported.stock, supported.metok):
            return supported.metok
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
