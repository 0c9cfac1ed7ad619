"""Answers of an engine that rounds: exact counts, nothing left behind, log-probabilities near the oracle."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.harness import Case, Engine


def check_near(running: Engine, asked: Sequence[Case], pruned: int, near: float) -> None:
    """Ask all at once, and compare with the oracle along the engine's own tokens.

    Args:
        running: the engine.
        asked: the requests; the first `pruned` of them hold a pruned video, no other does.
        pruned: how many.
        near: how far the log-probability of a chosen token may be off.
    """
    held: dict[str, tuple[int, ...]] = {}

    def watch(running: Engine) -> None:
        for name, request in running.runner.model_state.pruned.by_id.items():
            if request.result is not None:
                held[name] = (request.result.after_l1, request.result.after_l2, request.result.retained)

    answers = running.run(asked, watch)
    running.check_drained()
    expected = [
        running.oracle(case, force_tokens=list(answer.tokens)) for case, answer in zip(asked, answers, strict=True)
    ]
    counts = []
    for reference in expected[:pruned]:
        assert reference.retained is not None
        totals = [
            sum(len(kept or ()) for kept in kind)
            for kind in zip(*((v.after_l1, v.after_l2) for v in reference.videos or []), strict=True)
        ]
        counts.append((*totals, len(reference.retained)))
    assert [found for _, found in sorted(held.items())] == counts
    for answer, reference in zip(answers, expected, strict=True):
        for token, ours, theirs in zip(answer.tokens, answer.logprobs, reference.logprobs, strict=True):
            assert abs(ours[token] - float(theirs[token])) < near
