"""A request asked twice more, METok off and on, with the answer told: how much do the two agree?

The request is rendered by vLLM's own chat endpoint and given to the engine directly. What differs from the
client's: no streaming, one sample, no sampling. Distributions are the models' own, before temperature,
penalties or grammars.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.sampling_params import SamplingParams

from metok_vllm.contract.forced import (
    MOST_IDS,
    TOP,
    Step,
    choice,
    divergence,
    ids_to_compare,
    is_choice,
    read,
    told,
)
from metok_vllm.contract.request_ids import SHADOW

LONGEST_ANSWER = MOST_IDS
"""Tokens of an answer that are compared, from its first one on: the best alternative of each is looked up."""


class Unrepeatable(Exception):
    """The request cannot be asked again; says why."""


class Disturbed(Exception):
    """The server has no room for it now."""


@dataclass(frozen=True)
class Comparison:
    """One answer, with METok and without.

    Attributes:
        tokens: how many of the answer's were compared.
        agreeing: of how many both would have made the same choice.
        kl: nats, KL(without || with), the mean over the tokens.
        largest_kl: nats, of the token where they are farthest apart.
    """

    tokens: int
    agreeing: int
    kl: float
    largest_kl: float

    @property
    def agreement(self) -> float:
        return self.agreeing / self.tokens


def compared(stock: Sequence[Step], ours: Sequence[Step], answer: Sequence[int], ranks: Sequence[int]) -> Comparison:
    """What two models think of one answer.

    They agree on a token if METok's choice is the stock model's, or within `NEAR_TIE` of it
    (`contract/forced.py`). Where METok may have chosen a token that was not compared, they do not.

    Args:
        stock: METok off, each token's most probable alternatives.
        ours: METok on, at the same tokens.
        answer: the tokens.
        ranks: their places among METok's; 1 is its choice.
    """
    distances = [divergence(theirs, mine) for theirs, mine in zip(stock, ours, strict=True)]
    choices = [choice(*one) for one in zip(answer, ranks, ours, strict=True)]
    agreeing = sum(is_choice(step, one) for step, one in zip(stock, choices, strict=True))
    return Comparison(len(answer), agreeing, math.fsum(distances) / len(answer), max(distances))


class Replay:
    """Asks the engine of one HTTP server."""

    def __init__(self, state: Any) -> None:
        """`state` is the app's, with vLLM's chat endpoint and engine client."""
        self._state = state
        # What a body sets has passed the operator's check of it already (`--trust-request-mm-kwargs`).
        self._renderer = copy.copy(state.openai_serving_chat.online_renderer)
        self._renderer.trust_request_mm_kwargs = True

    async def compare(self, body: bytes | None, answer: Sequence[int]) -> Comparison:
        """Ask a request twice more.

        Args:
            body: what the client sent to `/v1/chat/completions`; None where it was too long to remember.
            answer: the tokens that it got.

        Raises:
            Unrepeatable: the request cannot be asked again.
            Disturbed: the server has no room for it now.
        """
        asked, tokens = _parsed(body), list(answer[:LONGEST_ANSWER])
        if not tokens:
            raise Unrepeatable("its answer is empty")
        stock, _ = await self._tell(_without_metok(asked), told(tokens, top=TOP), tokens)
        among = told(tokens, ids=ids_to_compare(stock))
        ours, ranks = await self._tell(_without_report(asked), among, tokens)
        return compared(stock, ours, tokens, ranks)

    async def _tell(
        self, body: Mapping[str, Any], params: SamplingParams, tokens: Sequence[int]
    ) -> tuple[list[dict[int, float]], list[int]]:
        try:
            rendered = await self._renderer.render_chat(ChatCompletionRequest.model_validate(body))
            if not isinstance(rendered, tuple):
                raise Unrepeatable(rendered.error.message)
            (prompt,) = rendered[1]
            outputs = self._state.engine_client.generate(prompt, params, f"{SHADOW}{uuid4().hex}")
            said = [output.outputs[0] async for output in outputs]
        except (ValueError, VLLMClientError) as error:  # as a client's request is refused
            raise Unrepeatable(str(error)) from error
        except GracefulHTTPError as error:
            raise Disturbed(str(error)) from error
        if not said or list(said[-1].token_ids) != tokens:
            raise Unrepeatable("the prompt leaves no room for the answer")
        return read(said[-1].logprobs)


def _parsed(body: bytes | None) -> dict[str, Any]:
    if body is None:
        raise Unrepeatable("it is too long to be remembered")
    asked: dict[str, Any] = json.loads(body)
    if asked.get("use_beam_search"):
        raise Unrepeatable("beam search tells no distribution")
    return {key: value for key, value in asked.items() if key not in ("stream", "stream_options", "n", "request_id")}


def _without_metok(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {**asked, "mm_processor_kwargs": {**(asked.get("mm_processor_kwargs") or {}), "metok": "off"}}


def _without_report(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As the client asked; but nobody fetches a report."""
    kwargs = asked.get("mm_processor_kwargs") or {}
    if not isinstance(kwargs.get("metok"), Mapping):
        return dict(asked)
    stated = {key: value for key, value in kwargs["metok"].items() if key != "report"}
    return {**asked, "mm_processor_kwargs": {**kwargs, "metok": stated}}
