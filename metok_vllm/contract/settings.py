"""Settings of METok: one frozen model, validated once, with errors a user can act on.

The server's settings come from ``--additional-config '{"metok": {...}}'``; a request may override all of them
but `SERVER_ONLY`, through ``mm_processor_kwargs={"metok": {...}}``, or switch METok off for itself with
``mm_processor_kwargs={"metok": "off"}``.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from metok_vllm.compression.ratios import to_micro

SERVER_ONLY = (
    *("profile", "prune_layers", "kv_layers", "aligner_model", "max_deferred_bytes", "status_shows_questions"),
    *("chat_template", "videos_at_once", "videos_waiting", "video_memory_mib", "shadow_rate"),
)
"""Keys that no request can change: they shape what is allocated at start, what all requests share,
or what the operator's status page shows.
"""

OF_THE_LATER_STAGES = (
    *("prune_layers", "kv_layers", "keep_ratio", "decode_retention", "quota", "score_rows", "frame_smoothing"),
    *("final_keep", "preset", "profile", "max_deferred_bytes", "status_shows_questions"),
)
"""Keys that say nothing of stage 1: with `stages` 1 nobody may state them."""

BALANCED: dict[str, Any] = {"decode_retention": 1.0, "quota": "video"}
"""What the preset `balanced` is, where nothing else is stated."""

BESIDE_NO_WINDOW = ("decode_retention", "final_keep")
"""What says by another rule than `kv_layers` where decoding keeps the KV of visual tokens."""

Share = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)]
Aligner = Literal["auto", "dual-tower", "embedding", "none"]


class MetokSettings(BaseModel):
    """The method's settings, with the paper's values as defaults (`docs/method.md`, sections 1 to 4).

    Raises:
        pydantic.ValidationError: on an unknown key, a wrong type or an impossible value. `parse_settings`
            turns it into one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["paper", "balanced"] = Field(
        default="paper",
        description='`balanced` is `decode_retention` 1 and `quota` "video": for open answers of many words.',
    )
    events: Annotated[StrictInt, Field(ge=1, le=1024)] = Field(
        default=5, description="Events that a video is cut into."
    )
    key_events: Annotated[StrictInt, Field(ge=0, le=1024)] = Field(
        default=3,
        description="Events that fit the question best and are kept finest. Nothing of the others passes the second "
        "pruning layer: state as many as `events` if users ask about the whole video.",
    )
    key_frames: Annotated[StrictInt, Field(ge=0, le=65536)] = Field(default=6, description="Best frames of each event.")
    strides: tuple[StrictInt, StrictInt, StrictInt] = Field(
        default=(2, 4, 8),
        description="Pooling of the three tiers of frames, finest first, relative to the tower's grid: from 1 to 64, "
        "none below the one before. Not set, a model whose tower merges patches (Qwen) has 1, 2, 4.",
    )
    stages: Literal[1, 3] = Field(
        default=3,
        description="1: events, tiers and pooling alone. Fewer tokens enter the language model; inside it all is stock's, "
        "and prefix caching works for videos. A server of `stages` 1 also takes pipeline parallelism "
        "and Qwen3.5, and no request can ask it for 3.",
    )
    prune_layers: tuple[StrictInt, StrictInt, StrictInt] | Literal["cheap"] | None = Field(
        default=None,
        description="The layers L1, L2, L3 before which visual tokens are pruned: three rising numbers. Not set: "
        "3, 10, 19 of 28, scaled to the model's depth. `cheap`: the nearest to these whose KV blocks need no padding, "
        "4, 10, 20 of 28. L3 must lie behind the layers in which the model reads the "
        "video, see [accuracy](accuracy.md).",
    )
    kv_layers: tuple[StrictInt, StrictInt] | None = Field(
        default=None,
        description="The first layer, and the one behind the last, in which decoding keeps the KV of what is alive of the "
        "visual tokens: below L1 all of them, from L3 up none. All other layers keep the KV of text alone. Not set: the "
        "layers below L1, and what `decode_retention` and `final_keep` add, which have no place beside it.",
    )
    keep_ratio: Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)] = Field(
        default=0.76, description="Share of a key event's tokens that passes each of L1 and L2; at most six decimals."
    )
    decode_retention: Share = Field(
        default=0.0,
        description="Share of the visual tokens alive after L2 whose KV decoding keeps in the layers L1 .. L3-1; at most "
        "six decimals.",
    )
    quota: Literal["event", "video"] = Field(
        default="event",
        description="Among which tokens the best survive L1 and L2: each event's, or the whole video's. As many survive.",
    )
    score_rows: Literal["text", "question"] = Field(
        default="text",
        description="Whose attention scores the visual tokens: that of all text behind the video, or of the question's "
        "own tokens, where the prompt shows which these are.",
    )
    frame_smoothing: Share = Field(
        default=0.0,
        description="Share of a token's score that is its frame's mean: above 0, frames survive or fall more as one; "
        "at most six decimals.",
    )
    final_keep: Share = Field(
        default=0.0,
        description="Share of the visual tokens alive after L2 that passes L3 too and owns KV from there to the last "
        "layer; at most six decimals. It forgives an L3 that comes a layer too early.",
    )
    token_budget: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Most visual tokens of one video; frames are pooled more coarsely until it fits."
    )
    aligner: Aligner = Field(default="auto", description="What tells how well a frame fits the question, see below.")
    aligner_model: str | None = Field(
        default=None, description="Name or path of a SigLIP or CLIP checkpoint for the aligner `dual-tower`."
    )
    profile: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="File of settings that `metok calibrate` found for this model; single keys beside it override its "
        "own. Not set: `metok_profile.json` in the model's folder, if there is one; `none` ignores that. See "
        "[calibration](calibration.md).",
    )
    max_deferred_bytes: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None,
        description="Memory for prompts that span several steps. Requests wait for it; one that could never fit is "
        "refused. Not set: two prompts of the longest length.",
    )
    chat_template: str | None = Field(
        default=None,
        description="The chat template (file or text) that prompts are rendered with, where it is not the checkpoint's: "
        "the question is found through it. `--plugin metok` takes it from `--chat-template`.",
    )
    status_shows_questions: StrictBool = Field(default=False, description="Let the status page show what users asked.")
    shadow_rate: Share = Field(
        default=0.0,
        description="Share of the requests with a compressed video that are asked once more with METok off, unseen and "
        "when the server has nothing else to do, to see how far the answers are from the model's own. See "
        "[calibration](calibration.md#in-live-traffic).",
    )
    videos_at_once: Annotated[StrictInt, Field(ge=1, le=256)] = Field(
        default=24, description="Video files that one API server process decodes at a time, each in a child process."
    )
    videos_waiting: Annotated[StrictInt, Field(ge=0, le=65536)] = Field(
        default=64, description="Video files that wait in one API server process; more are answered with 503."
    )
    video_memory_mib: Annotated[StrictInt, Field(ge=64, le=1_048_576)] = Field(
        default=4096,
        description="MiB that one API server process has for decoded frames and for decoders at work. Videos wait for "
        "it; one that could never fit is refused. Each decoder has 192 MiB more to open its file.",
    )

    @field_validator("stages", mode="before")
    @classmethod
    def _is_a_whole_number(cls, stages: object) -> object:
        return stages if type(stages) is int else repr(stages)  # True and 1.0 equal 1, and are no stages

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("preset") == "balanced":
            return {**BALANCED, **given_way(data), **data}
        return data

    @model_validator(mode="after")
    def _check(self) -> MetokSettings:
        if not 1 <= self.strides[0] <= self.strides[1] <= self.strides[2] <= 64:
            raise ValueError(f"strides must be from 1 to 64, none below the one before, not {list(self.strides)}")
        if isinstance(self.prune_layers, tuple):
            first, second, third = self.prune_layers
            if not 1 <= first < second < third:
                raise ValueError(f"prune_layers must rise and start at 1 or later, not {list(self.prune_layers)}")
        for name in ("keep_ratio", "decode_retention", "frame_smoothing", "final_keep"):
            _micro(name, getattr(self, name))
        self._check_window()
        return self

    def _check_window(self) -> None:
        if self.kv_layers is None:
            return
        first, end = self.kv_layers
        if not 0 <= first < end:
            raise ValueError(
                "kv_layers takes a first layer, from 0, and a higher one that is not in it any more, "
                f"not {list(self.kv_layers)}"
            )
        for name in BESIDE_NO_WINDOW:
            if getattr(self, name) > 0:
                raise ValueError(
                    f"'{name}' has no place beside kv_layers, which says in which layers decoding keeps visual "
                    "tokens: leave it out"
                )

    @property
    def keep_ratio_micro(self) -> int:
        """`keep_ratio` in millionths."""
        return _micro("keep_ratio", self.keep_ratio)

    @property
    def frame_smoothing_micro(self) -> int:
        """`frame_smoothing` in millionths."""
        return _micro("frame_smoothing", self.frame_smoothing)

    @property
    def final_keep_micro(self) -> int:
        """`final_keep` in millionths."""
        return _micro("final_keep", self.final_keep)

    @property
    def decode_retention_micro(self) -> int:
        """`decode_retention` in millionths."""
        return _micro("decode_retention", self.decode_retention)


