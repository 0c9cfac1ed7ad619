"""What every family is asked of the engine, against the oracle: chunks, preemption, prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.support.harness import Case, Engine, observed
from tests.support.oracle import OracleResult, assert_same

ATOL = 1e-3
PREFACE = "You watch a film with care and say only what you have seen in it. " * 18
"""So long that whole blocks of every group are shared."""


def check(running: Engine, asked: Sequence[Case], answers: Sequence[OracleResult]) -> None:
    """The answers are the oracle's, and nothing is left of the requests."""
    for case, answer in zip(asked, answers, strict=True):
        expected = running.oracle(case)
        # A decision closer than float32 can tell apart would make the comparison a coin toss, not a test.
        assert expected.score_margin > 1e-5, f"choose another seed for {case}"
        assert_same(expected, answer, ATOL)
    running.check_drained()


def check_in_chunks(running: Engine, asked: list[Case]) -> None:
    """At once, some prompts over several steps."""
    deferred: list[int] = []
    answers = running.run(asked, lambda engine: deferred.append(len(engine.scheduler.deferral.held)))
    assert max(deferred) > 0, "no prompt went over several chunks"
    check(running, asked, answers)


def check_preempted(running: Engine, asked: list[Case]) -> None:
    """At once, in a pool too small for all of them."""
    preemptions: dict[str, int] = {}

    def watch(engine: Engine) -> None:
        preemptions.update((name, request.num_preemptions) for name, request in engine.scheduler.requests.items())

    before = set(running.internal)
    answers = running.run(asked, watch)
    ours = [name for name in running.internal if name not in before]
    compressed = [case.videos and case.metok != "off" for case in asked]
    names = [running.internal[name] for name, is_one in zip(ours, compressed, strict=True) if is_one]
    assert sum(preemptions[name] for name in names) > 0, "no request with a compressed video was preempted"
    check(running, asked, answers)


def check_cut(
    running: Engine,
    asked: Callable[[int], Case],
    kind_of_border: Callable[[OracleResult, int], str],
    kinds: Iterable[str],
) -> None:
    """The first chunk of a prompt ends at a border of each kind.

    Args:
        running: the engine.
        asked: a case with so many more words in front of its video.
        kind_of_border: what stands on both sides of a prompt's token, by the oracle's answer.
        kinds: of borders.
    """
    step = running.scheduler.max_num_scheduled_tokens
    lengths = [len(running.prompt_ids(asked(words))) for words in range(200)]
    first = running.oracle(asked(0))
    words_for = {kind_of_border(first, step - more + lengths[0]): words for words, more in enumerate(lengths)}
    for kind in kinds:
        case, borders = asked(words_for[kind]), list[int]()

        def watch(engine: Engine, borders: list[int] = borders) -> None:
            borders.extend(request.num_computed_tokens for request in engine.scheduler.requests.values())

        (answer,) = running.run([case], watch)
        expected = running.oracle(case)
        assert borders[0] == step, "the first chunk is a whole step"
        assert kind_of_border(expected, step) == kind
        assert_same(expected, answer, ATOL)
    running.check_drained()


def cached_tokens(running: Engine, case: Case) -> int:
    """Run one case against the oracle; how many tokens of its prompt came from the prefix cache."""
    name = running.add(case)
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    check(running, [case], [observed(outputs[name])])
    return int(outputs[name].num_cached_tokens)
