"""Text inside a video's tokens: laid around each frame once stage 1 has chosen (docs/method.md section 1.7).

How much text each frame has is known in advance, and where it stands follows from the tiers. So sizes are
known on the host, and nothing here waits for the GPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .ordering import true_indices


@dataclass(frozen=True)
class TextLayout:
    """Where the n visual tokens and the t text tokens of one video stand among its n + t."""

    visual: Tensor  # int64 [n], ascending: row of each visual token
    text: Tensor  # int64 [t], ascending: row of each text token
    frame: Tensor  # int64 [n + t], frame of each row
    is_text: Tensor  # bool [n + t]

    def filled(self, visual: Tensor, text: Tensor) -> Tensor:
        """The rows of a video, [n + t, C], type of `visual`.

        Args:
            visual: [n, C].
            text: [t, D] with `D <= C`. The channels that it lacks are zero.
        """
        rows = visual.new_zeros(self.frame.shape[0], visual.shape[1])
        rows.index_copy_(0, self.visual, visual)
        rows[:, : text.shape[1]].index_copy_(0, self.text, text.to(visual.dtype))
        return rows


def lay_text(frame: Tensor, closes: Tensor, before: Tensor, behind: Tensor, text_tokens: int) -> TextLayout:
    """Lay each frame's text before and behind its visual tokens.

    A separator that closes an event stands behind its last frame, and so behind that frame's trailing text:
    the text belongs to the frame, the separator to the event. Separators behind rows stay inside the frame.

    Args:
        frame: int64 [n], frame of each visual token, never decreasing; a separator has that of the frame
            before it.
        closes: bool [n], the separators that stand behind a frame. They are the last of its tokens.
        before: int64 [T], text tokens before each frame's first token.
        behind: int64 [T], text tokens behind its last.
        text_tokens: sum of `before` and `behind`, known on the host.
    """
    both = before + behind
    earlier = both.cumsum(0) - both  # text of the frames before
    tokens = frame.shape[0]
    rows = torch.arange(tokens, device=frame.device) + (earlier + before)[frame]
    rows = rows + torch.where(closes, behind[frame], 0)
    is_text = torch.ones(tokens + text_tokens, dtype=torch.bool, device=frame.device).index_fill_(0, rows, False)
    text = true_indices(is_text, text_tokens)
    frames = torch.arange(before.shape[0], device=frame.device)
    of_text = torch.repeat_interleave(frames, both, output_size=text_tokens)
    of_rows = torch.empty_like(is_text, dtype=torch.int64)
    of_rows.index_copy_(0, rows, frame).index_copy_(0, text, of_text)
    return TextLayout(rows, text, of_rows, is_text)


def last_of_events(event: Tensor) -> Tensor:
    """The last token of each event, bool [n], of `event` int64 [n], never decreasing, n at least 1."""
    end = torch.ones(1, dtype=torch.bool, device=event.device)
    return torch.cat([event[1:] != event[:-1], end])
