"""Answers of an engine that rounds: exact counts of tokens and blocks, nothing left behind, log-probabilities
near the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.kv_cache_interface import MambaSpec

from metok_vllm.contract.kv_spec import TEXT_AND_RETAINED
from metok_vllm.scheduler.kv_manager import DeepKVManager
from tests.support.harness import Case, Engine
from tests.support.oracle import OracleResult


def check_near(running: Engine, asked: Sequence[Case], pruned: int, near: float) -> None:
    """Ask all at once, and compare with the oracle along the engine's own tokens.

    Args:
        running: the engine.
        asked: the requests; the first `pruned` of them hold a pruned video, no other does.
        pruned: how many.
        near: how far the log-probability of a chosen token may be off.
    """
    held: dict[str, tuple[int, ...]] = {}
    before = set(running.internal)

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
    asked_now = [name for name in running.internal if name not in before]
    for name, reference in zip(asked_now[:pruned], expected, strict=False):
        _check_blocks(running, running.internal[name], reference)
    for name, reference in zip(asked_now[pruned:], expected[pruned:], strict=True):
        _check_stock_blocks(running, running.internal[name], reference)
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.prompt_ids == reference.prompt_ids  # as many visual tokens are encoded
        for token, ours, theirs in zip(answer.tokens, answer.logprobs, reference.logprobs, strict=True):
            off = abs(ours[token] - float(theirs[token]))
            assert off < near, f"off by {off:.3f}"


def _check_blocks(running: Engine, name: str, reference: OracleResult) -> None:
    """In the end a request holds blocks for what the oracle keeps of its prompt and for its answer.

    Where visual tokens are retained, the scheduler has reserved for the most that can be.
    """
    assert reference.kv_positions is not None
    assert reference.prune_layers is not None
    prompt, answer = len(reference.prompt_ids), len(reference.tokens)
    most = [max(column) for column in zip(*running.groups_seen[name], strict=True)]
    for manager, blocks in zip(running.managers, most, strict=True):
        kept = reserved = prompt
        size = manager.block_size
        if isinstance(manager, DeepKVManager):
            retains = manager.kind == TEXT_AND_RETAINED
            kept = len(reference.kv_positions[reference.prune_layers[0] if retains else -1])
            reserved = prompt if kept < prompt and reference.retained and retains else kept
        # The last token is never computed, and the one before it in the step behind which all is given back.
        least, largest = -(-(kept + answer - 2) // size), -(-(reserved + answer - 1) // size)
        assert least <= blocks <= largest, f"{blocks} blocks of {size} for {kept} of {prompt} tokens"


def _check_stock_blocks(running: Engine, name: str, reference: OracleResult) -> None:
    """A request that is not pruned holds blocks for all of its tokens, in every group that attends."""
    tokens = len(reference.prompt_ids) + len(reference.tokens)
    most = [max(column) for column in zip(*running.groups_seen[name], strict=True)]
    for manager, blocks in zip(running.managers, most, strict=True):
        if not isinstance(manager.kv_cache_spec, MambaSpec):
            least, largest = (-(-(tokens - uncounted) // manager.block_size) for uncounted in (2, 1))
            assert least <= blocks <= largest, f"{blocks} blocks of {manager.block_size} for {tokens} tokens"
