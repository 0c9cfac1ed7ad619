"""What start-up has fixed for this server, as every process finds it.

`frontend/startup.py` validates and works it out once. It travels with the model's config, because the front
end's processor sees the model's config but not vLLM's whole configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metok_vllm.compression.selection import KVLayers, PruneLayers
from metok_vllm.contract.settings import MetokSettings

ATTRIBUTE = "metok_server"


@dataclass(frozen=True)
class ServerChoices:
    """The settings, and what they come to for this model and this server."""

    settings: MetokSettings
    prune_layers: PruneLayers | None  # None with `stages` 1: nothing is pruned in this server
    aligner: str  # what requests get that do not choose: one of `video_plan.ALIGNERS`
    tower: str | None  # name or path of the dual tower that is loaded
    step_tokens: int  # longest prompt that one step always takes, see `budgets.step_tokens`
    encoder_tokens: int  # longest item that the encoder cache takes, unless the profiled ones are longer
    profile: dict[str, Any] | None = None  # what is shown of the profile that rules: `contract/profile.py`

    @property
    def window(self) -> KVLayers | None:
        """The setting `kv_layers`, checked at start. It ends at L3 or before: nothing visual is left."""
        stated, layers = self.settings.kv_layers, self.prune_layers
        if stated is None or layers is None:
            return None
        return stated[0], min(stated[1], layers[2])


def attach_choices(hf_config: Any, choices: ServerChoices) -> None:
    """Store the choices with the model's config, as plain data so that it stays serialisable."""
    layers = None if choices.prune_layers is None else list(choices.prune_layers)
    plain = {**vars(choices), "settings": choices.settings.model_dump(), "prune_layers": layers}
    setattr(hf_config, ATTRIBUTE, plain)


def server_choices(hf_config: Any) -> ServerChoices:
    """The server's choices.

    Raises:
        AttributeError: the start-up check has not run for this model.
    """
    plain = dict(getattr(hf_config, ATTRIBUTE))
    layers = plain.pop("prune_layers")
    settings = MetokSettings.model_validate(plain.pop("settings"))
    return ServerChoices(settings=settings, prune_layers=None if layers is None else _three(*layers), **plain)


def pruning_layers(hf_config: Any) -> PruneLayers:
    """The layers before which this server prunes; only what a server of three stages runs may ask."""
    layers = server_choices(hf_config).prune_layers
    assert layers is not None, "a server of stage 1 alone prunes nowhere"
    return layers


def _three(first: int, second: int, third: int) -> PruneLayers:
    return first, second, third
