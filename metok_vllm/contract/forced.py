"""One answer seen by two models: told its tokens one by one, each says what it would have thought of them.

vLLM can be told an answer (`SamplingParams.trace_decode_token_ids`, with `enable_trace_replay`). So one
changed word does not make all words behind it incomparable. `metok calibrate` compares settings by it, and a
server its own answers with what the model says without METok (`serve/shadow`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

TOP = 20
"""Tokens of a distribution that are compared, and vLLM's own limit of `logprobs`."""

MOST_IDS = 128
"""Tokens whose log-probabilities one request can ask for (`MAX_LOGPROB_TOKEN_IDS` in
vllm/sampling_params.py).
"""

NEAR_TIE = 0.1
"""Nats. A token that is nearer than this to the stock model's own choice is as good: so far number types and
batches move it. More must not be forgiven. Where a model is less sure, a setting that shows it less says the
wrong one of the two more often: half as likely as the choice, for one, forgave a third of SmolLM2's lists
(`docs/calibration.md`, Measured).
"""

KL_LIMIT = 0.2
"""Nats. An answer that is farther than this from the stock model's is not left as it was."""

Step = Mapping[int, float]
"""Log-probability by token id, the most probable ones."""


def divergence(stock: Step, variant: Step) -> float:
    """KL(stock || variant) of one token, over the tokens that both state and one bucket for all others.

    Merging tokens into a bucket can only lower it, so this never exceeds the true divergence. NaN, of either
    model, is as far as anything can be.

    Args:
        stock: the stock model's most probable tokens.
        variant: the same of the variant; may state others too.
    """
    if any(map(math.isnan, (*stock.values(), *variant.values()))):
        return -_LEAST
    shared = [token for token in stock if token in variant]
    ours, theirs = ([max(step[t], _LEAST) for t in shared] for step in (stock, variant))
    total = sum(math.exp(p) * (p - q) for p, q in zip(ours, theirs, strict=True))
    rest_stock = max(0.0, 1.0 - math.fsum(map(math.exp, ours)))
    rest_variant = max(0.0, 1.0 - math.fsum(map(math.exp, theirs)))
    if rest_stock > _ROUNDING:
        total += rest_stock * (math.log(rest_stock) - math.log(max(rest_variant, math.exp(_LEAST))))
    return max(0.0, total)


_LEAST = -50.0  # a log-probability of -inf counts as this
_ROUNDING = 1e-6  # what float32 log-probabilities do not add up to


def choice(token: int, rank: int, step: Step) -> int | None:
    """What a model that was told `token` would have said in its place; None if it may be one not asked about.

    vLLM ranks a token behind all that are as likely (vllm/v1/worker/gpu/sample/logprob.py): it is the choice
    all the same where every token before it is one of these.

    Args:
        token: the one told.
        rank: its place among all tokens; 1 is the first.
        step: the model's log-probabilities of the tokens asked about, `token` among them.
    """
    own = step[token]
    if rank < 1 or any(map(math.isnan, step.values())):
        return None
    if sum(value == own for value in step.values()) >= rank:
        return token
    ahead = [one for one in step if step[one] > own]
    if not ahead:
        return None
    best = max(ahead, key=step.__getitem__)
    all_known = sum(value >= own for value in step.values()) >= rank
    rest = 1.0 - math.fsum(map(math.exp, step.values()))
    return best if all_known or rest < math.exp(step[best]) else None


def is_choice(stock: Step, token: int | None) -> bool:
    """Whether `token` is the stock model's own choice, or within `NEAR_TIE` of it."""
    return token is not None and max(stock.values()) - stock.get(token, -math.inf) < NEAR_TIE


def told(answer: Sequence[int], *, top: int | None = None, ids: Sequence[int] | None = None) -> SamplingParams:
    """Parameters of a request that is told its answer.

    Args:
        answer: the answer's token ids, one or more.
        top: how many of each step's most probable tokens to state; or
        ids: which tokens to state at every step, at most `MOST_IDS`.
    """
    return SamplingParams(
        temperature=0,
        max_tokens=len(answer),
        trace_decode_token_ids=list(answer),
        logprobs=top,
        logprob_token_ids=None if ids is None else list(ids),
        flat_logprobs=True,  # in the other form a token's rank is lost where it is among those asked for
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def read(flat: Any) -> tuple[list[dict[int, float]], list[int]]:
    """Log-probabilities by token at each step, and the rank of the token taken, which comes first.

    Args:
        flat: vLLM's `FlatLogprobs`.
    """
    spans = [slice(start, end) for start, end in zip(flat.start_indices, flat.end_indices, strict=True)]
    steps = [dict(zip(flat.token_ids[span], flat.logprobs[span], strict=True)) for span in spans]
    return steps, [flat.ranks[span.start] for span in spans]


def ids_to_compare(steps: Iterable[Step]) -> list[int]:
    """The tokens that matter most anywhere in an answer, as many as one request may ask for.

    Every step's best comes first: of an answer of `MOST_IDS` tokens none of them is left out.
    """
    steps = list(steps)
    firsts = dict.fromkeys(max(step, key=step.__getitem__) for step in steps)
    best: dict[int, float] = {}
    for step in steps:
        for token, value in step.items():
            best[token] = max(value, best.get(token, value))
    others = sorted((token for token in best if token not in firsts), key=lambda token: (-best[token], token))
    return sorted([*firsts, *others][:MOST_IDS], key=lambda token: (-best[token], token))
