"""How prompts with pruned videos are cut into steps:
the rules of every chunk, and that every request ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm.v1.request import RequestStatus

from metok_vllm.scheduler.kv_manager import DeepKVManager
from metok_vllm.scheduler.scheduler import MetokScheduler
from tests.support.fakes import BLOCK, Limits, Prompt, Step, free_and_held, make_scheduler, plan, schedule

EXAMPLES = 150
PATIENCE = 4
"""Steps without any token, one after the other, that mean that nothing will ever happen again."""


class Stuck(AssertionError):
    """Requests are left and nothing is scheduled any more."""


class Run:
    """A scheduler at work, with what it must never do checked at every step."""

    def __init__(self, base: Any, limits: Limits, monkeypatch: Any, in_flight: int = 1) -> None:
        self.scheduler: MetokScheduler = make_scheduler(base, limits, monkeypatch)
        self.limits = limits
        self.in_flight = in_flight  # steps scheduled before the first one's answer is awaited; 2 with async scheduling
        self.waiting: deque[Step] = deque()
        self.chunks: dict[str, list[int]] = {}  # of each pruned prompt, since it was last started
        self.prompts: dict[str, Prompt] = {}
        self.counts: dict[str, Any] = {}
        self.seen: Counter[str] = Counter()
        self.idle = 0

    @property
    def managers(self) -> list[Any]:
        return list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)

    def add(self, prompt: Prompt) -> str:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = prompt
        self.scheduler.add_request(prompt.request(name))
        if name in self.scheduler.slot_counts:
            self.counts[name] = self.scheduler.slot_counts[name]
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.seen["aborted"] += 1

    def step(self) -> dict[str, int]:
        """Schedule one step and let the worker answer it, at once or a step later; tokens by request."""
        before = {name: request.num_preemptions for name, request in self.scheduler.requests.items()}
        step = schedule(self.scheduler)
        self.waiting.append(step)
        for name, tokens in step.tokens.items():
            self.check_chunk(name, tokens)
        for name, request in self.scheduler.requests.items():
            self.seen["preempted"] += request.num_preemptions - before[name]
        self.check_endings(step.tokens)
        self.check_memory()
        while self.waiting and (len(self.waiting) >= self.in_flight or not step.tokens):
            self.waiting.popleft().finish()
        self.idle = 0 if step.tokens or not self.scheduler.requests else self.idle + 1
        if self.idle >= PATIENCE:
            raise Stuck({name: r.num_computed_tokens for name, r in self.scheduler.requests.items()})
        return step.tokens

    def check_chunk(self, name: str, tokens: int) -> None:
        counts, request = self.counts.get(name), self.scheduler.requests[name]
        if counts is None:
            return
        start = request.num_computed_tokens - tokens
        if start >= counts.prompt_len:
            return
        left = counts.prompt_len - start - tokens
        assert left >= 0, "a chunk crosses the end of its prompt"
        assert tokens != 1, "a chunk of one token would run as a decode"
        assert left != 1, "what is left would be a chunk of one token"
        self.chunks[name] = [*(self.chunks[name] if start else []), tokens]
        self.seen["deferred"] += left > 0

    def check_endings(self, tokens: Mapping[str, int]) -> None:
        """Memory is reserved for no more than this: see `memory.PruningMemory`."""
        ending = []
        for name, count in tokens.items():
            counts, end = self.counts.get(name), self.scheduler.requests[name].num_computed_tokens
            if counts is not None and count < end == counts.prompt_len:
                ending.append(counts.prompt_len)
        assert len(ending) < 2 or sum(ending) <= self.limits.step_tokens, "too many long prompts end in one step"
        self.seen["ended together"] += len(ending) > 1

    def check_memory(self) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        free, held = free_and_held(pool, self.managers)
        assert free + held + 1 == pool.num_gpu_blocks
        for request in self.scheduler.running:
            tokens = request.num_computed_tokens
            for manager in self.managers:
                slots = tokens
                if request.request_id in self.counts and isinstance(manager, DeepKVManager):
                    slots = self.counts[request.request_id].slots(tokens, manager.kind)
                    if manager.releases and tokens > self.counts[request.request_id].prompt_len:
                        self.seen["released"] += 1
                    elif manager.releases and tokens == self.counts[request.request_id].prompt_len:
                        # Until the next step is scheduled, which the request need not be in.
                        held = len(manager.req_to_blocks[request.request_id])
                        released = -(-self.counts[request.request_id].text_tokens // BLOCK)
                        slots = slots if held != released else held * BLOCK
                assert len(manager.req_to_blocks[request.request_id]) == -(-slots // BLOCK)
        deferred = self.scheduler.deferral.held
        assert sum(deferred.values()) <= self.scheduler.deferral.limit
        for name, counts in self.counts.items():
            request = self.scheduler.requests.get(name)
            if request is not None and 0 < request.num_computed_tokens < counts.prompt_len:
                assert deferred[name] == counts.prompt_len * self.scheduler.deferral.bytes_per_token
            if request is not None and request in self.scheduler.waiting:
                held_outputs = self.scheduler.encoder_cache_manager.get_cached_input_ids(request)
                assert not held_outputs, "a waiting request keeps others from the encoder cache"

    def finish(self) -> None:
        """Run until every request has ended; nothing may be left then."""
        while self.scheduler.requests:
            self.step()
        while self.waiting:
            self.waiting.popleft().finish()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert self.scheduler.deferral.held == self.scheduler.slot_counts == {}
        encoder = self.scheduler.encoder_cache_manager
        assert encoder.num_freeable_slots == encoder.cache_size, "an item of the encoder cache is still referenced"


@pytest.fixture
def run(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(limits, in_flight)`; the configuration behind it is built once."""
    base = make_config()
    return lambda limits, in_flight=1: Run(base, limits, monkeypatch, in_flight)


