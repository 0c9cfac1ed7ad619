"""Comparisons in the background, without an engine: of which requests, when, and what is told of them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.exceptions import QueueOverflowError, VLLMValidationError

from metok_vllm.contract.forced import KL_LIMIT, MOST_IDS, NEAR_TIE, TOP, ids_to_compare
from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.contract.request_ids import is_shadow
from metok_vllm.serve.shadow import record as record_module
from metok_vllm.serve.shadow import traffic
from metok_vllm.serve.shadow.engines import EnginesGone, LiveEngines
from metok_vllm.serve.shadow.exchange import CURRENT, LONGEST_BODY, LONGEST_QUESTION, keep_answer, question_of
from metok_vllm.serve.shadow.record import OUTCOMES, WORST, Record
from metok_vllm.serve.shadow.replay import Comparison, Disturbed, Replay, Unrepeatable, compared
from metok_vllm.serve.shadow.traffic import TRIES, WAITING, Shadow
from tests.support.logged import Logged

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
    assert compared([step], [{2: -0.1}], [2], [3]).agreeing == 0, "nothing else is known of it"
    stock = {7: -0.70, 8: -0.75}
    assert compared([stock], [{7: -3.0, 8: -2.5}], [7], [3]).agreeing == 0, "METok's best is not among these"
    assert compared([stock], [{7: -3.0, 8: -0.6}], [7], [9]).agreeing == 1, "none of the others can be ahead"


def test_no_number_is_no_agreement() -> None:
    step, nothing = logs(0.6, 0.3, 0.1), dict.fromkeys(range(3), math.nan)
    for one in (compared([step], [nothing], [0], [0]), compared([nothing], [step], [0], [1])):
        assert (one.agreeing, one.kl) == (0, 50)


def test_a_token_as_likely_as_the_best_is_a_choice() -> None:
    """vLLM ranks it behind its equals; in half precision the two best are often equal."""
    tie = {5: -0.7, 9: -0.7, 3: -5.0}
    assert compared([tie], [tie], [5], [2]).agreeing == 1
    assert compared([tie], [tie], [9], [2]).agreeing == 1
    assert compared([tie], [tie], [3], [3]).agreeing == 1


def test_where_the_model_itself_wavers_either_is_right() -> None:
    stock, ours = {0: -0.70, 1: -0.70 + NEAR_TIE * 0.9, 2: -3.0}, {0: -0.1, 1: -3.0, 2: -5.0}
    assert compared([stock], [ours], [0], [1]).agreeing == 1
    assert compared([{**stock, 1: -0.70 + NEAR_TIE * 1.1}], [ours], [0], [1]).agreeing == 0


def test_every_tokens_best_is_looked_up() -> None:
    steps = [{1000 + i: -1.5, **{j: -0.1 - j / 1000 for j in range(1, 19)}} for i in range(MOST_IDS)]
    unsure = [{1000 + i: -1.5, 2000 + i: -1.6} for i in range(MOST_IDS)]
    assert set(ids_to_compare(unsure)) == {1000 + i for i in range(MOST_IDS)}
    assert len(ids_to_compare([*steps, *unsure])) == MOST_IDS
    assert 1 in ids_to_compare([*steps, *unsure])


# --- how a request is asked again ---


class Renderer:
    """vLLM's, as far as it decides what a body may say; keeps what it was given."""

    def __init__(self) -> None:
        self.trust_request_mm_kwargs = False
        self.rendered: list[Any] = []

    async def render_chat(self, request: Any) -> Any:
        validate_request_mm_kwargs(
            mm_processor_kwargs=request.mm_processor_kwargs,
            media_io_kwargs=request.media_io_kwargs,
            trust_request_mm_kwargs=self.trust_request_mm_kwargs,
        )
        self.rendered.append(request)
        return [], [f"prompt {len(self.rendered)}"]


