"""One giant prompt among a steady stream of small ones: both are served within a stated number of steps.

The bounds are those of `docs/serving.md`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fakes import Limits, Prompt, plan
from tests.support.queue_rules import RULES, follow
from tests.unit.scheduler.test_scheduler import Run

STEP, SEQS = 16, 6
GIANT = Prompt((4, 4), (plan(592),), answer=2)
SMALL = {"text": Prompt((3,), answer=3), "video": Prompt((2, 2), (plan(4),), answer=2)}


@pytest.fixture(params=list(RULES))
def run(request: pytest.FixtureRequest, make_config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    follow(request.param, monkeypatch)
    return lambda limits: Run(make_config(), limits, monkeypatch)


class Watch:
    """Prompts as they arrive, begin and are computed, in steps."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.now = 0
        self.arrived: dict[str, int] = {}
        self.began: dict[str, int] = {}
        self.computed: dict[str, int] = {}

    def add(self, prompt: Prompt) -> str:
        name = self.run.add(prompt)
        self.arrived[name] = self.now
        return name

    def step(self) -> None:
        self.now += 1
        requests = dict(self.run.scheduler.requests)
        for name in self.run.step():
            self.began.setdefault(name, self.now)
            if requests[name].num_computed_tokens >= requests[name].num_prompt_tokens:
                self.computed.setdefault(name, self.now)

    def waited(self, name: str) -> int:
        """Steps from its arrival to its first token of prefill."""
        return self.began[name] - self.arrived[name]


def crowd(run: Run, small: Prompt, giants: int, steps: int) -> tuple[Watch, list[str], list[str]]:
    """A small prompt before every other step, `giants` after the twentieth; the giants, and the others."""
    watch, names, others = Watch(run), [], []
    for step in range(steps):
        if step == 20:
            names += [watch.add(GIANT) for _ in range(giants)]
        if step % 2 == 0:
            others.append(watch.add(small))
        watch.step()
    while run.scheduler.requests:
        watch.step()
    return watch, names, others


def prefill_steps(length: int, chunk: int) -> int:
    """Steps of a prompt that gets at least `chunk` tokens in each; one less where one token would be left."""
    return -(-length // (chunk - 1))


@pytest.mark.parametrize("kind", SMALL)
def test_the_giant_moves_in_every_step_and_others_begin_when_it_is_done(run: Any, kind: str) -> None:
    busy = run(Limits(step_tokens=STEP, requests=SEQS, blocks=2000, encoder_tokens=600))
    watch, (giant,), others = crowd(busy, SMALL[kind], 1, 400)
    most = prefill_steps(GIANT.length, STEP - (SEQS - 1))
    before = max(watch.waited(name) for name in others if watch.arrived[name] < 20)
    assert watch.waited(giant) <= before + 1, "as long as a small one that came then"
    assert watch.computed[giant] - watch.began[giant] < most
    assert max(map(watch.waited, others)) <= most + SEQS
    assert max(map(watch.waited, others)) > SEQS, "nobody had to wait: this shows nothing"


@pytest.mark.parametrize("kind", SMALL)
def test_with_a_threshold_the_others_do_not_wait_for_it_at_all(run: Any, kind: str) -> None:
    busy = run(Limits(step_tokens=2 * STEP, requests=SEQS, blocks=2000, encoder_tokens=620, long_prefill=STEP))
    watch, (giant,), others = crowd(busy, SMALL[kind], 1, 400)
    alone, _, undisturbed = crowd(
        run(Limits(step_tokens=2 * STEP, requests=SEQS, blocks=2000, encoder_tokens=620, long_prefill=STEP)),
        SMALL[kind], 0, 400,
    )  # fmt: skip
    assert watch.computed[giant] - watch.began[giant] < prefill_steps(GIANT.length, STEP)
    assert max(map(watch.waited, others)) <= max(map(alone.waited, undisturbed)) + 1


def test_a_second_giant_waits_for_the_first_and_nobody_for_more_than_both(run: Any) -> None:
    """There is room to defer one of them."""
    busy = run(Limits(step_tokens=STEP, requests=SEQS, blocks=4000, encoder_tokens=1200, deferred_tokens=GIANT.length))
    watch, giants, others = crowd(busy, SMALL["text"], 2, 600)
    most = prefill_steps(GIANT.length, STEP - (SEQS - 1))
    first, second = sorted(giants, key=watch.began.__getitem__)
    assert watch.began[second] >= watch.computed[first]
    assert watch.computed[second] - watch.arrived[second] <= 2 * most + SEQS
    assert max(map(watch.waited, others)) <= 2 * most + SEQS


def test_a_step_full_of_answers_leaves_the_giant_only_until_one_of_them_ends(run: Any) -> None:
    """As many answers as a step has tokens but one: what is left is too little for a chunk."""
    busy = run(Limits(step_tokens=SEQS, requests=SEQS, blocks=2000, encoder_tokens=600))
    watch = Watch(busy)
    for answer in range(SEQS - 1):
        watch.add(Prompt((1,), answer=30 + 10 * answer))
    watch.step()
    giant = watch.add(GIANT)
    waiting = [watch.add(SMALL["text"]) for _ in range(10)]
    while giant not in watch.computed:
        watch.step()
        waiting.append(watch.add(SMALL["text"]))
        assert watch.now < 2000, "newcomers keep the giant from ever being computed"
    assert watch.began[giant] <= 32, "when the first answer ends"
    assert min(watch.began.get(name, watch.now + 1) for name in waiting) >= watch.began[giant], "nobody overtakes"
