"""How many KV slots a pruned request needs in the deep layers: what the scheduler reserves blocks by."""

from __future__ import annotations

from dataclasses import dataclass

from metok_vllm.contract.spans import VideoSpan, retained_bound


@dataclass(frozen=True)
class SlotCounts:
    """Slots of one pruned request in the KV cache groups of the deep layers.

    Worked out once, when it arrives.

    The layout of those slots is drawn in `metok_vllm/worker/slots.py`.
    """

    prompt_len: int
    spans: tuple[VideoSpan, ...]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the pruned videos in the prompt."""
        return sum(span.length for span in self.spans)

    def slots(self, num_tokens: int, retains: bool) -> int:
        """Slots that the first `num_tokens` tokens need: exact without retention, an upper bound with it.

        Args:
            num_tokens: tokens from the start of the prompt, generated ones included.
            retains: whether the group's layers keep retained visual tokens (`L1 .. L3-1`).
        """
        before = sum(min(max(num_tokens - span.start, 0), span.length) for span in self.spans)
        retained = retained_bound(self.spans) if retains and num_tokens >= self.prompt_len else 0
        return num_tokens - before + retained
