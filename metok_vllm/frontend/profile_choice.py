"""Which profile rules a server: the one that its settings name, or the one beside the model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metok_vllm.contract.profile import IGNORED, NAME, SETTABLE, Profile, read_profile
from metok_vllm.contract.settings import BALANCED, BESIDE_NO_WINDOW, MetokSettings
from metok_vllm.frontend.fingerprint import fingerprint, model_folder
from metok_vllm.log import metok_logger

logger = metok_logger(__name__)

PAPERS = (28, 3584)
"""Layers and hidden size of LLaVA-OneVision-7B and LongVA-7B, whose pruning layers the paper states."""

PAPERS_ARCHITECTURES = ("LlavaOnevisionForConditionalGeneration", "LlavaQwenForCausalLM")
"""Of these two, in both formats. LLaVA-Video-7B has the same sizes and reads the same."""


ANSWERS = (*SETTABLE, "stages", "aligner_model")
"""What changes answers. What a profile does not state was measured as its default."""


@dataclass(frozen=True)
class ChosenProfile:
    """A profile in force."""

    path: Path
    profile: Profile
    overridden: tuple[str, ...]  # what the user states otherwise than it was measured

    def summary(self) -> dict[str, Any]:
        return self.profile.summary(str(self.path), self.overridden)


def choose_profile(stated: Mapping[str, Any], model: str, revision: str | None) -> ChosenProfile | None:
    """The profile for a model, or None.

    Args:
        stated: what the user says under ``additional_config["metok"]``.
        model: folder or name.
        revision: of the name.

    Raises:
        ValueError: it cannot be read, or is another model's, in one sentence.
    """
    named = stated.get("profile")
    if named == IGNORED:
        return None
    if named is None:
        try:
            path = model_folder(model, revision) / NAME
        except ValueError:  # a name whose config vLLM has from elsewhere (--hf-config-path)
            return None
        if not path.exists():
            return None
    elif isinstance(named, str):
        path = Path(named).expanduser()
    else:
        return None  # the settings' own check says what is wrong with it
    profile = read_profile(path)
    _refuse_another(path, profile, model, revision)
    return ChosenProfile(path, profile, _overridden(stated, profile.settings))


def _overridden(stated: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What decides answers and is not as the profile was measured, by name."""
    measured = {key: settings.get(key, MetokSettings.model_fields[key].default) for key in ANSWERS}
    if settings.get("aligner") == "dual-tower":  # which tower, each server says for itself
        measured["aligner_model"] = stated.get("aligner_model")
    same = {key for key in ANSWERS if key in stated and _plain(stated[key]) == _plain(measured[key])}
    found = (_ruled(stated) & set(settings)) | (set(ANSWERS) & set(stated))
    return tuple(sorted(found - same))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def merged(stated: Mapping[str, Any], chosen: ChosenProfile) -> dict[str, Any]:
    """The profile's settings, and over them the user's single keys."""
    ruled = _ruled(stated)
    return {**{key: value for key, value in chosen.profile.settings.items() if key not in ruled}, **stated}


def _ruled(stated: Mapping[str, Any]) -> set[str]:
    """The keys that the user decides; a preset decides what it is about, and the layers that keep KV for
    decoding go by one rule.
    """
    ruled = {*stated, *(BALANCED if "preset" in stated else ())}
    if stated.get("kv_layers") is not None:
        return {*ruled, *BESIDE_NO_WINDOW}
    other_rule = "preset" in stated or any(stated.get(name) for name in BESIDE_NO_WINDOW)
    return {*ruled, *(("kv_layers",) if other_rule else ())}


def _refuse_another(path: Path, profile: Profile, model: str, revision: str | None) -> None:
    here = fingerprint(model_folder(model, revision))
    weights = profile.mark.weights_sha256
    if here.config_sha256 != profile.mark.config_sha256:
        differs = "its config.json is another"
    elif weights is not None and here.weights_sha256 is not None and weights != here.weights_sha256:
        differs = "its weights are others"
    else:
        if weights is None or here.weights_sha256 is None:
            logger.warning(
                "METok: the profile %s was compared with this model's config.json alone, since not all weights are here.",
                path,
            )
        return
    raise ValueError(
        f"METok: the profile {path} was measured on {profile.model}, and {model} is another model ({differs}): make "
        "one with metok calibrate, or start with another 'profile' or \"none\"."
    )


def warn_uncalibrated(model: str, architectures: tuple[str, ...], layers: int, hidden: int) -> None:
    """Say that the pruning layers are a guess, unless the paper used them with this very model.

    Args:
        model: as the user names it.
        architectures: the stock model's names.
        layers: of the language model.
        hidden: its hidden size.
    """
    if (layers, hidden) == PAPERS and set(architectures) & set(PAPERS_ARCHITECTURES):
        return
    logger.warning(
        "METok: this model is not calibrated: its pruning layers are the paper's, scaled by depth, and may cut where it "
        "still reads its video. To find its own: metok calibrate %s --videos FOLDER",
        model,
    )
