"""The server's settings, as every process finds them.

They are validated once, at start (`checks.py`), and travel with the model's config: the front end's processor sees the
model config but not vLLM's whole configuration.
"""

from __future__ import annotations

from typing import Any

from metok_vllm.contract.settings import MetokSettings

ATTRIBUTE = "metok_settings"


def attach_settings(hf_config: Any, settings: MetokSettings) -> None:
    """Store validated settings with the model's config, as plain data so that it stays serialisable."""
    setattr(hf_config, ATTRIBUTE, settings.model_dump())


def server_settings(hf_config: Any) -> MetokSettings:
    """The server's settings.

    Raises:
        AttributeError: the start-up check has not run for this model.
    """
    return MetokSettings.model_validate(getattr(hf_config, ATTRIBUTE))
