"""Answers that the scheduler keeps for the HTTP server: whose, how long, and once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from metok_vllm.contract.beside import Beside
from metok_vllm.contract.request_ids import SHADOW
from metok_vllm.scheduler.answers import KEPT, KeptAnswers
from tests.support.fakes import Limits, Prompt, make_scheduler, plan, schedule

PROMPT = Prompt(text=(2, 3), videos=(plan(6),), answer=4)
ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_ABORTED)


@pytest.fixture(scope="module")
def base(make_config: Any) -> Any:
    return make_config()


def request(name: str, keep: str, prompt: Prompt = PROMPT) -> Any:
    made = prompt.request(name)
    Beside(prompt.length, keep_answer=keep).put(made.sampling_params)
    return made


def ended(name: str, keep: str, status: RequestStatus = RequestStatus.FINISHED_STOPPED) -> Any:
    made = request(name, keep)
    made._output_token_ids.extend([5, 6, -1])  # the last is one that a step still to come would have given
    made.status = status
    return made


def test_an_answer_is_there_once_it_has_ended(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(base, Limits(), monkeypatch)
    scheduler.add_request(request("chatcmpl-mine-0123abcd", "name"))
    scheduler.add_request(replace(PROMPT, answer=2).request("other"))
    while scheduler.requests:
        assert scheduler("name") is None
        schedule(scheduler).finish()
    assert scheduler("name") == {"request_id": "chatcmpl-mine", "tokens": [7] * 4}
    assert scheduler("name") is None, "it is handed out once"
    assert scheduler("") is None


def test_requests_of_clients_are_counted_and_metoks_own_are_not(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(base, Limits(), monkeypatch)
    told = PROMPT.request(f"{SHADOW}0-12345678")
    told.sampling_params.trace_decode_token_ids = [1]
    scheduler.add_request(told)
    assert scheduler()["requests"] == 0
    scheduler.add_request(PROMPT.request("chatcmpl-one-12345678"))
    assert scheduler()["requests"] == 1
    schedule(scheduler)
    assert scheduler()["prompt_tokens"] == {"pruned": PROMPT.length, "other": 0}


def test_a_client_that_calls_itself_metok_is_a_client(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(base, Limits(), monkeypatch)
    scheduler.add_request(PROMPT.request(f"{SHADOW}0-12345678"))
    assert scheduler()["requests"] == 1


def test_a_paused_engine_says_so(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(base, Limits(), monkeypatch)
    assert scheduler()["paused"] == 0
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert scheduler()["paused"] == 1


@pytest.mark.parametrize("status", ENDED)
def test_ends_of_an_answer(status: RequestStatus) -> None:
    answers = KeptAnswers()
    answers.ended(ended("chatcmpl-a-12345678", "name", status))
    assert answers.take("name") == {"request_id": "chatcmpl-a", "tokens": [5, 6]}


@pytest.mark.parametrize("status", [RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED])
def test_no_answer(status: RequestStatus) -> None:
    answers = KeptAnswers()
    answers.ended(ended("chatcmpl-a-12345678", "name", status))
    answers.ended(PROMPT.request("chatcmpl-a-12345678"))
    assert answers.take("name") is None


def test_of_several_samples_the_first() -> None:
    answers = KeptAnswers()
    answers.ended(ended("1_chatcmpl-a-12345678", "name"))
    assert answers.take("name") is None
    answers.ended(ended("0_chatcmpl-a-12345678", "name"))
    assert answers.take("name") == {"request_id": "chatcmpl-a", "tokens": [5, 6]}


def test_only_the_latest_are_kept() -> None:
    answers = KeptAnswers()
    for i in range(KEPT + 3):
        answers.ended(ended("chatcmpl-a-12345678", f"name {i}"))
    kept = [i for i in range(KEPT + 3) if answers.take(f"name {i}") is not None]
    assert kept == list(range(3, KEPT + 3))
