"""METok for vLLM: training-free token compression for long-video questions.

On the command line add ``--plugin metok`` to ``vllm serve``; in Python::

    llm = vllm.LLM(model, **metok_vllm.enable(decode_retention=1.0))
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["enable"]


def enable(**settings: Any) -> dict[str, Any]:
    """Keyword arguments that make ``vllm.LLM`` serve its model with METok.

    Args:
        settings: the server's settings; see docs/options.md.

    Returns:
        Arguments for ``vllm.LLM(model, **enable(...))``. They do not name the model: METok's class for it is
        chosen when its config is read, and an unsupported model is refused there.

    Raises:
        ValueError: an unknown setting, an impossible value, one that only a server can have, or a list of
            plugins (``VLLM_PLUGINS``) without METok, in one sentence.
    """
    from metok_vllm.contract.settings import parse_settings
    from metok_vllm.frontend.shadow import refuse_shadow
    from metok_vllm.models.registry import FORMAT, select_architecture

    if "metok" not in os.environ.get("VLLM_PLUGINS", "metok").split(","):  # as vLLM reads it (vllm/envs.py)
        raise ValueError("METok is not among the plugins that vLLM may load: add metok to VLLM_PLUGINS, or unset it.")
    parse_settings(settings, "enable")
    refuse_shadow({"metok": settings})
    return {
        "config_format": FORMAT,
        "tokenizer_mode": FORMAT,
        "hf_overrides": select_architecture,
        "additional_config": {"metok": settings},
    }
