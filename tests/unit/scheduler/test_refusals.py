"""Whatever reaches the scheduler with a video: it never raises, and what it cannot serve ends alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange
from vllm.outputs import RequestError
from vllm.v1.request import RequestStatus

from metok_vllm.contract.fields import EXTENT_FIELD, FRAME_TEXT_FIELD, PLAN_FIELD, QUESTION_FIELD
from metok_vllm.contract.refusals import NO_SESSIONS, no_prompt_logprobs
from metok_vllm.contract.spans import UnusableItem, pruned_spans
from metok_vllm.scheduler import scheduler
from tests.support.fakes import Limits, Prompt, item, plan
from tests.unit.scheduler.test_scheduler import Run

PLAN = plan(10, 4, 500_000)
GOOD = Prompt((3, 2, 5), (PLAN, plan(8, 3, 500_000)))
NUMBERS = PLAN.to_tensor()
LABELLED = plan(10, 4, 500_000, text=3).to_tensor()
TEXT = torch.tensor([1, 2, 0, 0, 0, 0, 0, 0, 5, 6, 7])


def with_number(position: int, value: int) -> torch.Tensor:
    numbers = NUMBERS.clone()
    numbers[position] = value
    return numbers


def video(given_plan: Any = NUMBERS, question: Any = ...) -> dict[str, Any]:
    return {PLAN_FIELD: given_plan, QUESTION_FIELD: torch.tensor([1, 7]) if question is ... else question}


BAD_ITEMS: dict[str, Any] = {
    "no data": None,
    "nothing in it": {},
    "no plan": {QUESTION_FIELD: torch.tensor([0])},
    "no question": {PLAN_FIELD: NUMBERS},
    "no tensor": video(None),
    "a list": video([1, 2, 3]),
    "floats": video(NUMBERS.float()),
    "32 bits": video(NUMBERS.int()),
    "an empty plan": video(torch.zeros(0, dtype=torch.int64)),
    "one number too few": video(NUMBERS[:-1]),
    "one number too many": video(torch.cat([NUMBERS, NUMBERS[:1]])),
    "zeros": video(torch.tensor([1] + [0] * (len(NUMBERS) - 1))),
    "a plan for fewer tokens": video(plan(9, 4).to_tensor()),
    "a plan for more tokens": video(plan(11, 4).to_tensor()),
    "a plan without METok for more tokens": video(plan(11, pruned=False).to_tensor()),
    "pruned without stage 1": video(replace(PLAN, compressed=False).to_tensor()),
    "other stages than its neighbour": video(replace(PLAN, pruned=False).to_tensor()),
    "more survivors than tokens": video(replace(PLAN, most_after_l1=11, most_after_l2=11).to_tensor()),
    "negative survivors": video(replace(PLAN, most_after_l2=-1).to_tensor()),
    "more than all retained": video(replace(PLAN, retention_micro=2_000_000).to_tensor()),
    "another retention than its neighbour": video(replace(PLAN, retention_micro=0).to_tensor()),
    "no frames": video(replace(PLAN, frames=0, frames_per_tier=(0, 0, 0)).to_tensor()),
    "frames in no tier": video(replace(PLAN, frames_per_tier=(1, 1, 1)).to_tensor()),
    "a stride of zero": video(replace(PLAN, strides=(0, 4, 8)).to_tensor()),
    "no such aligner": video(with_number(len(NUMBERS) - 2, 7)),
    "an aligner before the first": video(with_number(len(NUMBERS) - 2, -1)),
    "a dual tower without pixels": video(replace(PLAN, aligner="dual-tower").to_tensor()),
    "a question longer than it is": video(question=torch.tensor([9, 7])),
    "a question shorter than nothing": video(question=torch.tensor([-1, 7])),
    "a question of a negative token": video(question=torch.tensor([1, -7])),
    "a question without a length": video(question=torch.zeros(0, dtype=torch.int64)),
    "a question of floats": video(question=torch.tensor([1.0])),
    "no text of its frames": video(LABELLED),
    "no text of its frames, without METok": video(plan(10, text=3, pruned=False).to_tensor()),
    "text of other frames": video(LABELLED) | {FRAME_TEXT_FIELD: torch.tensor([3, 5, 6, 7])},
    "less text than the plan says": video(LABELLED) | {FRAME_TEXT_FIELD: TEXT[:-1]},
    "text of floats": video(LABELLED) | {FRAME_TEXT_FIELD: TEXT.float()},
    "text of a negative token": video(LABELLED) | {FRAME_TEXT_FIELD: -TEXT},
    "as much text as tokens": video(replace(PLAN, text_tokens=10).to_tensor()),
    "negative text": video(replace(PLAN, text_tokens=-1).to_tensor()),
    "more survivors than visual tokens": video(replace(plan(10, 4, 500_000, text=3), most_after_l1=8).to_tensor()),
}


def add(run: Run, request: Any) -> Any:
    """Let a request arrive as it is."""
    run.prompts[request.request_id] = GOOD
    run.scheduler.add_request(request)
    return request


def ends_alone(run: Run, bad: Any) -> None:
    """`bad` ends with an error and was never computed; who came before and who came after are served."""
    after = run.add(GOOD)
    before = run.scheduler.requests["r0"]
    later = run.scheduler.requests[after]
    run.finish()
    assert bad.status == RequestStatus.FINISHED_ERROR
    assert bad.num_computed_tokens == 0
    for other in (before, later):
        assert other.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert not run.scheduler._refusals
    assert not run.scheduler.slot_counts


@pytest.fixture
def run(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    base = make_config()
    return lambda limits: Run(base, limits, monkeypatch)


@pytest.fixture
def busy(run: Any) -> Run:
    running: Run = run(Limits())
    running.add(GOOD)
    return running


def test_the_good_request_is_good(busy: Run) -> None:
    assert len(busy.scheduler.slot_counts["r0"].spans) == 2
    busy.finish()


@pytest.mark.parametrize("bad", BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_a_bad_item(busy: Run, bad: Any) -> None:
    request = GOOD.request("bad")
    request.mm_features[0].data = None if bad is None else item(bad)
    with pytest.raises(UnusableItem) as error:
        pruned_spans(request.mm_features, request.num_prompt_tokens)
    assert "\n" not in str(error.value)
    ends_alone(busy, add(busy, request))
    assert busy.scheduler()["refused"]["features"] == 1


@pytest.mark.parametrize(
    "place",
    [PlaceholderRange(-1, 10), PlaceholderRange(3, 11), PlaceholderRange(10, 10), PlaceholderRange(90, 10)],
    ids=["before the prompt", "longer than the plan", "over the next", "behind the next"],
)
def test_a_bad_place(busy: Run, place: PlaceholderRange) -> None:
    request = GOOD.request("bad")
    request.mm_features[0].mm_position = place
    ends_alone(busy, add(busy, request))


def test_nothing_behind_the_last_video(busy: Run) -> None:
    ends_alone(busy, add(busy, Prompt((3, 0), (PLAN,)).request("bad")))


def test_prompt_logprobs(busy: Run) -> None:
    ends_alone(busy, add(busy, replace(GOOD, prompt_logprobs=0).request("bad")))
    assert busy.scheduler()["refused"]["prompt_logprobs"] == 1


def test_sessions(busy: Run) -> None:
    request = GOOD.request("bad")
    request.resumable = True
    add(busy, request)
    assert busy.scheduler._refusals == {"bad": ("session", NO_SESSIONS)}
    ends_alone(busy, request)


def test_a_text_session_that_goes_on_with_a_video(busy: Run) -> None:
    text = Prompt((4,)).request("bad")
    text.resumable = True
    add(busy, text)
    more = GOOD.request("bad")
    more.resumable = True
    add(busy, more)
    assert busy.scheduler._refusals == {"bad": ("session", NO_SESSIONS)}


def test_a_refused_request_may_be_aborted_first(busy: Run) -> None:
    add(busy, replace(GOOD, prompt_logprobs=1).request("bad"))
    busy.abort("bad")
    assert not busy.scheduler._refusals
    busy.finish()


def test_vllm_033_takes_the_sentence(busy: Run) -> None:
    """There the scheduler's errors are a dict, and one of this code is HTTP 400."""
    scheduler: Any = busy.scheduler
    scheduler.grammar_compile_error_reqs = errors = {}
    request = replace(GOOD, prompt_logprobs=1).request("bad")
    scheduler.add_request(request)
    for _ in range(2):
        scheduler._end_refused(request)
    assert errors == {"bad": RequestError("validation_error", f"METok: {no_prompt_logprobs()}")}
    assert scheduler()["refused"]["prompt_logprobs"] == 1


