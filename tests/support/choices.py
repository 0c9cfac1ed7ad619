"""What start-up would have fixed for a model of so many layers."""

from __future__ import annotations

from typing import Any

from metok_vllm.compression.selection import prune_layers
from metok_vllm.contract.server_choices import ServerChoices, attach_choices
from metok_vllm.contract.settings import MetokSettings


def attach_settings(hf_config: Any, layers: int, **settings: Any) -> None:
    """Store the choices that follow from the settings alone with a model's config."""
    parsed = MetokSettings(**settings)
    choices = ServerChoices(
        parsed,
        prune_layers(layers, parsed.prune_layers),
        aligner="embedding",
        tower=None,
        step_tokens=1024,
        encoder_tokens=1024,
    )
    attach_choices(hf_config, choices)
