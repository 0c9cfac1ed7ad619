"""Same request, same answer: whatever a request asks of the sampler, its tokens are those the oracle's
log-probabilities give.

Each answer is fed to the oracle, and every token must be the best under the rule that the option states.
That rule is written here a second time. An option must also have moved a token, or it has shown nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.test_features import finish, structured
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import OracleResult, assert_same, decoder
from tests.support.oracle.samples import Sample, load_sample, scene_video

ATOL = 1e-3
STEPS = 8
SETTINGS: dict[str, Any] = {"half retained": None, "none retained": {"decode_retention": 0}}
Rule = Callable[[Tensor, list[int], list[int]], Tensor]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=29)


@pytest.fixture(scope="module")
def running(sample: Sample) -> Iterator[Engine]:
    # Small steps: every prompt takes several.
    with engine(sample, {"decode_retention": 0.5}, max_num_batched_tokens=96, max_num_seqs=8) as started:
        yield started


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case((scene_video(7, 18),), metok=request.param, max_tokens=STEPS)


@pytest.fixture(scope="module")
def greedy(running: Engine, case: Case) -> OracleResult:
    """The oracle's own answer."""
    return running.oracle(case)


def ask(running: Engine, case: Case, **sampling: Any) -> Any:
    ((output,), deferred) = finish(running, [running.add(case, **sampling)])
    assert deferred > 0, "the prompt took one step"
    return output


def rows_for(running: Engine, case: Case, tokens: list[int]) -> Tensor:
    """The oracle's log-probabilities [steps, vocabulary] where these tokens are fed."""
    longer = Case(**{**vars(case), "max_tokens": len(tokens)})
    rows = running.oracle(longer, force_tokens=tokens).logprobs
    assert isinstance(rows, Tensor)
    return rows


# --- rules, written a second time ---


