"""What a run shows, and the one comparison by which the engine is judged against the oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

Logprobs = Tensor | Sequence[Mapping[int, float]]


@dataclass
class VideoTrace:
    """Decisions about one video of T frames. Positions are prompt positions after stage 1."""

    span: tuple[int, int] | None = None  # first position, one past the last
    events: list[tuple[int, int]] | None = None  # frames [start, stop)
    key_events: list[int] | None = None
    strides: list[int] | None = None  # one a frame
    relevance: list[float] | None = None  # r, one a frame
    after_l1: list[int] | None = None
    after_l2: list[int] | None = None
    after_l3: list[int] | None = None


@dataclass
class OracleResult:
    """One request's outcome. An engine fills in what it can observe; the other fields stay None.

    `logprobs` has one row a generated token: the oracle's is the whole log-softmax, float32 [steps,
    vocabulary]; an engine's may be its top entries, a mapping from token id to natural logarithm a step.
    """

    prompt_ids: list[int]  # every placeholder written out
    tokens: list[int]  # the best token of each step, whatever was fed next
    logprobs: Logprobs
    videos: list[VideoTrace] | None = None
    prune_layers: tuple[int, int, int] | None = None
    retained: list[int] | None = None  # prompt positions kept in layers L1 .. L3-1 while decoding
    kv_positions: list[list[int]] | None = None  # prompt positions with KV while decoding, for each layer
    cosine_margin: float = math.inf  # smallest difference of cosines that a stage 1 decision rested on
    score_margin: float = math.inf  # smallest relative difference of attention scores at a stage 2 decision

    @property
    def kv_tokens(self) -> list[int] | None:
        """How many prompt tokens hold KV in each layer while decoding."""
        return None if self.kv_positions is None else [len(layer) for layer in self.kv_positions]

    def top_logprobs(self, count: int) -> list[dict[int, float]]:
        """The `count` best tokens of each step with their log-probabilities, best first."""
        if not isinstance(self.logprobs, Tensor):
            return [dict(sorted(row.items(), key=lambda item: -item[1])[:count]) for row in self.logprobs]
        best = self.logprobs.topk(count)
        return [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def assert_same(expected: OracleResult, observed: OracleResult, atol: float) -> None:
    """Fail with the first difference between two runs of one request.

    Prompts, tokens and every decision that both runs state must be equal; log-probabilities and relevances
    within `atol`. `expected` must be an oracle's (whole rows); `observed` may hold fewer entries a step, the
    chosen token among them. The margins are not compared: they describe how close a call was.
    """
    assert isinstance(expected.logprobs, Tensor), "the expected side must be an oracle's result"
    _same("prompt_ids", expected.prompt_ids, observed.prompt_ids)
    # Log-probabilities come before tokens: "differs by 0.7" says more about a wrong run than "8 is not 5".
    _same("number of steps", len(expected.tokens), len(observed.tokens))
    _same("rows of logprobs", len(expected.tokens), len(observed.logprobs))
    for step, row in enumerate(expected.logprobs):
        _same_logprobs(step, row, observed, atol)
        _same(f"token of step {step}", expected.tokens[step], observed.tokens[step])
    for name in ("prune_layers", "retained", "kv_positions"):
        _same_if_both(name, getattr(expected, name), getattr(observed, name))
    if expected.videos is not None and observed.videos is not None:
        _same("number of videos", len(expected.videos), len(observed.videos))
        for number, (ours, theirs) in enumerate(zip(expected.videos, observed.videos, strict=True)):
            _same_video(f"video {number}", ours, theirs, atol)


def _same_logprobs(step: int, row: Tensor, observed: OracleResult, atol: float) -> None:
    given = observed.logprobs[step]
    if isinstance(given, Tensor):
        _same(f"vocabulary at step {step}", len(row), len(given))
        worst = (row - given).abs().max().item()
        assert worst <= atol, f"logprobs of step {step} differ by {worst:.3g}, more than {atol:g}"
        return
    assert observed.tokens[step] in given, f"step {step} states no logprob for its own token"
    for token, value in given.items():
        ours = row[token].item()
        assert abs(ours - value) <= atol, (
            f"logprob of token {token} at step {step}: expected {ours:.6f}, observed {value:.6f}"
        )


def _same_video(label: str, ours: VideoTrace, theirs: VideoTrace, atol: float) -> None:
    for field in fields(VideoTrace):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name != "relevance":
            _same_if_both(f"{label}: {field.name}", a, b)
        elif a is not None and b is not None:
            _same(f"{label}: frames with relevance", len(a), len(b))
            worst = max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
            assert worst <= atol, f"{label}: relevance differs by {worst:.3g}, more than {atol:g}"


def _same_if_both(label: str, expected: object, observed: object) -> None:
    if expected is not None and observed is not None:
        _same(label, expected, observed)


def _same(label: str, expected: object, observed: object) -> None:
    assert expected == observed, f"{label}: expected {expected!r}, observed {observed!r}"