class RequestSettings(MetokSettings):
    """What one request may state beside the method's settings."""

    query: str | None = Field(default=None, description="The question, where the last user turn is not it.")
    report: StrictBool = Field(
        default=False, description="Keep a report of this request: `GET /v1/metok/reports/{id of the response}`."
    )

    @model_validator(mode="after")
    def _has_a_report(self) -> RequestSettings:
        if self.report and self.stages == 1:
            raise ValueError("a report is about pruning, and with stages 1 there is none: leave out report")
        return self

    @field_validator("query")
    @classmethod
    def _is_text(cls, query: str | None) -> str | None:
        try:
            (query or "").encode()  # JSON can state half of a surrogate pair, which no tokenizer takes
        except UnicodeEncodeError:
            raise ValueError("query must be text, without unpaired surrogates") from None
        return query


def given_way(stated: Mapping[str, Any]) -> dict[str, Any]:
    """What a preset's or a profile's own `BESIDE_NO_WINDOW` become where a user states `kv_layers`."""
    return {} if stated.get("kv_layers") is None else dict.fromkeys(BESIDE_NO_WINDOW, 0.0)


def _micro(name: str, value: float) -> int:
    try:
        return to_micro(value)
    except ValueError:
        # Its range has been checked before.
        raise ValueError(f"{name} takes at most six decimals, not {value}") from None


