"""How many KV slots a pruned request needs in the deep layers: what the scheduler reserves blocks by."""

from __future__ import annotations

from dataclasses import dataclass

from metok_vllm.contract.spans import VideoSpan, final_bound, retained_bound


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
        return sum(span.plan.visual_tokens for span in self.spans)

    def slots(self, num_tokens: int, retains: bool) -> int:
        """Slots that the first `num_tokens` tokens need: an upper bound, which never shrinks as they grow.

        Where decoding keeps no visual token it is exact wherever no video with text inside is cut in two, so
        once the prompt is complete. Which tokens of half such a video are text is known on the device alone,
        so as many of them as can be are taken for it. Nothing is lost by that: the deep layers write nothing
        before the prompt is complete, and by then all of that text owns a slot, so no block is ever given
        back.

        Args:
            num_tokens: tokens from the start of the prompt, generated ones included.
            retains: whether the group's layers keep retained visual tokens (`L1 .. L3-1`); else they are
                those from L3 up, which keep what `final_keep` lets pass.
        """
        before = 0  # visual tokens among them, at least
        for span in self.spans:
            reached = min(max(num_tokens - span.start, 0), span.length)
            before += max(reached - span.plan.text_tokens, 0)
        kept = 0
        if num_tokens >= self.prompt_len:
            kept = retained_bound(self.spans) if retains else final_bound(self.spans)
        return num_tokens - before + kept
