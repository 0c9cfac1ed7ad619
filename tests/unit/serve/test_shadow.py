"""Comparisons in the background, without an engine: of which requests, when, and what is told of them."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.contract.forced import KL_LIMIT
from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.serve.shadow import traffic
from metok_vllm.serve.shadow.exchange import CURRENT, LONGEST_BODY, LONGEST_QUESTION, keep_answer, question_of
from metok_vllm.serve.shadow.record import OUTCOMES, WORST, Record
from metok_vllm.serve.shadow.replay import Comparison, Unrepeatable, compared
from metok_vllm.serve.shadow.traffic import WAITING, Shadow

SAME = Comparison(tokens=4, agreeing=4, kl=0.0, largest_kl=0.0)
BODY = json.dumps({"messages": [{"role": "user", "content": "What?"}]}).encode()


def logs(*probabilities: float) -> dict[int, float]:
    return {token: math.log(p) for token, p in enumerate(probabilities)}


# --- two models, one answer ---

distributions = st.lists(st.floats(0.01, 1), min_size=5, max_size=5, unique=True).map(
    lambda values: logs(*(value / sum(values) for value in values))
)


@given(st.lists(distributions, min_size=1, max_size=6))
def test_the_same_model_agrees_with_itself(steps: list[dict[int, float]]) -> None:
    greedy = [max(step, key=step.__getitem__) for step in steps]
    found = compared(steps, steps, greedy, [1] * len(steps))
    assert (found.agreeing, found.agreement) == (len(steps), 1)
    assert found.kl == pytest.approx(0, abs=1e-9)


def test_a_token_that_the_model_alone_would_not_have_chosen() -> None:
    stock, ours = [logs(0.9, 0.1), logs(0.2, 0.8)], [logs(0.9, 0.1), logs(0.7, 0.3)]
    found = compared(stock, ours, [0, 0], [1, 1])
    assert (found.tokens, found.agreeing, found.agreement) == (2, 1, 0.5)
    far = 0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3)
    assert found.kl == pytest.approx(far / 2)
    assert found.largest_kl == pytest.approx(far)


def test_a_token_drawn_at_random_counts_by_what_both_would_have_chosen() -> None:
    step = logs(0.6, 0.3, 0.1)
    assert compared([step], [step], [2], [3]).agreeing == 1
    assert compared([step], [logs(0.3, 0.6, 0.1)], [2], [3]).agreeing == 0


# --- what is remembered of a request ---


async def run_app(
    shadow: Shadow,
    body: list[bytes],
    answer: list[tuple[int, bool]] | None = None,
    video: bool = True,
    gone: bool = False,
) -> None:
    """One chat request; `answer` is a status with whether more follows, for each message that is sent."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": part, "more_body": part is not body[-1]} for part in body]
    parts += [{"type": "http.disconnect"}] if gone else []

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        if video:
            keep_answer()
        if gone:
            await receive()
        for status, more in answer or [(200, True), (200, False)]:
            await send({"type": "http.response.start", "status": status})
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    await shadow.serve(app, {}, receive, send)
    assert CURRENT.get() is None
    assert not parts, "the app read something else than what came"
    assert len(sent) == 2 * len(answer or [1, 2])


class Engines:
    """Engines that know each answer, and are idle unless told otherwise."""

    def __init__(self) -> None:
        self.idle = True
        self.known: Callable[[str], tuple[str, list[int]] | None] = lambda name: (f"id-{name}", [1, 2])

    async def answer(self, name: str) -> tuple[str, list[int]] | None:
        return self.known(name)

    async def is_idle(self) -> bool:
        return self.idle


