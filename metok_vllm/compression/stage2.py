"""Stage 2 as one place: scores to how many tokens each event keeps, and which (docs/method.md section 2).

The engine, the accuracy benchmark and the witness all choose by this. The scores come from `scoring.py` or
its kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .events import event_lengths
from .ordering import true_indices
from .selection import PruningLayer, keep_counts, select_per_event


@dataclass(frozen=True)
class EventCounts:
    """Tokens that every event of one video has before L1, keeps at L1 and keeps at L2; each int64 [events].

    Tokens stand event after event, so the counts are also the lengths of the events' runs. At L3 no event
    keeps any. With `quota` "video" the whole video is one run, of the same totals.
    """

    before: Tensor
    after_l1: Tensor
    after_l2: Tensor

    @classmethod
    def of(cls, event: Tensor, is_key: Tensor, ratio_micro: int) -> "EventCounts":
        """Counts of a video, on the device of its inputs; nothing waits for it.

        Args:
            event: int64 [n], event of each token after stage 1.
            is_key: bool [events].
            ratio_micro: `keep_ratio` in millionths.
        """
        before = event_lengths(event, is_key.shape[0])
        after_l1 = keep_counts(before, is_key, ratio_micro, 1)
        return cls(before, after_l1, keep_counts(after_l1, is_key, ratio_micro, 2))

    def over_the_video(self) -> "EventCounts":
        """With `quota` "video": the sums over the events, each int64 [1].

        How many survive is the same as by event, whatever the scores say, so nothing that is reserved or read
        back changes. How many an event keeps is then a matter of its scores.
        """
        return EventCounts(*(counts.sum().view(1) for counts in (self.before, self.after_l1, self.after_l2)))


def select_survivors(scores: Tensor, lengths: Tensor, keep: Tensor, total: int) -> Tensor:
    """The best tokens of every event. The rule of the kernel `select_per_event`.

    Args:
        scores: float32 [n], event after event; several videos may stand behind one another.
        lengths: int64 [events], of each event's run, or of a whole video's; they sum up to n.
        keep: int64 [events], how many of each, at most `lengths`.
        total: sum of `keep`, known on the host.

    Returns:
        int64 [total], ascending indices into `scores`. Ties keep the lower index; see
        `selection.select_per_event`.
    """
    events = torch.arange(lengths.shape[0], device=lengths.device)
    event = torch.repeat_interleave(events, lengths, output_size=scores.shape[0])
    return true_indices(select_per_event(scores, event, keep), total)


def survivor_mask(scores: Tensor, counts: EventCounts, pruning_layer: PruningLayer) -> Tensor:
    """Stage 2 of one video at one pruning layer, for a runner that need not avoid reading from the device.

    Args:
        scores: float32 [n], of the video's tokens alive before the layer.
        counts: the video's.
        pruning_layer: 1, 2 or 3.

    Returns:
        bool [n], the tokens that go on.
    """
    mask = torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    if pruning_layer == 3:
        return mask
    lengths, keep = (counts.before, counts.after_l1) if pruning_layer == 1 else (counts.after_l1, counts.after_l2)
    return mask.index_fill_(0, select_survivors(scores, lengths, keep, int(keep.sum())), True)