class EngineClient:
    """Answers with the tokens that it is told, and the model's distribution."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[tuple[Any, Any, str]] = []

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        if self.error is not None:
            raise self.error
        self.asked.append((prompt, params, request_id))
        told = params.trace_decode_token_ids
        flat = SimpleNamespace(
            start_indices=list(range(len(told))), end_indices=list(range(1, len(told) + 1)), token_ids=told,
            logprobs=[-0.1] * len(told), ranks=[1] * len(told),
        )  # fmt: skip
        yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(told), logprobs=flat)])


def replay(error: Exception | None = None) -> tuple[Replay, Renderer, EngineClient]:
    renderer, client = Renderer(), EngineClient(error)
    state = SimpleNamespace(openai_serving_chat=SimpleNamespace(online_renderer=renderer), engine_client=client)
    return Replay(state), renderer, client


def asked_again(**stated: Any) -> list[Any]:
    """The two requests that are made of one."""
    again, renderer, client = replay()
    body = {"model": "m", "messages": [{"role": "user", "content": "What?"}], **stated}
    found = asyncio.run(again.compare(json.dumps(body).encode(), [7, 8, 9]))
    assert (found.tokens, found.agreeing, found.kl) == (3, 3, 0)
    assert not renderer.trust_request_mm_kwargs, "the server's own is left as it is"
    off, on = client.asked
    assert off[1].trace_decode_token_ids == on[1].trace_decode_token_ids == [7, 8, 9]
    assert (off[1].logprobs, on[1].logprob_token_ids) == (TOP, [7, 8, 9])
    assert off[2] != on[2]
    assert is_shadow(off[2], off[1])
    return renderer.rendered


def test_a_server_that_takes_no_settings_from_requests_compares_all_the_same() -> None:
    off, on = asked_again()
    assert off.mm_processor_kwargs == {"metok": "off"}
    assert on.mm_processor_kwargs is None


def test_all_that_the_client_said_is_said_again() -> None:
    stated = {
        "mm_processor_kwargs": {"metok": {"events": 3, "report": True}, "fps": 2},
        "chat_template_kwargs": {"a": 1},
        "add_generation_prompt": False,
        "continue_final_message": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 3,
        "temperature": 1.5,
        "request_id": "mine",
    }
    off, on = asked_again(**stated)
    assert off.mm_processor_kwargs == {"metok": "off", "fps": 2}
    assert on.mm_processor_kwargs == {"metok": {"events": 3}, "fps": 2}
    for one in (off, on):
        assert (one.chat_template_kwargs, one.add_generation_prompt, one.continue_final_message) == (
            {"a": 1},
            False,
            True,
        )
        assert (one.stream, one.n) == (False, 1)
        assert one.request_id != "mine"


def test_of_a_long_answer_the_first_tokens() -> None:
    again, _, client = replay()
    asyncio.run(again.compare(BODY, list(range(1000))))
    assert client.asked[0][1].trace_decode_token_ids == list(range(MOST_IDS))


@pytest.mark.parametrize(
    ("body", "answer", "error", "raised"),
    [
        (None, [1], None, Unrepeatable),
        (BODY, [], None, Unrepeatable),
        (json.dumps({**json.loads(BODY), "use_beam_search": True}).encode(), [1], None, Unrepeatable),
        (BODY, [1], VLLMValidationError("too long"), Unrepeatable),
        (BODY, [1], QueueOverflowError(), Disturbed),
        (BODY, [1], RuntimeError("lost"), RuntimeError),
    ],
)
def test_why_a_request_is_not_asked_again(
    body: bytes | None, answer: list[int], error: Exception | None, raised: type[Exception]
) -> None:
    again, _, _ = replay(error)
    with pytest.raises(raised):
        asyncio.run(again.compare(body, answer))


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
        self.idle, self.gone = True, False
        self.known: Callable[[str], tuple[str, list[int]] | None] = lambda name: (f"id-{name}", [1, 2])

    async def answer(self, name: str) -> tuple[str, list[int]] | None:
        return self.known(name)

    async def are_idle(self) -> bool:
        if self.gone:
            raise EnginesGone("Server shutting down")
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


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Logged:
    logger = Logged()
    for module in (record_module, traffic):
        monkeypatch.setattr(module, "logger", logger)
    return logger


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


def test_what_goes_wrong_with_one_is_nothing_to_the_next(logged: Logged) -> None:
    async def work() -> None:
        errors: list[Exception | None] = [
            Unrepeatable("no"), RuntimeError("the answer got lost"), Disturbed("no room"), None,
        ]  # fmt: skip

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

    assert ran(work) == {"unrepeatable": 1, "failed": 2, "compared": 1}
    assert [line for line in logged.lines if line[0] != "DEBUG"] == [
        ("WARNING", "METok: comparing a request with the model without METok failed: the answer got lost")
    ]


def test_the_engines_end_ends_it_without_a_word(logged: Logged) -> None:
    async def work() -> None:
        comparing, engines = Comparing(), Engines()
        shadow = make(comparing, engines)
        task = asyncio.create_task(shadow.run())
        await run_app(shadow, [BODY])
        await until(lambda: comparing.running == 1)
        engines.gone = True
        await asyncio.wait_for(task, 20)
        assert comparing.running == 0 or comparing.cancelled == 1
        await run_app(shadow, [BODY])

    assert ran(work) == {}
    assert not logged.lines


def test_a_comparison_is_begun_a_few_times_and_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "LONGEST_S", 0.05)

    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)
        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await until(lambda: shadow.record.shown()["requests"]["busy"] == 1)
        assert comparing.cancelled == TRIES

    assert ran(work) == {"busy": 1}


def test_only_who_is_let_in_disturbs() -> None:
    """As behind vLLM's check of the API key: what it refuses, it refuses before it reads a body."""

    async def work() -> None:
        comparing = Comparing()
        shadow = make(comparing)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            pass

        async def refusing(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 401})
            await asyncio.sleep(0.03)

        async def reading(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await receive()
            await asyncio.sleep(0.03)
            assert comparing.running == 0

        async with at_work(shadow):
            await run_app(shadow, [BODY])
            await until(lambda: comparing.running == 1)
            await shadow.watch(refusing, {}, receive, send)
            assert comparing.cancelled == 0
            await shadow.watch(reading, {}, receive, send)
            assert comparing.cancelled == 1
            await until(lambda: comparing.running == 1)

    assert ran(work) == {}


def test_answers_are_fetched_at_once_and_not_when_it_is_quiet() -> None:
    async def work() -> None:
        asked: list[str] = []
        comparing, engines = Comparing(), Engines()
        engines.known = lambda name: (asked.append(name), (f"id-{name}", [1]))[1]
        shadow = make(comparing, engines)
        with shadow.client():
            await run_app(shadow, [BODY])
            await run_app(shadow, [BODY])
            await until(lambda: len(asked) == 2)

    ran(work)


def test_what_the_engines_are_asked() -> None:
    class Core:
        def __init__(self, *answers: Any) -> None:
            self.answers = answers

        async def call_utility_all_async(self, method: str, *args: str) -> list[Any]:
            assert method == "scheduler"
            if self.answers == ("gone",):
                raise Exception("Server shutting down")
            return [one if not args else one.get(args[0]) for one in self.answers]

    def engines(*answers: Any) -> LiveEngines:
        return LiveEngines(SimpleNamespace(engine_core=Core(*answers)))

    idle = {"requests": 0, "paused": 0}
    assert asyncio.run(engines(idle, idle).are_idle())
    assert not asyncio.run(engines(idle, {**idle, "requests": 1}).are_idle())
    assert not asyncio.run(engines(idle, {**idle, "paused": 1}).are_idle())
    known = {"name": {"request_id": "one", "tokens": [3]}}
    assert asyncio.run(engines({}, known).answer("name")) == ("one", [3])
    for ask in (engines("gone").are_idle(), engines("gone").answer("name")):
        with pytest.raises(EnginesGone, match="shutting down"):
            asyncio.run(ask)


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


def test_the_worst_are_named_and_no_others(logged: Logged) -> None:
    record = Record()
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
    assert not any("as-before" in said for _, said in logged.lines)
    assert any(level == "WARNING" and said.startswith("METok: r9 is among") for level, said in logged.lines)
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


@pytest.mark.parametrize(
    ("turns", "shown"),
    [
        ([{"role": "user", "content": ["plain", {"type": "text", "text": "and a part"}]}], "plain and a part"),
        ([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": None}], "Who?"),
        ([{"role": "user", "content": "Who?"}, {"role": "tool", "content": "a secret"}], "Who?"),
        ([{"role": "user"}], ""),
        ([{"role": "user", "content": [{"type": "text", "text": 5}, None]}], ""),
        ([{"role": "system", "content": "Be brief."}], ""),
    ],
)
def test_questions_of_other_forms(turns: list[Any], shown: str) -> None:
    assert question_of(json.dumps({"messages": turns}).encode()) == shown
