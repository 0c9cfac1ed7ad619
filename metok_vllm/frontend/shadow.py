"""What `shadow_rate` needs of vLLM: answers that can be told, and log-probabilities as the model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

NEEDS_SERVER = "METok (additional_config): 'shadow_rate' watches the requests of vllm serve, and has no effect here."


def prepare_shadow(model_config: ModelConfig, rate: float) -> None:
    """Let the engine be told answers, where any is to be compared.

    Raises:
        ValueError: an option of vLLM's is in the way, in one sentence.
    """
    if not rate:
        return
    from metok_vllm.contract.forced import TOP  # vLLM with it, which `metok_vllm.enable` does without

    if model_config.logprobs_mode != "raw_logprobs":
        raise ValueError("METok's shadow_rate compares the model's own log-probabilities: remove --logprobs-mode.")
    if 0 <= model_config.max_logprobs < TOP:
        raise ValueError(f"METok's shadow_rate compares the best {TOP} tokens: let --max-logprobs be {TOP} or more.")
    model_config.enable_trace_replay = True


def refuse_shadow(additional_config: object) -> None:
    """For programs without requests to watch.

    Raises:
        ValueError: `shadow_rate` is stated, in one sentence.
    """
    stated = additional_config.get("metok") if isinstance(additional_config, Mapping) else None
    if isinstance(stated, Mapping) and stated.get("shadow_rate"):
        raise ValueError(NEEDS_SERVER)