def explain(error: ValidationError, where: str) -> str:
    """One sentence for the first fault that pydantic found in the settings given at `where`."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else "the settings"
    if first["type"] == "extra_forbidden":
        known: list[str] = list(MetokSettings.model_fields)
        if where == "mm_processor_kwargs":
            known = [name for name in RequestSettings.model_fields if name not in SERVER_ONLY]
        return f"METok ({where}): unknown setting '{key}'; the settings are {', '.join(known)}."
    if first["type"] == "value_error":
        return f"METok ({where}): {first['ctx']['error']}."
    given = reprlib.repr(first["input"])
    if first["type"] in ("missing", "too_long", "tuple_type"):
        numbers = "two whole numbers" if key == "kv_layers" else "three whole numbers"
        named = ' or "cheap"' if key == "prune_layers" else ""
        return f"METok ({where}): '{key}' got {given}: it takes a list of {numbers}{named}."
    return f"METok ({where}): '{key}' got {given}: {first['msg'][0].lower()}{first['msg'][1:]}."


def parse_settings(value: object, where: str = "additional_config") -> MetokSettings:
    """Parse the server's settings.

    Args:
        value: what stands under ``additional_config["metok"]``; None means the defaults.
        where: names the place in error messages.

    Raises:
        ValueError: with one sentence that names the faulty key and what it takes.
    """
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise ValueError(f"METok ({where}): the settings must be an object of keys and values, not {value!r}.")
    _refuse_later_stages(value, value.get("stages", 3), where, OR_ALL_STAGES)
    try:
        return MetokSettings.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(explain(error, where)) from None


OR_ALL_STAGES = ", or let stages be 3"


def _refuse_later_stages(stated: Mapping[str, object], stages: object, where: str, or_else: str) -> None:
    """Refuse keys without effect; `or_else`: what else would help.

    Raises:
        ValueError: one sentence.
    """
    if stages == 1 and (idle := [key for key in OF_THE_LATER_STAGES if key in stated]):
        raise ValueError(
            f"METok ({where}): with stages 1 nothing is pruned inside the model, so '{idle[0]}' has no effect: leave it "
            f"out{or_else}."
        )


def resolve_request(server: MetokSettings, value: object) -> RequestSettings | None:
    """Merge one request's overrides into the server's settings.

    Args:
        server: the server's settings.
        value: what stands under ``mm_processor_kwargs["metok"]``: None, "off", or an object.

    Returns:
        The request's settings, or None where METok is off for it.

    Raises:
        ValueError: with one sentence, which vLLM's API server answers with HTTP 400.
    """
    where = "mm_processor_kwargs"
    if value == "off":
        return None
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise ValueError(f"METok ({where}): 'metok' must be \"off\" or an object of settings, not {value!r}.")
    for key in SERVER_ONLY:
        if key in value:
            raise ValueError(f"METok ({where}): '{key}' belongs to the server; set it with --additional-config.")
    if server.stages == 1 and value.get("stages") == 3:
        raise ValueError(f"METok ({where}): this server was started with stages 1, so no request can have the others.")
    or_else = "" if server.stages == 1 else OR_ALL_STAGES
    _refuse_later_stages(value, value.get("stages", server.stages), where, or_else)
    base = server.model_dump()
    if "preset" in value:  # stated by the request, it decides what a preset is about
        base = {key: stated for key, stated in base.items() if key not in BALANCED}
    try:
        return RequestSettings.model_validate({**base, **value})
    except ValidationError as error:
        raise ValueError(explain(error, where)) from None