def test_how_one_prompt_is_cut(run: Any) -> None:
    """Chunks are as long as they may be. Only steps of fewer than 3 tokens may never end a prompt."""
    for length in range(3, 26):
        for step_tokens in range(2, 14):
            alone = run(Limits(step_tokens=step_tokens, encoder_tokens=64))
            alone.add(Prompt((0, 1), (plan(length - 1),), answer=1))
            if step_tokens == 2 and length % 2:
                with pytest.raises(Stuck, match=f"'r0': {length - 3}"):
                    alone.finish()
                continue
            alone.finish()
            chunks = alone.chunks["r0"]
            assert sum(chunks) == length
            full, last = divmod(length, step_tokens)
            expected = [step_tokens] * full + [last] * (last > 0)
            if last == 1 and full:
                expected[-2:] = [step_tokens - 1, 2]
            assert chunks == expected


def test_an_ordinary_request_may_have_any_chunk(run: Any) -> None:
    alone = run(Limits(step_tokens=8))
    alone.add(Prompt((17,)))
    alone.add(Prompt((0, 1), (plan(8, pruned=0),)))
    alone.finish()
    assert not alone.chunks


def test_a_resumed_request_stops_at_the_end_of_its_prompt(run: Any) -> None:
    """What it had generated attends to the decode-time KV, so it cannot share a chunk with the prompt."""
    preempted = run(Limits(step_tokens=64))
    name = preempted.add(Prompt((4, 6), (plan(20, 8, 500_000),), answer=9))
    for _ in range(5):
        preempted.step()
    request = preempted.scheduler.requests[name]
    assert request.num_output_tokens == 5
    preempt(preempted, name)
    preempted.step()
    assert request.num_computed_tokens == 30
    preempted.step()
    assert request.num_computed_tokens == 35
    preempted.finish()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_released_blocks_are_free_when_the_next_step_is_scheduled(run: Any, in_flight: int) -> None:
    """4 text, 20 visual, 6 text: the group gives back 8 - 3 blocks, and gets one for the tokens behind them.
    With two steps in flight the one that completes the prompt has not run yet.
    """
    alone = run(Limits(step_tokens=16, windowed=True), in_flight)
    name = alone.add(Prompt((4, 6), (plan(20, 8),), answer=6))
    (released,) = (m for m in alone.managers if isinstance(m, DeepKVManager) and m.releases)
    held = []
    for _ in range(6):
        alone.step()
        held.append(len(released.req_to_blocks[name]))
    assert held == [4, 8, 3, 3, 4, 4]
    alone.finish()