def as_it_is(row: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    return row


def among(row: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    kept = torch.full_like(row, -torch.inf)
    kept[FEW] = row[FEW]
    return kept


def once_less(row: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    row[list(set(said))] -= 2.0
    return among(row, prompt, said)


def less_each_time(row: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    for token, times in Counter(said).items():
        row[token] -= 2.0 * times
    return among(row, prompt, said)


def repeated(logits: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    seen = list({*prompt, *said})
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3.0, logits[seen] * 3.0)
    return logits


def biased(row: Tensor, prompt: list[int], said: list[int]) -> Tensor:
    for token, amount in BIAS.items():
        row[token] += amount
    return row


BIAS = {i: (2.5 if i % 3 == 0 else -1.0) for i in range(300)}
FEW = [40, 77, 110]
"""Among so few the model says one again soon, which is what a penalty is for."""

RULES: dict[str, tuple[dict[str, Any], Rule, Rule]] = {
    "allowed tokens": ({"allowed_token_ids": FEW}, among, as_it_is),
    "presence": ({"allowed_token_ids": FEW, "presence_penalty": 2.0}, once_less, among),
    "frequency": ({"allowed_token_ids": FEW, "frequency_penalty": 2.0}, less_each_time, among),
    "repetition": ({"repetition_penalty": 3.0}, repeated, as_it_is),
    "logit bias": ({"logit_bias": BIAS}, biased, as_it_is),
}
"""Parameters, what they ask for, and what would be answered without the one in question."""


@pytest.mark.parametrize(("option", "rule", "without"), RULES.values(), ids=RULES)
def test_the_best_token_under_a_rule(
    running: Engine, option: dict[str, Any], rule: Rule, without: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = 0
    # A penalty for repeating multiplies, so it needs the logits themselves.
    monkeypatch.setattr(decoder, "log_probabilities", logits_of)
    for metok in SETTINGS.values():
        case = Case((scene_video(7, 18),), metok=metok, max_tokens=STEPS)
        answer = observed(ask(running, case, **option))
        for step, row in enumerate(rows_for(running, case, answer.tokens)):
            said = answer.tokens[:step]
            ruled = rule(row.clone(), answer.prompt_ids, said)
            assert float(ruled.max() - ruled[answer.tokens[step]]) < ATOL, f"step {step}"
            moved += answer.tokens[step] != int(without(row.clone(), answer.prompt_ids, said).argmax())
    assert moved > 0, "the option has decided nothing"
    running.check_drained()


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    language = model.model.language_model
    logits: Tensor = model.lm_head(language.norm(hidden)).float()
    return logits


def test_bad_words(running: Engine, case: Case, greedy: OracleResult, sample: Sample) -> None:
    tokenizer = sample.processor.tokenizer
    banned = next(token for token in greedy.tokens if tokenizer.decode([token]).strip().isalnum())
    word = tokenizer.decode([banned]).strip()
    answer = observed(ask(running, case, bad_words=[word]))
    alone = {i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip() == word}
    assert not alone.intersection(answer.tokens)
    for row, token in zip(rows_for(running, case, answer.tokens), answer.tokens, strict=True):
        row[list(alone)] = -torch.inf
        assert float(row.max() - row[token]) < ATOL


def test_min_p_leaves_the_likely_ones(running: Engine, case: Case) -> None:
    for seed in range(2):
        answer = observed(ask(running, case, temperature=1.0, min_p=0.4, seed=seed))
        for row, token in zip(rows_for(running, case, answer.tokens), answer.tokens, strict=True):
            assert float(row[token] - row.max()) > torch.tensor(0.4).log() - ATOL


def test_a_seed_gives_the_same_sample_alone_and_among_others(running: Engine, case: Case) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 11}
    alone = observed(ask(running, case, **sampling))
    other = Case((scene_video(8, 16),), max_tokens=STEPS)
    ids = [running.add(other, temperature=1.0), running.add(case, **sampling), running.add(case, **sampling)]
    outputs, _ = finish(running, ids)
    assert [observed(output).tokens for output in outputs[1:]] == [alone.tokens, alone.tokens]
    different = observed(ask(running, case, temperature=1.0, seed=12))
    assert different.tokens != alone.tokens
    rows = rows_for(running, case, alone.tokens)
    for row, token, entries in zip(rows, alone.tokens, alone.logprobs, strict=True):
        assert entries[token] == pytest.approx(float(row[token]), abs=ATOL)


def test_several_samples_of_one_prompt(running: Engine, case: Case) -> None:
    output = ask(running, case, temperature=1.0, seed=3, n=3)
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    for one in output.outputs:
        rows = rows_for(running, case, list(one.token_ids))
        for row, token, entries in zip(rows, one.token_ids, one.logprobs, strict=True):
            assert entries[token].logprob == pytest.approx(float(row[token]), abs=ATOL)
    running.check_drained()


def test_one_token_is_the_first_of_the_whole_answer(running: Engine, case: Case) -> None:
    short = Case(**{**vars(case), "max_tokens": 1})
    assert_same(running.oracle(short), observed(ask(running, short)), ATOL)


@pytest.mark.parametrize("count", [0, 20])
def test_log_probabilities(running: Engine, case: Case, greedy: OracleResult, count: int) -> None:
    answer = observed(ask(running, case, logprobs=count))
    assert_same(greedy, answer, ATOL)
    assert all(len(entries) >= max(count, 1) for entries in answer.logprobs)


def test_an_answer_ends_where_it_is_told_to(running: Engine, case: Case, greedy: OracleResult, sample: Sample) -> None:
    tokens = greedy.tokens
    last = next(i for i in range(2, STEPS) if tokens[i] not in tokens[:i])
    by_token = ask(running, case, stop_token_ids=[tokens[last]]).outputs[0]
    assert list(by_token.token_ids) == tokens[: last + 1]
    assert by_token.stop_reason == tokens[last]
    text = sample.processor.tokenizer.decode(tokens)
    word = sample.processor.tokenizer.decode(tokens[last : last + 1])
    by_text = ask(running, case, stop=[word]).outputs[0]
    assert by_text.text == text[: text.index(word)]
    assert list(by_text.token_ids) == tokens[: len(by_text.token_ids)]
    held_off = ask(running, case, stop_token_ids=[tokens[last]], min_tokens=last + 2).outputs[0]
    assert len(held_off.token_ids) >= last + 2


def test_a_regular_expression(running: Engine, case: Case) -> None:
    output = ask(running, case, **structured(regex="(yes|no), [a-z]{3,5}"))
    answer = observed(output)
    assert re.fullmatch("(yes|no), [a-z]{3,5}", output.outputs[0].text)
    for row, token, entries in zip(rows_for(running, case, answer.tokens), answer.tokens, answer.logprobs, strict=True):
        for other, logprob in entries.items():
            if other != token and logprob > -1e4:
                assert entries[token] - logprob == pytest.approx(float(row[token] - row[other]), abs=ATOL)


# --- beam search ---


def beams(running: Engine, case: Case, width: int) -> list[tuple[list[int], float]]:
    """Beam search over the oracle: of all next tokens of all beams the best `width`, at every step."""
    best: list[tuple[list[int], float]] = [([], 0.0)]
    for _ in range(case.max_tokens):
        found = []
        for tokens, total in best:
            row = rows_for(running, case, [*tokens, 0])[-1]
            values, ids = row.topk(2 * width)
            found += [([*tokens, int(i)], total + float(v)) for i, v in zip(ids, values, strict=True)]
        best = sorted(found, key=lambda beam: -beam[1])[:width]
    return best


@pytest.mark.parametrize("width", [1, 3])
def test_beam_search(running: Engine, case: Case, greedy: OracleResult, width: int) -> None:
    """Every step is a new prompt in vLLM, the answer so far at its end: that part must score nothing."""
    from vllm.sampling_params import BeamSearchParams

    short = Case(**{**vars(case), "max_tokens": 5})
    prompt: dict[str, Any] = {"prompt_token_ids": running.prompt_ids(short)}
    prompt["multi_modal_data"] = {"video": list(short.videos)}
    if short.metok is not None:
        prompt["mm_processor_kwargs"] = {"metok": short.metok}
    params = BeamSearchParams(beam_width=width, max_tokens=short.max_tokens, ignore_eos=True)
    # Another prompt in the same call: vLLM gives both the same parameters.
    (found, text) = running.llm.beam_search([prompt, {"prompt_token_ids": [5, 6, 7]}], params)
    assert len(text.sequences[0].tokens) == 3 + short.max_tokens
    expected = beams(running, short, width)
    assert [beam.tokens[-short.max_tokens :] for beam in found.sequences] == [tokens for tokens, _ in expected]
    for beam, (_, total) in zip(found.sequences, expected, strict=True):
        assert beam.cum_logprob == pytest.approx(total, abs=short.max_tokens * ATOL)
    if width == 1:
        assert found.sequences[0].tokens[-short.max_tokens :] == greedy.tokens[: short.max_tokens]
    running.check_drained()


# --- refused ---


def test_what_stands_under_metoks_key_in_the_extra_arguments(running: Engine, case: Case) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="is METok's own; settings go into mm_processor_kwargs"):
        running.add(case, extra_args={"metok": {"preset": "balanced"}})
    running.check_drained()


def test_embeddings_of_a_video_prompt(running: Engine, case: Case) -> None:
    with pytest.raises(ValueError, match="only supported for pooling models"):
        running.llm.encode(
            {"prompt_token_ids": running.prompt_ids(case), "multi_modal_data": {"video": list(case.videos)}},
            pooling_task="token_embed",
        )
    running.check_drained()
