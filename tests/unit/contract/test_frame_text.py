"""The text of a video's frames on its way from the front end to the worker."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalKwargsItem

from metok_vllm.contract.beside import with_fields
from metok_vllm.contract.fields import FRAME_TEXT_FIELD
from metok_vllm.contract.frame_text import FrameText, fits, of_field, text_tokens, to_field
from tests.support.fakes import feature, plan

VOCABULARY = 100
ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=4).map(tuple)
texts = st.lists(st.builds(FrameText, ids, ids), min_size=1, max_size=9)


def of(frames: list[FrameText]) -> tuple[torch.Tensor, object]:
    count = text_tokens(frames)
    video = replace(plan(count + 5, text=count), frames=len(frames), frames_per_tier=(len(frames), 0, 0))
    return to_field(frames), video


@given(texts)
def test_text_survives_its_field(frames: list[FrameText]) -> None:
    field, video = of(frames)
    assert field.dtype == torch.int64
    before, behind, laid = of_field(field, len(frames))
    assert before.tolist() == [len(one.before) for one in frames]
    assert behind.tolist() == [len(one.behind) for one in frames]
    assert laid.tolist() == [token for one in frames for token in (*one.before, *one.behind)]
    assert fits(field, video, VOCABULARY)  # type: ignore[arg-type]
    assert fits(field[None], video, None), "an item of a batch may keep the batch's dimension"  # type: ignore[arg-type]


def test_the_encoders_cache_tells_texts_apart() -> None:
    """Two videos of one `uuid` may have as many frames and as much text, and yet other text."""
    video = feature(3, plan(10, text=2))
    other = MultiModalKwargsItem({**video.data, FRAME_TEXT_FIELD: replace(video.data[FRAME_TEXT_FIELD])})
    other[FRAME_TEXT_FIELD].data = to_field([FrameText((5,), (5,)), *[FrameText()] * 3])
    names = [one.identifier for one in with_fields([video, video, replace(video, data=other)], {})]
    assert names[0] == names[1] != names[2]


FIELD = [1, 0, 0, 2, 0, 0, 0, 0, 5, 6, 7]  # of four frames
WRONG = {
    "nothing": [],
    "lengths cut short": FIELD[:7],
    "an id too few": FIELD[:-1],
    "an id too many": [*FIELD, 8],
    "other lengths": [1, 0, 0, 1, *FIELD[4:]],
    "a negative length": [4, -1, *FIELD[2:]],
    "a negative id": [*FIELD[:-1], -1],
    "an id beyond the vocabulary": [*FIELD[:-1], VOCABULARY],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_field_that_is_not_what_the_plan_says(what: str) -> None:
    video = plan(9, text=3)
    assert fits(torch.tensor(FIELD), video, VOCABULARY)
    assert not fits(torch.tensor(WRONG[what], dtype=torch.int64), video, VOCABULARY)


@given(st.lists(st.integers(-3, 12), max_size=14), st.integers(0, 8))
def test_what_fits_can_be_laid(numbers: list[int], count: int) -> None:
    field, video = torch.tensor(numbers, dtype=torch.int64), plan(9, text=count)
    if fits(field, video, 10):
        before, behind, laid = of_field(field, video.frames)
        assert min(*before.tolist(), *behind.tolist()) >= 0
        assert int(before.sum() + behind.sum()) == laid.shape[0] == count