def test_a_released_prompt_is_preempted_and_completes_again(run: Any) -> None:
    for steps in (2, 3, 6):  # complete but not released, released, and further on
        preempted = run(Limits(step_tokens=16, windowed=True))
        name = preempted.add(Prompt((4, 6), (plan(20, 8),), answer=9))
        for _ in range(steps):
            preempted.step()
        preempt(preempted, name)
        pool = preempted.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        preempted.finish()
        assert preempted.seen["released"] > 2


# --- that nothing ever waits for ever ---


def test_two_adjacent_videos_that_share_no_encoder_cache(run: Any) -> None:
    """A chunk may not end one token before the second video:
    its encoder output has no room until that token is done.
    """
    for step_tokens in range(4, 24):
        alone = run(Limits(step_tokens=step_tokens, encoder_tokens=24))
        alone.add(Prompt((3, 0, 4), (plan(20), plan(22)), answer=1))
        alone.finish()


def preempt(run_: Run, name: str) -> None:
    request = run_.scheduler.requests[name]
    run_.scheduler.running.remove(request)
    run_.scheduler._preempt_request(request, 0.0)


def test_a_waiting_request_holds_no_deferral(run: Any) -> None:
    """It found no blocks; one that was preempted and stands before it must be able to defer its prompt."""
    crowded = run(Limits(step_tokens=16, blocks=1 + 3 * 17, deferred_tokens=62))
    crowded.add(Prompt((30, 30), (plan(2),), answer=5))
    for _ in range(4):
        crowded.step()
    crowded.add(Prompt((4, 4), (plan(30),), answer=1))
    crowded.step()
    assert not crowded.scheduler.requests["r1"].num_computed_tokens, "there should be no block for it yet"
    preempt(crowded, "r0")
    crowded.finish()


def test_a_waiting_request_holds_no_encoder_output(run: Any) -> None:
    """Refused for want of deferral, it must not keep its video's encoder
    output from making room for another's.
    """
    crowded = run(Limits(step_tokens=16, encoder_tokens=40, deferred_tokens=60))
    crowded.add(Prompt((2, 3), (plan(14),), answer=1))
    crowded.finish()  # its video stays in the encoder cache
    crowded.add(Prompt((2, 0, 4), (plan(20), plan(28)), answer=1))
    crowded.add(Prompt((2, 3), (plan(14),), answer=1))
    crowded.scheduler.requests["r2"].mm_features[0].identifier = "r0/0"
    crowded.finish()
    assert crowded.chunks["r1"] == [16, 6, 16, 16]


def test_a_prompt_that_fits_but_for_the_encoder_holds_nothing_either(run: Any) -> None:
    """Its second video has no room yet, so it would have to be deferred,
    and may not be: back to the queue with nothing.
    """
    crowded = run(Limits(step_tokens=48, encoder_tokens=40, deferred_tokens=54))
    crowded.add(Prompt((2, 3), (plan(14),), answer=1))
    crowded.finish()
    crowded.add(Prompt((2, 0, 4), (plan(20), plan(28)), answer=1))
    crowded.add(Prompt((0, 0, 1), (plan(14), plan(10)), answer=1))
    crowded.scheduler.requests["r2"].mm_features[0].identifier = "r0/0"
    crowded.finish()
    assert crowded.chunks == {"r0": [19], "r1": [22, 32], "r2": [25]}


def test_a_complete_prompt_makes_room_for_the_next(run: Any) -> None:
    crowded = run(Limits(step_tokens=16, deferred_tokens=40))
    crowded.add(Prompt((4, 4), (plan(32),), answer=50))
    crowded.add(Prompt((4, 4), (plan(32),), answer=1))
    started = []
    while "r1" in crowded.scheduler.requests:
        crowded.step()
        started.append("r1" in crowded.chunks)
    # Three steps for the first prompt. The last one has room for tokens of the second, but its own state is
    # still held.
    assert started == [False, False, False, True, True, True]
    assert crowded.chunks["r1"] == [15, 15, 10]
    assert "r0" in crowded.scheduler.requests
    crowded.finish()