class Comparing:
    """A comparison that takes as long as it is let, and counts how many run."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.bodies: list[bytes | None] = []
        self.running = self.most = self.cancelled = 0

    async def __call__(self, body: bytes | None, tokens: list[int]) -> Comparison:
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.let.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return SAME


def outcomes() -> dict[str, float]:
    return {one: FRONT_END.get_sample_value("metok_shadow_requests_total", {"outcome": one}) or 0 for one in OUTCOMES}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LOOK_S", 0.01)


@asynccontextmanager
async def at_work(shadow: Shadow) -> AsyncIterator[None]:
    task = asyncio.create_task(shadow.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def make(compare: Callable[..., Awaitable[Comparison]], engines: Engines | None = None, **options: Any) -> Shadow:
    return Shadow(options.pop("rate", 1.0), engines or Engines(), compare, options.pop("question", None), **options)


def ran(work: Callable[[], Coroutine[Any, Any, None]]) -> dict[str, float]:
    """Run `work`; which outcomes came of it."""
    Record()  # makes the metrics
    before = outcomes()
    asyncio.run(work())
    return {one: count - before[one] for one, count in outcomes().items() if count != before[one]}


def test_a_request_is_compared_with_all_that_it_said() -> None:
    async def work() -> None:
        comparing = Comparing()
        comparing.let.set()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY[:10], BODY[10:]])
            await until(lambda: shadow.record.shown()["requests"]["compared"] == 1)
        assert comparing.bodies == [BODY]
        assert shadow.record.shown()["agreement"] == 1

    assert ran(work) == {"compared": 1}


@pytest.mark.parametrize(
    "how",
    [
        {"video": False},
        {"answer": [(400, False)]},
        {"answer": [(200, True)]},
        {"gone": True},
    ],
)
def test_what_is_not_compared(how: dict[str, Any]) -> None:
    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY], **how)
            await asyncio.sleep(0.05)
        assert not comparing.bodies

    assert ran(work) == {}


def test_the_share_that_is_drawn() -> None:
    async def work() -> None:
        draws = iter([0.29, 0.3, 0.0, 0.99])
        comparing = Comparing()
        comparing.let.set()
        shadow = make(comparing, rate=0.3, draw=lambda: next(draws))
        async with at_work(shadow):
            for _ in range(4):
                await run_app(shadow, [BODY])
            await until(lambda: len(comparing.bodies) == 2)

    assert ran(work) == {"compared": 2}


def test_a_body_that_is_too_long_is_not_kept() -> None:
    async def work() -> None:
        comparing = Comparing()
        comparing.let.set()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [b"x" * LONGEST_BODY, b"y", b"z"])
            await until(lambda: bool(comparing.bodies))
        assert comparing.bodies == [None]

    ran(work)


# --- when ---


def test_a_client_ends_a_comparison_and_it_is_made_later() -> None:
    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await until(lambda: comparing.running == 1)
            with shadow.client():
                await until(lambda: comparing.cancelled == 1)
                await asyncio.sleep(0.05)
                assert comparing.running == 0, "somebody is being served"
            comparing.let.set()
            await until(lambda: shadow.record.shown()["requests"]["compared"] == 1)
        assert len(comparing.bodies) == 2

    assert ran(work) == {"compared": 1}


def test_another_servers_request_is_seen_in_the_engines() -> None:
    async def work() -> None:
        comparing, engines = Comparing(), Engines()
        shadow = make(comparing, engines)
        engines.idle = False
        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await asyncio.sleep(0.05)
            assert not comparing.bodies
            engines.idle = True
            await until(lambda: comparing.running == 1)
            engines.idle = False
            await until(lambda: comparing.cancelled == 1)

    assert ran(work) == {}


def test_one_at_a_time_and_few_that_wait() -> None:
    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await until(lambda: comparing.running == 1)
            for _ in range(WAITING + 3):
                await run_app(shadow, [BODY])
            comparing.let.set()
            await until(lambda: shadow.record.shown()["requests"]["compared"] == 1 + WAITING)
        assert comparing.most == 1

    assert ran(work) == {"compared": 1 + WAITING, "busy": 3}


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "PATIENCE_S", 0.1)

    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            with shadow.client():
                await run_app(shadow, [BODY])
                await until(lambda: shadow.record.shown()["requests"]["busy"] == 1)
        assert not comparing.bodies

    assert ran(work) == {"busy": 1}


def test_what_goes_wrong_with_one_is_nothing_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        errors: list[Exception | None] = [Unrepeatable("no"), RuntimeError("the answer got lost"), None]

        async def compare(body: bytes | None, tokens: list[int]) -> Comparison:
            error = errors.pop(0)
            if error is not None:
                raise error
            return SAME

        engines = Engines()
        shadow = make(compare, engines)
        async with at_work(shadow):
            for _ in range(3):
                await run_app(shadow, [BODY])
            await until(lambda: not errors)
            engines.known = lambda name: None
            await run_app(shadow, [BODY])
            await until(lambda: shadow.record.shown()["requests"]["failed"] == 2)

    with caplog.at_level(logging.WARNING):
        assert ran(work) == {"unrepeatable": 1, "failed": 2, "compared": 1}
    assert [record.getMessage() for record in caplog.records if "failed" in record.getMessage()] == [
        "METok: comparing a request with the model without METok failed: the answer got lost"
    ]


def test_the_end_of_the_server_ends_a_comparison() -> None:
    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await until(lambda: comparing.running == 1)
        await until(lambda: comparing.running == 0)
        assert comparing.cancelled == 1

    assert ran(work) == {}


# --- what is told ---


def test_the_worst_are_named_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    record = Record()
    with caplog.at_level(logging.WARNING):
        record.add("as-before", Comparison(10, 10, KL_LIMIT / 10, KL_LIMIT), None)
        for i in range(WORST + 2):
            record.add(f"r{i}", Comparison(10, 10 - i % 10, 0.1 * i, 1.0), "Who?" if i else None)
    shown = record.shown()
    assert len(shown["worst"]) == WORST
    assert shown["worst"][0]["request_id"] == "r9"
    assert shown["worst"][0]["question"] == "Who?"
    shares = [one["agreement"] for one in shown["worst"]]
    assert shares == sorted(shares)
    assert "as-before" not in str(shown)
    assert not any("as-before" in line.getMessage() for line in caplog.records)
    assert "METok: r9 is among" in caplog.text
    assert shown["tokens"] == 10 * (WORST + 3)


def test_without_any_there_is_no_share() -> None:
    shown = Record().shown()
    assert shown["agreement"] is None
    assert shown["requests"] == dict.fromkeys(OUTCOMES, 0)


def test_a_question_is_shown_on_one_line() -> None:
    turn = [{"type": "video_url", "video_url": {"url": "data:"}}, {"type": "text", "text": "a\nb" + "c" * 1000}]
    shown = question_of(json.dumps({"messages": [{"role": "user", "content": turn}]}).encode())
    assert shown.startswith("a\\nbc")
    assert "\n" not in shown
    assert len(shown) <= LONGEST_QUESTION + 10
    assert question_of(BODY) == "What?"
