"""Features of vLLM beside pruned videos: structured output; LoRA, which no LLaVA-OneVision in vLLM has.

vLLM's log-probabilities of an answer that a grammar rules are those among the tokens that the grammar allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import OracleResult, assert_same
from tests.support.oracle.samples import Sample, load_sample, scene_video

ATOL = 1e-3
CHOICES = ["the white rabbit", "the bird", "nobody"]
CUTS: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 5, "top_p": 0.5}]
SCHEMA = {
    "type": "object",
    "properties": {"who": {"enum": ["rabbit", "bird"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["who", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=23)


@pytest.fixture(scope="module")
def running(sample: Sample) -> Iterator[Engine]:
    with engine(sample, {"decode_retention": 0.5}, max_num_batched_tokens=96, max_num_seqs=8) as started:
        yield started


def structured(**kind: Any) -> dict[str, Any]:
    """Sampling parameters for an answer that a grammar rules and ends."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**kind), "ignore_eos": False}


def finish(running: Engine, ids: list[str]) -> tuple[list[Any], int]:
    """Outputs of the requests, and how many bytes of prompts were deferred at most."""
    outputs: dict[str, Any] = {}
    deferred = 0
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
        deferred = max(deferred, running.runner.model_state.pruned.deferred_bytes)
    return [outputs[i] for i in ids], deferred


def fed(running: Engine, case: Case, answer: OracleResult) -> Tensor:
    """The oracle's log-probabilities [steps, vocabulary] where the answer's own tokens are fed."""
    steps = len(answer.tokens)
    rows = running.oracle(Case(**{**vars(case), "max_tokens": steps}), force_tokens=answer.tokens).logprobs
    assert isinstance(rows, Tensor)
    return rows


def allowed(tokenizer: Any, said: str) -> list[int]:
    """Tokens that go on from `said` towards one of the choices."""
    rests = [choice[len(said) :] for choice in CHOICES if choice.startswith(said) and choice != said]
    pieces = {i: tokenizer.decode([i]) for i in range(len(tokenizer))}
    return [i for i, piece in pieces.items() if piece and any(rest.startswith(piece) for rest in rests)]


def test_a_choice_is_the_best_that_the_grammar_allows(running: Engine, sample: Sample) -> None:
    """At every token: of those that lead to a choice the engine takes the oracle's best,
    with the oracle's logprob of it.
    """
    cases = [Case((scene_video(seed, 24),), metok=metok) for seed, metok in ((1, None), (2, {"decode_retention": 1}))]
    free = Case((scene_video(3, 20),), max_tokens=8)
    ids = [running.add(case, **structured(choice=CHOICES)) for case in cases]
    ids.append(running.add(free))  # no grammar rules this one, in the same steps
    outputs, deferred = finish(running, ids)
    assert deferred > 0, "no prompt took several steps"
    tokenizer = sample.processor.tokenizer
    for case, output in zip(cases, outputs, strict=False):
        assert output.outputs[0].text in CHOICES
        answer = observed(output)
        said, ruled, open_ended = "", 0, 0
        for row, token, entries in zip(fed(running, case, answer), answer.tokens, answer.logprobs, strict=True):
            if token == tokenizer.eos_token_id:
                assert said in CHOICES
                break
            candidates = allowed(tokenizer, said)
            assert token == max(candidates, key=lambda i: float(row[i]))
            assert entries[token] == pytest.approx(float(row[token] - row[candidates].logsumexp(0)), abs=ATOL)
            ruled += token != int(row.argmax())
            open_ended += len(candidates) > 1
            said += tokenizer.decode([token])
        assert said in CHOICES
        assert ruled > 0, "the grammar decided nothing"
        assert open_ended > 0, "the model decided nothing"
    assert_same(running.oracle(free), observed(outputs[-1]), ATOL)
    running.check_drained()


def test_an_answer_obeys_a_json_schema(running: Engine) -> None:
    case = Case((scene_video(4, 24),), max_tokens=64)
    (output,), deferred = finish(running, [running.add(case, **structured(json=SCHEMA))])
    assert deferred > 0
    value = json.loads(output.outputs[0].text)
    assert set(value) == {"who", "count"}
    assert value["who"] in ("rabbit", "bird")
    assert value["count"] in range(10)
    answer = observed(output)
    compared = 0
    for row, token, entries in zip(fed(running, case, answer), answer.tokens, answer.logprobs, strict=True):
        for other, logprob in entries.items():
            if other != token and math.isfinite(logprob) and logprob > -1e4:  # allowed as well
                assert entries[token] - logprob == pytest.approx(float(row[token] - row[other]), abs=ATOL)
                assert entries[token] >= logprob
                compared += 1
    assert compared > 5, "the grammar left the model no choice"
    running.check_drained()


def test_top_k_and_top_p_choose_among_the_best(running: Engine) -> None:
    case = Case((scene_video(4, 20),), max_tokens=6)
    ids = [running.add(case, temperature=1.0, seed=seed, **cut) for seed in range(4) for cut in CUTS]
    outputs, _ = finish(running, ids)
    for output, cut in zip(outputs, CUTS * 4, strict=True):
        answer = observed(output)
        rows = fed(running, case, answer)
        for token, row in zip(answer.tokens, rows, strict=True):
            better = row[row > row[token]]
            if "top_k" in cut:
                assert len(better) < cut["top_k"]
            assert float(better.exp().sum()) < cut.get("top_p", 1.0) + ATOL
    running.check_drained()


# Last in this file: an engine that does not start ends the distributed state of the one that the fixture
# holds.
def test_lora_is_refused_at_the_start(sample: Sample) -> None:
    with pytest.raises(ValueError, match="does not support LoRA"), engine(sample, enable_lora=True):
        pass
