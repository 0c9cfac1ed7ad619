"""How many KV slots a pruned request needs in each kind of layer: what the scheduler reserves blocks by."""

from __future__ import annotations

from dataclasses import dataclass

from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, RELEASED, TEXT_AND_RETAINED, GroupKind
from metok_vllm.contract.spans import VideoSpan, final_bound, retained_bound, survivors_bound


@dataclass(frozen=True)
class SlotCounts:
    """Slots of one pruned request in the KV cache groups of all kinds but "every token".

    Worked out once, when it arrives.

    The layout of those slots is drawn in `metok_vllm/worker/slots.py`.
    """

    prompt_len: int
    spans: tuple[VideoSpan, ...]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the pruned videos in the prompt."""
        return sum(span.plan.visual_tokens for span in self.spans)

    @property
    def text_tokens(self) -> int:
        """All others in the prompt. So many slots a released group holds of it once it is complete."""
        return self.prompt_len - self.visual_tokens

    def slots(self, num_tokens: int, kind: GroupKind) -> int:
        """Slots that the first `num_tokens` tokens need in a group of some kind: an upper bound.

        In a released group every token of the prompt owns a slot until it is complete, and from the first
        generated token on text alone: exact, and the one case in which it shrinks.

        In all others it never shrinks as the tokens grow. Where decoding keeps no visual token it is exact
        wherever no video with text inside is cut in two, so once the prompt is complete. Which tokens of half
        such a video are text is known on the device alone, so as many of them as can be are taken for it.
        Nothing is lost by that: the deep layers write nothing before the prompt is complete, and by then all
        of that text owns a slot, so they never give a block back.

        Args:
            num_tokens: tokens from the start of the prompt, generated ones included.
            kind: of the group, one of `SHIFTED_KINDS`. Layers of the kind "text" keep what `final_keep` lets
                pass L3.
        """
        if kind == RELEASED:
            return num_tokens if num_tokens <= self.prompt_len else num_tokens - self.visual_tokens
        before = 0  # visual tokens among them, at least
        for span in self.spans:
            reached = min(max(num_tokens - span.start, 0), span.length)
            before += max(reached - span.plan.text_tokens, 0)
        kept = self._kept(kind) if num_tokens >= self.prompt_len else 0
        return num_tokens - before + kept

    def most_slots(self, num_tokens: int, kind: GroupKind) -> int:
        """Most slots that the request needs at any time on its way to `num_tokens` tokens."""
        return max(self.slots(num_tokens, kind), self.slots(min(num_tokens, self.prompt_len), kind))

    def _kept(self, kind: GroupKind) -> int:
        """Most visual tokens that decoding keeps in a group."""
        if kind == AFTER_L1:
            return survivors_bound(self.spans, 1)
        if kind == AFTER_L2:
            return survivors_bound(self.spans, 2)
        return retained_bound(self.spans) if kind == TEXT_AND_RETAINED else final_bound(self.spans)
