"""A pruned prompt that is turned away is not overtaken,
by vLLM 0.32's rule of the waiting queue and by vLLM 0.33's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from metok_vllm.scheduler.queue_order import QueueOrderScheduler
from tests.support.fakes import Limits, Prompt, plan
from tests.support.queue_rules import RULES, follow
from tests.unit.scheduler.test_scheduler import Run, workloads

LONG = 400
"""Steps without a start that mean for ever: two hundred newcomers and more have begun and ended by then."""


@pytest.fixture(params=list(RULES))
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    follow(request.param, monkeypatch)
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(make_config: Any) -> Any:
    return make_config()


@pytest.fixture
def run(base: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda limits: Run(base, limits, monkeypatch)


Start = tuple[Run, str, Callable[[], Prompt]]
"""A scheduler at work, the prompt that waits, and those that come after it."""


def begun(busy: Run, newcomer: Callable[[], Prompt], count: int) -> None:
    for _ in range(count):
        busy.add(newcomer())
        busy.step()


def deferral(run: Any) -> Start:
    """Rule 3. It needs 60 of 80 tokens of deferral. Newcomers need 24; two run at any time, begun one step
    apart, so one of them always holds some.
    """
    busy = run(Limits(step_tokens=16, requests=4, deferred_tokens=80, long_prefill=8))

    def newcomer() -> Prompt:
        return Prompt((4, 4), (plan(16),), answer=1)

    begun(busy, newcomer, 2)
    return busy, busy.add(Prompt((4, 4), (plan(52),), answer=1)), newcomer


def step_tokens(run: Any) -> Start:
    """Rule 2. Four answers run in steps of five tokens, and one ends in each step: the token that is left
    is too little for a pruned prompt and enough for a text.
    """
    busy = run(Limits(step_tokens=5, requests=5, blocks=2000))

    def newcomer() -> Prompt:
        return Prompt((1,), answer=5)

    begun(busy, newcomer, 5)
    return busy, busy.add(Prompt((4, 4), (plan(12),), answer=1)), newcomer


def encoder(run: Any) -> Start:
    """Its video stands first and needs 50 of 60 tokens of the encoder cache. Newcomers need 24; two run at
    any time, begun two steps apart, so one of them has not passed its video.
    """
    busy = run(Limits(step_tokens=16, requests=4, encoder_tokens=60, long_prefill=8))

    def newcomer() -> Prompt:
        return Prompt((0, 8), (plan(24),), answer=1)

    begun(busy, newcomer, 1)
    busy.step()
    begun(busy, newcomer, 1)
    return busy, busy.add(Prompt((0, 6), (plan(50),), answer=1)), newcomer


def ending(run: Any) -> Start:
    """Rule 4 asks of running prompts alone, and those have an order of their own: prompts of 20 and of 18
    tokens do not end in one step of 16.
    """
    busy = run(Limits(step_tokens=16, requests=4, deferred_tokens=200))
    busy.add(Prompt((4, 3), (plan(13),), answer=1))
    return busy, busy.add(Prompt((4, 3), (plan(11),), answer=1)), lambda: Prompt((4, 3), (plan(13),), answer=1)


CASES = {"deferral": (deferral, 10), "step tokens": (step_tokens, 7), "encoder": (encoder, 8), "ending": (ending, 3)}
"""How each case begins, and in which step the prompt that waits has been computed."""


def steps_until_computed(busy: Run, name: str, newcomer: Callable[[], Prompt], most: int) -> int | None:
    """Steps until the prompt of `name` is computed, while a newcomer arrives before each; None: never."""
    request = busy.scheduler.requests[name]
    for step in range(1, most + 1):
        busy.add(newcomer())
        busy.step()
        if request.num_computed_tokens >= request.num_prompt_tokens:
            return step
    return None


@pytest.mark.parametrize("case", CASES)
def test_newcomers_do_not_overtake_it(run: Any, rule: str, case: str) -> None:
    begin, expected = CASES[case]
    busy, name, newcomer = begin(run)
    assert steps_until_computed(busy, name, newcomer, LONG) == expected
    busy.finish()


@pytest.fixture
def unmended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        QueueOrderScheduler, "_handle_blocked_waiting_request", AsyncScheduler._handle_blocked_waiting_request
    )


@pytest.mark.usefixtures("unmended")
@pytest.mark.parametrize("case", ["deferral", "step tokens", "encoder"])
def test_without_the_mend_they_do_for_ever_by_the_rule_of_033(run: Any, rule: str, case: str) -> None:
    begin, expected = CASES[case]
    busy, name, newcomer = begin(run)
    found = steps_until_computed(busy, name, newcomer, LONG)
    assert found == (expected if rule == "vLLM 0.32" else None)
    assert found or sum(other not in busy.scheduler.requests for other in busy.prompts) > LONG // 2


def test_nobody_waits_behind_a_request_that_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("vLLM 0.33", monkeypatch)
    busy = run(Limits())
    refused = busy.add(Prompt((4, 4), (plan(10),), prompt_logprobs=1))
    other = busy.add(Prompt((4, 4), (plan(10),)))
    busy.step()
    assert busy.scheduler.requests[other].num_computed_tokens == 18
    assert refused not in busy.scheduler.requests


@given(workload=workloads(), pauses=st.lists(st.integers(0, 3), min_size=7, max_size=7))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_rules_give_the_same_steps(base: Any, workload: Any, pauses: list[int]) -> None:
    """What tests by 0.32's rule show of chunks, memory and endings then holds by 0.33's too."""
    limits, asked = workload
    assume(all(video.pruned for prompt in asked for video in prompt.videos))  # vLLM's own are treated as by vLLM
    by_032, by_033 = (steps_of(base, limits, asked, pauses, rule) for rule in RULES)
    assert by_032 == by_033


def steps_of(base: Any, limits: Limits, asked: list[Prompt], pauses: list[int], rule: str) -> list[dict[str, int]]:
    """Tokens of every request in every step, with pauses of so many steps between the arrivals."""
    with pytest.MonkeyPatch.context() as patch:
        follow(rule, patch)
        busy = Run(base, limits, patch)
        steps = []
        for prompt, pause in zip(asked, pauses, strict=False):
            busy.add(prompt)
            steps += [busy.step() for _ in range(pause)]
        while busy.scheduler.requests:
            steps.append(busy.step())
        return steps
