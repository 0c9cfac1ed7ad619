"""Where the text that labels frames stands among a video's visual tokens, against plain loops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.text_layout import TextLayout, last_of_events, lay_text
from tests.support.guards.host_sync import no_host_sync


class Frame(NamedTuple):
    tokens: int
    before: int
    behind: int
    separators: int  # behind it


frames = st.lists(st.builds(Frame, st.integers(1, 5), *[st.integers(0, 3)] * 3), min_size=1, max_size=12)


def lay(video: list[Frame]) -> TextLayout:
    frame = [i for i, one in enumerate(video) for _ in range(one.tokens + one.separators)]
    closes = [place >= one.tokens for one in video for place in range(one.tokens + one.separators)]
    before, behind = ([getattr(one, name) for one in video] for name in ("before", "behind"))
    host = [torch.tensor(values) for values in (frame, closes, before, behind)]
    with no_host_sync():
        return lay_text(host[0], host[1], host[2], host[3], sum(before) + sum(behind))


@given(frames)
def test_text_stands_around_its_frame_and_separators_behind_it(video: list[Frame]) -> None:
    layout = lay(video)
    kinds = [
        (i, kind)
        for i, one in enumerate(video)
        for kind in ["text"] * one.before
        + ["visual"] * one.tokens
        + ["text"] * one.behind
        + ["visual"] * one.separators
    ]
    assert layout.frame.tolist() == [frame for frame, _ in kinds]
    assert layout.is_text.tolist() == [kind == "text" for _, kind in kinds]
    assert layout.text.tolist() == [row for row, (_, kind) in enumerate(kinds) if kind == "text"]
    assert layout.visual.tolist() == [row for row, (_, kind) in enumerate(kinds) if kind == "visual"]


@given(frames)
def test_rows_keep_their_order_and_text_has_zeros_beside_it(video: list[Frame]) -> None:
    layout = lay(video)
    n, t = layout.visual.shape[0], layout.text.shape[0]
    visual = torch.arange(1.0, 1 + 5 * n).view(n, 5).to(torch.bfloat16)
    text = -torch.arange(1.0, 1 + 3 * t).view(t, 3)
    with no_host_sync():
        rows = layout.filled(visual, text)
    assert rows.dtype == visual.dtype
    assert torch.equal(rows[layout.visual], visual)
    assert torch.equal(rows[layout.text, :3], text.to(visual.dtype))
    assert not rows[layout.text, 3:].any()


def test_by_hand() -> None:
    # "a [V V] b" of frame 0, then "[V]" of frame 1 and the event's separator, then "c d [V]" of frame 2.
    layout = lay([Frame(2, 1, 1, 0), Frame(1, 0, 0, 1), Frame(1, 2, 0, 0)])
    assert layout.visual.tolist() == [1, 2, 4, 5, 8]
    assert layout.text.tolist() == [0, 3, 6, 7]
    assert layout.frame.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_the_last_token_of_each_event() -> None:
    event = torch.tensor([0, 0, 1, 2, 2, 2])
    with no_host_sync():
        last = last_of_events(event)
    assert last.tolist() == [False, True, True, False, False, True]
    assert last_of_events(event[:1]).tolist() == [True]
