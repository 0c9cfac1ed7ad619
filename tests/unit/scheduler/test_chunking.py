"""The rules by which pruned prompts are cut, each alone;
the scheduler that keeps them is in `test_scheduler.py`.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.scheduler.chunking import DeferralBudget, EncoderSchedule, EndingLimit, longest_chunk


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, int, int, set[int]]:
    """Tokens computed, tokens wanted, prompt length, and where items start."""
    prompt_len = draw(st.integers(2, 60))
    computed = draw(st.integers(0, prompt_len - 1))
    starts = draw(st.sets(st.integers(0, prompt_len - 1), max_size=4))
    return computed, draw(st.integers(0, 80)), prompt_len, starts


def allowed(chunk: int, computed: int, prompt_len: int, starts: set[int]) -> bool:
    """Rules 1 and 2, as they are written."""
    end = computed + chunk
    forces_one = end + 1 == prompt_len or any(end + 1 == start for start in starts)
    return end <= prompt_len and chunk != 1 and not forces_one


@given(prompts())
def test_the_longest_chunk_keeps_the_rules_and_is_the_longest(prompt: tuple[int, int, int, set[int]]) -> None:
    computed, wanted, prompt_len, starts = prompt
    chunk = longest_chunk(computed, wanted, prompt_len, starts)
    assert 0 <= chunk <= wanted
    if chunk:
        assert allowed(chunk, computed, prompt_len, starts)
    longer = range(chunk + 1, min(wanted, prompt_len - computed) + 1)
    assert not [more for more in longer if allowed(more, computed, prompt_len, starts)]


def test_a_prompt_that_fits_is_one_chunk() -> None:
    assert longest_chunk(0, 64, 40, {3, 20}) == 40
    assert longest_chunk(0, 39, 40, set()) == 38, "39 would leave a chunk of one token"
    assert longest_chunk(0, 20, 40, {21}) == 19, "20 could force a chunk of one token before the item"
    assert longest_chunk(38, 1, 40, set()) == 0


def test_the_deferral_budget_counts_what_is_held_and_what_is_offered() -> None:
    budget = DeferralBudget(bytes_per_token=10, limit=1000)
    assert budget.admits("a", 60)
    budget.offer("a", 60)
    assert not budget.admits("b", 41)
    assert budget.admits("b", 40)
    assert budget.admits("a", 60), "it is admitted already"
    budget.settle({})
    budget.offered.clear()
    assert budget.admits("b", 100), "it was offered a chunk, but found no blocks"
    budget.settle({"a": 60})
    assert budget.held == {"a": 600}
    budget.forget("a")
    assert budget.admits("b", 100)


def test_one_deferred_prompt_may_always_end() -> None:
    ending = EndingLimit(limit=100)
    assert ending.admits("a", 500)
    ending.ending["a"] = 500
    assert not ending.admits("b", 2)
    assert ending.admits("a", 500)
    ending.forget("a")
    ending.ending["c"] = 60
    assert ending.admits("b", 40)
    assert not ending.admits("b", 41)


def test_nothing_scheduled_leaves_the_encoder_budget() -> None:
    assert tuple(EncoderSchedule.nothing(7)) == ([], 0, 7, [], [])
