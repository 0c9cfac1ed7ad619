"""The second witness in the engine: what it asks, and that it can say no.

The engine itself: `tests/engine/test_llama.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.witness import engine
from benchmarks.witness.checkpoint import patch_size
from tests.support.oracle import OracleResult


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.known = {"\n": 0}

    def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
        words = text.replace("\n", " \n ").split(" ")
        return SimpleNamespace(input_ids=[self.known.setdefault(w, len(self.known)) for w in words if w])


@pytest.fixture
def sample() -> Any:
    asked = {engine.key(q): q for n in range(2) for q in engine.make_video(n, 1).questions}
    model = SimpleNamespace(config=SimpleNamespace(video_token_id=999))
    return engine.Captions(Path(), model, None, engine.Prompt(Words()), asked)


def test_every_question_is_asked_with_its_video_and_told_to_metok(sample: Any) -> None:
    words = torch.randn(1000, 12)
    cases = list(engine.requests(sample, words, 2, 1, {"decode_retention": 1.0}))
    assert [case.question for case in cases] == list(sample.asked)
    for case in cases:
        question = sample.asked[case.question]
        assert case.metok == {"decode_retention": 1.0, "query": question.text}
        assert case.max_tokens == len(sample.prompt.answer(question))
        ids = sample.prompt_ids(case.question)
        assert ids.count(999) == 1
        assert ids[: ids.index(999)] == sample.prompt.before()
        side = engine.SIDE * 2 * patch_size(12)
        assert case.videos[0].shape == (engine.FRAMES, side, side, 3)
    assert all(case.metok == "off" for case in engine.requests(sample, words, 1, 1, "off"))


def judged(sample: Any, answers: Callable[[OracleResult], OracleResult], margin: float = 1.0) -> Any:
    """`judge` with an engine that gives what `answers` makes of the oracle's result: the right tokens."""

    def oracle(case: Any) -> OracleResult:
        tokens = sample.prompt.answer(sample.asked[case.question])
        rows = torch.full((len(tokens), 1000), -9.0)
        rows[range(len(tokens)), tokens] = -0.1
        return OracleResult([1, 2], tokens, rows, score_margin=margin)

    def run(cases: list[Any]) -> list[OracleResult]:
        found = [oracle(case) for case in cases]
        return [answers(replace(f, logprobs=[{t: -0.1} for t in f.tokens])) for f in found]

    running = SimpleNamespace(oracle=oracle, run=run, check_drained=lambda: None)
    cases = list(engine.requests(sample, torch.randn(1000, 12), 2, 1, {}))
    return engine.judge(running, sample, cases, 3)


def test_equal_answers_pass(sample: Any) -> None:
    entry = judged(sample, lambda answer: answer)
    assert (entry["right"], entry["differ"], entry["ties_left_out"]) == ([True] * 8, [], 0)
    assert entry["largest_logprob_difference"] < 1e-6
    assert entry["tokens_compared"] == sum(len(sample.prompt.answer(q)) for q in sample.asked.values())


def test_another_token_and_another_logprob_are_told(sample: Any) -> None:
    def other_token(answer: OracleResult) -> OracleResult:
        return replace(answer, tokens=[*answer.tokens[:-1], 998], logprobs=[*answer.logprobs[:-1], {998: -9.0}])

    entry = judged(sample, other_token)
    assert len(entry["differ"]) == 8
    assert entry["right"] == [False] * 8
    entry = judged(sample, lambda a: replace(a, logprobs=[{t: -0.102} for t in a.tokens]))
    assert len(entry["differ"]) == 8
    assert entry["largest_logprob_difference"] == pytest.approx(0.002, abs=1e-6)
    assert entry["right"] == [True] * 8


def test_ties_are_counted_and_left_out(sample: Any) -> None:
    entry = judged(sample, lambda a: replace(a, logprobs=[{t: -5.0} for t in a.tokens]), margin=1e-7)
    assert (entry["ties_left_out"], entry["differ"], entry["largest_logprob_difference"]) == (8, [], 0.0)


def test_report(sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {label: judged(sample, lambda answer: answer) for label in ("off", "paper (1, 2, 3)")}
    found["paper (1, 2, 3)"]["right"] = [True, False] * 4
    options = argparse.Namespace(out=tmp_path / "r" / "x.json", seed=1, videos=2)
    questions = list(sample.asked.values())
    engine.report(found, [q.kind for q in questions], [q.video for q in questions], options)
    result = json.loads(options.out.read_text())
    assert result["questions"] == 8
    assert result["methods"]["paper (1, 2, 3)"]["accuracy"]["all"]["to_stock"]["lost"] == 4
    assert "50.0 % right" in capsys.readouterr().out


def test_impossible_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--videos", "0"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            engine.parse(wrong)
        assert "at least 1" in capsys.readouterr().err
