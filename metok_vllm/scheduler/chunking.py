"""The four rules by which a pruned prompt is cut into chunks
(a chunk: the part of a prompt that one step computes).

1. No chunk crosses the end of the prompt. What a preempted request had generated attends to the KV that
   decoding keeps, as it did the first time. So it is computed in steps of its own.
2. No chunk has one token. vLLM runs such a chunk as a decode, possibly inside a full CUDA graph, which knows
   neither scoring nor deferral.
3. A prompt that does not fit one step is deferred. All deferred prompts together never take more than
   `max_deferred_bytes`.
4. Deferred prompts that end in the same step are together no longer than one step, or one of them is alone.
   The deep layers run on whole prompts, and memory is reserved for that much (`worker/memory.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class EncoderSchedule(NamedTuple):
    """What vLLM's `_try_schedule_encoder_inputs` answers about one request;
    vLLM takes it apart as a plain tuple.
    """

    encoder_inputs: list[int]  # which of the request's items the encoder runs in this step
    num_tokens: int  # length of the chunk; 0: the request is left out of this step
    encoder_budget: int  # encoder tokens left for others
    external_inputs: list[int]
    duplicate_inputs: list[int]

    @classmethod
    def nothing(cls, encoder_budget: int) -> EncoderSchedule:
        """The request is left out of this step."""
        return cls([], 0, encoder_budget, [], [])


def longest_chunk(computed: int, wanted: int, prompt_len: int, item_starts: Collection[int]) -> int:
    """Rules 1 and 2: the longest chunk that keeps them,
    of at most `wanted` tokens from position `computed` on.

    Args:
        computed: tokens of the prompt computed so far.
        wanted: tokens that the step has room for.
        prompt_len: tokens of the whole prompt.
        item_starts: positions of the request's multimodal items. vLLM ends a chunk before an item that it
            cannot encode yet, so a chunk that ends one token before an item could force the next one to have
            a single token.

    Returns:
        Tokens of the chunk; 0 where there is none in this step.
    """
    end = min(computed + wanted, prompt_len)
    while end > computed and (end + 1 == prompt_len or end + 1 in item_starts):
        end -= 1
    return end - computed if end - computed > 1 else 0


@dataclass
class DeferralBudget:
    """Rule 3: bytes of the prompts that are being deferred."""

    bytes_per_token: int
    limit: int  # most bytes of all of them together
    held: dict[str, int] = field(default_factory=dict)  # by request: those that have begun and not ended
    offered: dict[str, int] = field(default_factory=dict)  # and those offered a first chunk in the step being scheduled

    def needs(self, prompt_len: int) -> int:
        """Bytes of a deferred prompt."""
        return prompt_len * self.bytes_per_token

    def admits(self, request_id: str, prompt_len: int) -> bool:
        """Whether this prompt may be deferred beside the others."""
        reserved = {**self.held, **self.offered}
        return request_id in reserved or sum(reserved.values()) + self.needs(prompt_len) <= self.limit

    def offer(self, request_id: str, prompt_len: int) -> None:
        """The request is offered a chunk that does not end its prompt."""
        self.offered[request_id] = self.needs(prompt_len)

    def settle(self, deferred: Mapping[str, int]) -> None:
        """After a step: `deferred` are the prompt lengths of the requests
        whose prompts have begun and not ended.

        A request that was offered a chunk may have found no blocks for it, so what was really scheduled
        counts.
        """
        self.held = {request_id: self.needs(prompt_len) for request_id, prompt_len in deferred.items()}

    def forget(self, request_id: str) -> None:
        self.held.pop(request_id, None)
        self.offered.pop(request_id, None)


@dataclass
class EndingLimit:
    """Rule 4: prompt tokens of the deferred prompts that end in the step being scheduled."""

    limit: int
    ending: dict[str, int] = field(default_factory=dict)  # prompt lengths, by request

    def admits(self, request_id: str, prompt_len: int) -> bool:
        """Whether this deferred prompt may end in the step too."""
        others = sum(tokens for other, tokens in self.ending.items() if other != request_id)
        return not others or others + prompt_len <= self.limit

    def forget(self, request_id: str) -> None:
        self.ending.pop(request_id, None)