def test_long_prompts_do_not_end_together(run: Any) -> None:
    busy = run(Limits(step_tokens=16, requests=2, deferred_tokens=200), 1)
    for _ in range(2):
        busy.add(Prompt((4, 3), (plan(13),), answer=1))
    ends = {}
    for step in range(8):
        busy.step()
        for name in busy.chunks:
            if sum(busy.chunks[name]) == 20:
                ends.setdefault(name, step)
    # The second prompt's five last tokens would fit the step that the first one ends in.
    assert ends == {"r0": 1, "r1": 2}
    assert busy.seen["ended together"] == 0
    busy.finish()


# --- everything at once ---


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Limits, list[Prompt]]:
    """Requests with none to two videos, and limits that are tight but allow each request alone."""

    def video(retention: int) -> Any:
        tokens = draw(st.integers(2, 40))  # a frame and its separator
        inside = draw(st.sampled_from([0, 0, 1, tokens // 2]))
        most = draw(st.integers(0, tokens - inside))
        return plan(tokens, most, retention, pruned=int(draw(st.integers(0, 7)) > 0), text=inside)

    def prompt() -> Prompt:
        count, retention = draw(st.integers(0, 2)), draw(st.sampled_from([0, 500_000, 1_000_000]))
        lengths = st.one_of(st.integers(0, 3), st.integers(0, 20))
        text = [draw(lengths) for _ in range(count)] + [draw(lengths) + 1]
        answer = draw(st.one_of(st.integers(1, 3), st.integers(20, 45)))
        videos = tuple(video(retention) for _ in range(count))
        return Prompt(tuple(text), videos, answer, draw(st.integers(0, 3)))

    asked = [prompt() for _ in range(draw(st.integers(1, 7)))]
    requests = draw(st.integers(1, 6))
    step_tokens = max(requests, draw(st.sampled_from([4, 8, 16, 17, 33, 64, 100])))
    long_prefill = draw(st.sampled_from([0, 0, 3, 7]))
    whole = min(step_tokens - requests, long_prefill or step_tokens)  # `budgets.step_tokens`
    # The front end refuses a prompt that may have to be deferred and does not fit the bound alone.
    pruned = [p.length for p in asked if any(v.pruned for v in p.videos)]
    deferred = max([length for length in pruned if length > whole], default=0) + draw(st.sampled_from([0, 0, 10, 999]))
    # vLLM refuses to start where one request of the longest length does not fit.
    longest = max(-(-(p.length + p.answer) // BLOCK) for p in asked)
    windowed = draw(st.booleans())
    blocks = (5 if windowed else 3) * longest + 1 + draw(st.sampled_from([0, 0, 5, 20, 200]))
    largest = max((v.tokens for p in asked for v in p.videos), default=0)
    limits = Limits(step_tokens, requests, blocks, max(step_tokens, largest), deferred, long_prefill)
    return replace(limits, policy=draw(st.sampled_from(["fcfs", "priority"])), windowed=windowed), asked


@given(
    workload=workloads(),
    in_flight=st.sampled_from([1, 2]),
    pauses=st.lists(st.integers(0, 5), min_size=7, max_size=7),
    aborted=st.sets(st.integers(0, 6), max_size=2),
)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_ends(run: Any, workload: Any, in_flight: int, pauses: list[int], aborted: set[int]) -> None:
    limits, asked = workload
    busy = run(limits, in_flight)
    for i, prompt in enumerate(asked):
        busy.add(prompt)
        for _ in range(pauses[i]):
            busy.step()
        if i in aborted and busy.scheduler.requests:
            busy.abort(sorted(busy.scheduler.requests)[i % len(busy.scheduler.requests)])
    busy.finish()
    for name, chunks in busy.chunks.items():
        assert sum(chunks) <= busy.prompts[name].length
    for what, count in busy.seen.items():
        event(f"{what}: {'yes' if count else 'no'}")
