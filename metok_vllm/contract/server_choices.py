"""What start-up has fixed for this server, as every process finds it.

`frontend/startup.py` validates and works it out once. It travels with the model's config, because the front
end's processor sees the model's config but not vLLM's whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metok_vllm.compression.selection import PruneLayers
from metok_vllm.contract.settings import MetokSettings

ATTRIBUTE = "metok_server"


@dataclass(frozen=True)
class ServerChoices:
    """The settings, and what they come to for this model and this server."""

    settings: MetokSettings
    prune_layers: PruneLayers
    aligner: str  # what requests get that do not choose: one of `video_plan.ALIGNERS`
    tower: str | None  # name or path of the dual tower that is loaded
    step_tokens: int  # longest prompt that one step always takes, see `budgets.step_tokens`
    encoder_tokens: int  # longest item that the encoder cache takes, unless the profiled ones are longer
    profile: dict[str, Any] | None = None  # what is shown of the profile that rules: `contract/profile.py`


def attach_choices(hf_config: Any, choices: ServerChoices) -> None:
    """Store the choices with the model's config, as plain data so that it stays serialisable."""
    plain = {**vars(choices), "settings": choices.settings.model_dump(), "prune_layers": list(choices.prune_layers)}
    setattr(hf_config, ATTRIBUTE, plain)


def server_choices(hf_config: Any) -> ServerChoices:
    """The server's choices.

    Raises:
        AttributeError: the start-up check has not run for this model.
    """
    plain = dict(getattr(hf_config, ATTRIBUTE))
    first, second, third = plain.pop("prune_layers")
    settings = MetokSettings.model_validate(plain.pop("settings"))
    return ServerChoices(settings=settings, prune_layers=(first, second, third), **plain)
