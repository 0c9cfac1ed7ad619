"""What a user may state for the engines that calibration starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.settings import Setting
from metok_vllm.contract.settings import parse_settings

BESIDE = (
    *("aligner", "aligner_model", "key_frames", "token_budget", "max_deferred_bytes", "chat_template"),
    *("videos_at_once", "videos_waiting", "video_memory_mib"),
)
"""METok's settings that are not searched: every engine has them, and so should the server."""

SEARCHED = ("preset", "kv_layers", *Setting((1, 2, 3), (2, 4, 8)).profile())
"""Settings that differ from try to try."""

OURS = ("model", "additional_config", "hf_overrides", "config_format", "tokenizer_mode")
"""Arguments of `vllm.LLM` that METok states itself (`metok_vllm.enable`)."""


def check_stated(engine: Mapping[str, Any], metok: Mapping[str, Any]) -> None:
    """Refuse what cannot be stated.

    Args:
        engine: arguments of `vllm.LLM`.
        metok: METok's settings.

    Raises:
        CalibrateError: one sentence for the user.
    """
    for name in OURS:
        if name in engine:
            other = ": METok's settings go to --metok" if name == "additional_config" else ", which METok sets"
            raise CalibrateError(f"--engine-option cannot state {name}{other}.")
    try:
        parse_settings(metok, "--metok")
    except ValueError as error:
        raise CalibrateError(str(error)) from None
    others = sorted(set(metok) - set(BESIDE))
    if others:
        why = ", which is searched" if others[0] in SEARCHED else ""
        raise CalibrateError(f"--metok cannot state {others[0]}{why}; it takes {', '.join(BESIDE)}.")
