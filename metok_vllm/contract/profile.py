"""A profile: settings that `metok calibrate` found for one model, and how well they kept its answers.

It is a JSON file. The setting `profile` names it, or it lies beside the model's config as
`metok_profile.json`. It speaks for the model that it was measured on alone (`frontend/profile_choice.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from metok_vllm.contract.settings import parse_settings

FORMAT = 1
"""Of the file. Another one is refused: what its keys mean is not known here."""

NAME = "metok_profile.json"
"""In the model's folder it is found by itself."""

IGNORED = "none"
"""The setting `profile` that ignores such a file."""

SETTABLE = (
    *("events", "key_events", "key_frames", "strides", "prune_layers", "kv_layers", "keep_ratio"),
    *("decode_retention", "quota", "score_rows", "frame_smoothing", "final_keep", "token_budget", "aligner"),
)
"""The settings that a profile may state: the method's, and none of the server's memory, files or pages."""

Share = Annotated[float, Field(ge=0, le=1)]


class ModelMark(BaseModel):
    """What tells one model from another, read without reading its weights (`frontend/fingerprint.py`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # None: they were not on this machine


class Measured(BaseModel):
    """What `metok calibrate` measured on questions that its search had not seen."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    videos: Annotated[int, Field(ge=1)]
    questions: Annotated[int, Field(ge=1)]
    agreement: Share  # of the answers, those that are as good to the model without METok
    interval: tuple[Share, Share]  # 95 %
    largest_harm: Annotated[float, Field(ge=0)]  # nats, of the answer that suffers most (docs/calibration.md)
    tokens: Annotated[float, Field(ge=0)]  # visual, mean of the layers and the questions
    tokens_stock: Annotated[float, Field(ge=0)]
    kv: Annotated[float, Field(ge=0)]  # bytes of the prompt's KV, text included, as a share of stock's
    flops: Annotated[float, Field(ge=0)]  # of the LLM's prefill, as a share of stock's


class Profile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    model: str
    mark: ModelMark
    settings: dict[str, Any]
    vllm: str
    plugin: str
    horizon: int  # the layer from which on no visual token was needed
    layers: int  # of the model
    generic_questions: bool  # whether the user had none of their own
    search_videos: Annotated[int, Field(ge=1)]
    search_questions: Annotated[int, Field(ge=1)]
    engine: dict[str, Any] = {}  # what vLLM was told beside its defaults: frames, number type, quantisation
    measured: Measured

    @field_validator("settings")
    @classmethod
    def _are_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(settings) - set(SETTABLE))
        if unknown:
            raise ValueError(f"a profile does not state '{unknown[0]}'")
        parse_settings(settings, "profile")
        return settings

    def summary(self, path: str, overridden: tuple[str, ...]) -> dict[str, Any]:
        """What the log and the status page say of it."""
        return {
            "path": path,
            "overridden": list(overridden),
            "agreement": self.measured.agreement,
            "interval": list(self.measured.interval),
            "questions": self.measured.questions,
            "generic": self.generic_questions,
            "videos": self.measured.videos,
        }


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ValueError: it cannot be read, in one sentence.
    """
    try:
        stated = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"METok: the profile {path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise ValueError(f"METok: the profile {path} is no JSON file.") from None
    version = stated.get("format") if isinstance(stated, dict) else None
    if version != FORMAT or isinstance(version, bool):
        raise ValueError(
            f"METok: the profile {path} has the format {version!r}, and this version reads {FORMAT}: "
            "make it again with metok calibrate."
        )
    try:
        return Profile.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        said = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
        raise ValueError(f"METok: the profile {path} is wrong at '{where}': {said.rstrip('.')}.") from None


def write_profile(path: Path, profile: Profile) -> None:
    """Write it whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def told(summary: Mapping[str, Any]) -> str:
    """A `Profile.summary` in words, for the log and the status page."""
    low, high = summary["interval"]
    kind = "generic questions" if summary["generic"] else "questions"
    words = (
        f"profile {summary['path']}: {100 * summary['agreement']:.1f} % of the answers to {summary['questions']} unseen "
        f"{kind} agreed [95 % interval {100 * low:.1f} to {100 * high:.1f}]"
    )
    return words + (f"; overridden: {', '.join(summary['overridden'])}" if summary["overridden"] else "")
