"""What one engine start is asked, and what it answers: plain data that travels as JSON files.

Every choice of `prune_layers` needs an engine of its own, and every other setting is a request's. So a job is
one engine, with as many variants of the request's settings as are wanted at its layers.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 4
"""Of these files: what an earlier one says is not read."""


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StockAnswer(_Plain):
    """The stock model's own answer, greedily."""

    tokens: list[int]
    steps: list[dict[int, float]]  # the log-probabilities of the most probable tokens at each
    text: str = ""


class Asked(_Plain):
    """One question about one video file."""

    video: str
    question: str
    video_mark: str = ""  # what tells that the file is still the same
    stock: StockAnswer | None = None  # None: it is asked of the engine first


class Variant(_Plain):
    """One way to answer, for some of the questions."""

    name: str
    metok: dict[str, Any] | Literal["off"] = "off"  # of the request
    with_video: bool = True
    of: list[int] | None = None  # which questions; None: all


class Job(_Plain):
    """One engine."""

    format: int = FORMAT
    model: str
    model_mark: str  # what tells that the model is still the same
    plugin: str  # version
    vllm: str = ""  # the same
    engine: dict[str, Any]  # keyword arguments of `vllm.LLM`
    server: dict[str, Any]  # METok's settings of the server
    answer_tokens: int
    asked: list[Asked]
    variants: list[Variant]

    def name(self) -> str:
        """The same for the same work alone."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:24]

    @property
    def requests(self) -> int:
        """How many requests it makes of the engine."""
        fresh = sum(one.stock is None for one in self.asked)
        return fresh + sum(len(self.asked) if v.of is None else len(v.of) for v in self.variants)


class Counts(_Plain):
    """Visual tokens and costs of one request, as METok's report states them."""

    stock: int
    encoded: int
    after_l1: int
    after_l2: int
    retained: int
    after_l3: int
    text: int
    frames: int
    flops: int
    flops_stock: int
    kv_bytes: int
    kv_bytes_stock: int


class Told(_Plain):
    """One question under one variant."""

    index: int  # among the job's questions
    kl: float
    harm: float
    agrees: bool
    prompt_tokens: int
    counts: Counts | None = None  # None where METok is off


class Facts(_Plain):
    """What the engine knows of its model."""

    layers: int
    strides: tuple[int, int, int]
    first_layer: int  # the earliest that L1 may be
    shape: dict[str, int]  # `ModelShape`
    frame_group: int  # sampled frames that are one frame to the model
    element_bytes: int  # of a number in the KV cache
    vllm: str


class Result(_Plain):
    """A job done."""

    facts: Facts
    stock: list[StockAnswer]  # of every question
    told: dict[str, list[Told]]  # by the variant's name
    seconds: float
