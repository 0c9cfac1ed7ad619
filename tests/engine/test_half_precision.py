"""Half precision in the engine: exact counts, nothing left behind,
and log-probabilities near those of float32.
"""

from __future__ import annotations

import pytest

from tests.support.harness import Case, Engine, engine
from tests.support.oracle.samples import load_sample, scene_video

NEAR = {"bfloat16": 0.6, "float16": 0.15}
"""Of the log-probabilities of the chosen tokens.

Wide, since a rounded score may choose another of two near equals.
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=29)
    asked = [
        Case((scene_video(1, 9),), metok={"decode_retention": 0.5}, max_tokens=4),
        Case((scene_video(2, 12), scene_video(3, 8)), metok={"decode_retention": 1}, max_tokens=4),
        Case((scene_video(2, 5),), metok="off", max_tokens=4),
    ]
    held: dict[str, tuple[int, ...]] = {}

    def watch(running: Engine) -> None:
        for name, request in running.runner.model_state.pruned.by_id.items():
            if request.result is not None:
                result = request.result
                held[name] = (result.encoded, result.after_l1, result.after_l2, result.retained)

    with engine(sample, dtype=dtype, max_num_batched_tokens=64, max_num_seqs=8) as running:
        answers = running.run(asked, watch)
        running.check_drained()
        expected = [
            running.oracle(case, force_tokens=list(answer.tokens)) for case, answer in zip(asked, answers, strict=True)
        ]
    counts = []
    for reference in expected[:2]:
        videos = reference.videos or []
        assert reference.retained is not None
        totals = [
            sum(len(kept or ()) for kept in kind)
            for kind in zip(*((v.after_l1, v.after_l2) for v in videos), strict=True)
        ]
        counts.append((*totals, len(reference.retained)))
    assert [found[1:] for _, found in sorted(held.items())] == counts
    for answer, reference in zip(answers, expected, strict=True):
        for token, ours, theirs in zip(answer.tokens, answer.logprobs, reference.logprobs, strict=True):
            assert abs(ours[token] - float(theirs[token])) < NEAR[dtype]