@pytest.mark.parametrize("pruned", [True, False])
def test_videos_that_reach_too_far_together(busy: Run, monkeypatch: pytest.MonkeyPatch, pruned: bool) -> None:
    """Neither of them alone; METok on or off."""
    monkeypatch.setattr(scheduler, "most_positions", lambda model_config: 336)
    one = PLAN if pruned else plan(10, pruned=False)
    request = Prompt((3, 2, 5), (one, one)).request("bad")
    for extent, feature in zip((169, 168), request.mm_features, strict=True):
        feature.data = item({**feature.data.get_data(), EXTENT_FIELD: torch.tensor(extent)})
    add(busy, request)
    sentence = "the prompt has videos with 337 positions in time, and this model has 336: send a shorter one, or fewer."
    assert busy.scheduler._refusals == {"bad": ("features", sentence)}
    ends_alone(busy, request)


def test_videos_that_reach_as_far_as_they_may(busy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "most_positions", lambda model_config: 336)
    request = GOOD.request("good")
    request.mm_features[0].data = item({**request.mm_features[0].data.get_data(), EXTENT_FIELD: torch.tensor(336)})
    add(busy, request)
    assert not busy.scheduler._refusals


ANYTHING = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.integers(-9, 99), max_size=25).map(lambda values: torch.tensor(values, dtype=torch.int64)),
    st.lists(st.integers(-9, 99), max_size=25).map(lambda values: torch.tensor(values, dtype=torch.float32)),
    st.builds(with_number, st.integers(0, len(NUMBERS) - 1), st.integers(-(2**63), 2**63 - 1)),
    st.builds(with_number, st.integers(0, len(NUMBERS) - 1), st.integers(-2, 12)),
)


def test_ids_beyond_the_vocabulary(busy: Run) -> None:
    """The scheduler knows the vocabulary, and the worker would look the ids up in it."""
    request = GOOD.request("bad")
    request.mm_features[0].data = item(video(LABELLED) | {FRAME_TEXT_FIELD: TEXT + 1_000 * (TEXT > 2)})
    ends_alone(busy, add(busy, request))


@given(
    fields=st.dictionaries(
        st.sampled_from([PLAN_FIELD, QUESTION_FIELD, FRAME_TEXT_FIELD, EXTENT_FIELD, "pixel_values_videos"]), ANYTHING
    ),
    place=st.tuples(st.integers(-3, 40), st.integers(0, 40)),
    moved=st.booleans(),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_item_makes_it_raise(run: Any, fields: Any, place: Any, moved: bool) -> None:
    running: Run = run(Limits())
    running.add(GOOD)
    request = GOOD.request("bad")
    request.mm_features[0].data = item(video() | fields)
    if moved:
        request.mm_features[0].mm_position = PlaceholderRange(*place)
    add(running, request)
    if "bad" in running.scheduler._refusals:
        ends_alone(running, request)
    else:
        spans = running.scheduler.slot_counts["bad"].spans if "bad" in running.scheduler.slot_counts else ()
        assert all(span.length == span.plan.tokens for span in spans)
