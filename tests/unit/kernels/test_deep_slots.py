"""`deep_slots` and `slots_at` against their references, and the references against a plain simulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.deep_slots import (
    PAD_SLOT,
    DeepGroups,
    deep_slots,
    reference,
    reference_slots_at,
    slots_at,
)

from tests.support.kernels.common import cumulative, few_examples, ints

KINDS = (0, 1, 1)
SIZES = (16, 32, 5)
SLOT_ROWS = (1, 2, 4)

requests = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60), st.integers(0, 70))
"""(shift of kind 0, shift of kind 1, tokens computed behind the shift, query length) of one batch row."""


WINDOW_KINDS = (4, 0, 2, 3, 2, 4)
"""The kinds that `kv_layers` makes, the released one first; two of them have two groups."""

WINDOW_SIZES = (96, 16, 32, 5, 32, 16)


def groups(
    rows: int, width: int, device: torch.device, kinds: tuple[int, ...] = KINDS, sizes: tuple[int, ...] = SIZES
) -> DeepGroups:
    gen = torch.Generator().manual_seed(rows)
    tables = [torch.randperm(rows * width, generator=gen).view(rows, width).int().to(device) for _ in sizes]
    return DeepGroups(tables, sizes, kinds, SLOT_ROWS if kinds == KINDS else None)


def step(
    rows: list[tuple[int, int, int, int]], state_row: list[int], device: torch.device, index: torch.dtype = torch.int32
) -> tuple[torch.Tensor, ...]:
    """`shift`, `state_row`, `total` and `query_start` of one step."""
    shift = torch.full((2, max(state_row) + 4), 99, dtype=torch.int32, device=device)
    for row, (first, second, _, _) in zip(state_row, rows, strict=True):
        if row >= 0:
            shift[:, row] = ints(first, second, device=device)
    total = ints(*(max(a, b) + computed + length for a, b, computed, length in rows), device=device)
    return (
        shift,
        torch.tensor(state_row, dtype=index, device=device),
        total,
        cumulative((row[3] for row in rows), device),
    )


def run(operation: Any, known: DeepGroups, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(seq_lens, slot_mapping), written over rubbish."""
    batch, tokens = arguments[1].shape[0], int(arguments[3][-1])
    device = arguments[0].device
    seq_lens = torch.full((3, batch + 3), -77, dtype=torch.int32, device=device)
    slots = torch.full((6, tokens + 9), -77, dtype=torch.int64, device=device)
    operation(known, *arguments, seq_lens, slots)
    return seq_lens, slots


def assert_same(known: DeepGroups, *arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    actual, expected = run(deep_slots, known, *arguments), run(reference, known, *arguments)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    return actual


@few_examples
@given(rows=st.lists(requests, min_size=1, max_size=4), index=st.sampled_from([torch.int32, torch.int64]))
def test_matches_reference(rows: list[tuple[int, int, int, int]], index: torch.dtype, device: torch.device) -> None:
    order = list(reversed(range(len(rows))))
    assert_same(groups(len(rows) + 2, 12, device), *step(rows, order, device, index))


@few_examples
@given(
    shifts=st.lists(st.lists(st.integers(0, 40), min_size=5, max_size=5), min_size=1, max_size=4),
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=4, max_size=4),
)
def test_as_many_kinds_as_there_are(
    shifts: list[list[int]], lengths: list[tuple[int, int]], device: torch.device
) -> None:
    """Five rows of shifts, of which four have groups: each its own, and the fifth is left alone."""
    batch = len(shifts)
    known = groups(batch, 40, device, WINDOW_KINDS, WINDOW_SIZES)
    shift = torch.tensor(shifts, dtype=torch.int32, device=device).T.contiguous()
    state_row = torch.arange(batch, device=device)
    lengths = lengths[:batch]
    total = ints(*(40 + before + length for before, length in lengths), device=device)
    query_start = cumulative((length for _, length in lengths), device)
    found = []
    for operation in (deep_slots, reference):
        seq_lens = torch.full((5, batch), -77, dtype=torch.int32, device=device)
        slots = torch.full((len(WINDOW_KINDS), int(query_start[-1]) + 3), -77, dtype=torch.int64, device=device)
        operation(known, shift, state_row, total, query_start, seq_lens, slots)
        found.append((seq_lens, slots))
    (seq_lens, slots), expected = found
    assert torch.equal(seq_lens, expected[0])
    assert torch.equal(slots, expected[1])
    own = total - shift
    assert seq_lens.tolist() == [own[kind].tolist() if kind != 1 else [-77] * batch for kind in range(5)]
    tokens = torch.stack([
        ints(*(row for row, (_, length) in enumerate(lengths) for _ in range(length)), device=device),
        ints(*range(int(query_start[-1])), device=device),
        ints(*[0] * int(query_start[-1]), device=device),
    ]) if int(query_start[-1]) else None  # fmt: skip
    if tokens is not None:
        positions = torch.cat([torch.arange(40 + before, 40 + before + length) for before, length in lengths])
        by_row = (shift, state_row, positions.to(device), tokens)
        assert torch.equal(slots_at(known, *by_row), reference_slots_at(known, *by_row))
        assert torch.equal(slots_at(known, *by_row), slots[:, :-3])


def test_each_group_and_kind_has_its_own_row_and_no_other_is_touched(device: torch.device) -> None:
    """Slots of a decode token by hand, and rows of nobody as they were."""
    known = groups(2, 12, device)
    seq_lens, slots = assert_same(known, *step([(30, 40, 5, 1)], [3], device))
    assert seq_lens.tolist() == [[16, 0, 0, 0], [6, 0, 0, 0], [-77] * 4]
    for group, (row, size, index) in enumerate(zip(SLOT_ROWS, SIZES, (15, 5, 5), strict=True)):
        block = int(known.tables[group][0, index // size])
        assert slots[row].tolist() == [block * size + index % size] + [PAD_SLOT] * 9
    assert (slots[[0, 3, 5]] == -77).all()


def test_decode_steps_continue_one_request(device: torch.device) -> None:
    """Steps of any length after the prompt own the slots that one long step would."""
    known = groups(1, 12, device)
    _, whole = assert_same(known, *step([(7, 20, 3, 57)], [0], device))
    pieces, computed = [], 3
    for length in (1, 1, 40, 15):
        seq_lens, slots = assert_same(known, *step([(7, 20, computed, length)], [0], device))
        computed += length
        assert seq_lens[1, 0] == computed
        pieces.append(slots[:, :length])
    assert torch.equal(torch.cat(pieces, dim=1)[list(SLOT_ROWS)], whole[list(SLOT_ROWS), :57])


def test_padding_rows_and_rows_of_state_in_any_order(device: torch.device) -> None:
    """A mixed step: a prompt's chunk, a decode, a request without pruned tokens, two padding rows."""
    known = groups(6, 12, device)
    rows = [(0, 0, 10, 40), (9, 30, 8, 1), (0, 0, 0, 17), (5, 5, 0, 4), (5, 5, 0, 2)]
    seq_lens, slots = assert_same(known, *step(rows, [5, 0, 3, -1, 100], device)[:1], *step(rows, [5, 0, 3, -1, -1],
                                  device)[1:])  # fmt: skip
    assert seq_lens[:2, 3:].tolist() == [[0] * 5] * 2
    own = slots[list(SLOT_ROWS)]
    assert (own[:, 58:] == PAD_SLOT).all()
    assert (own[:2, 40:58] != PAD_SLOT).all()


def test_a_padded_batch_may_bring_longer_tensors(device: torch.device) -> None:
    """`total` and `query_start` as vLLM pads them for a graph; `slot_mapping` and `seq_lens` are views."""
    known = groups(4, 12, device)
    shift, state_row, total, query_start = step([(3, 4, 5, 6), (0, 0, 9, 1)], [1, 0], device)
    expected = run(deep_slots, known, shift, state_row, total, query_start)
    padded = torch.cat([total, ints(0, 0, device=device)]), torch.cat([query_start, ints(7, 7, device=device)])
    room_lens = torch.full((3, 40), -77, dtype=torch.int32, device=device)
    room_slots = torch.full((6, 50), -77, dtype=torch.int64, device=device)
    deep_slots(known, shift, state_row, *padded, room_lens[:, :5], room_slots[:, :16])
    assert torch.equal(room_lens[:, :5], expected[0])
    assert torch.equal(room_slots[:, :16], expected[1])
    assert (room_lens[:, 5:] == -77).all()
    assert (room_slots[:, 16:] == -77).all()


def test_slots_past_the_table_are_padding(device: torch.device) -> None:
    known = groups(1, 2, device)  # 32 slots in the first group, 64 in the second, 10 in the third
    _, slots = assert_same(known, *step([(0, 0, 0, 40)], [0], device))
    assert (slots[1, 32:] == PAD_SLOT).all()
    assert (slots[2, :40] != PAD_SLOT).all()
    assert (slots[4, 10:] == PAD_SLOT).all()


def test_slots_past_2_to_the_31(device: torch.device) -> None:
    table = ints(2**28, 2**30, device=device)[None]
    known = DeepGroups([table], [16], [0])
    shift, state_row, total, query_start = step([(0, 0, 0, 20)], [0], device)
    seq_lens, slots = run(deep_slots, known, shift, state_row, total, query_start)
    assert slots[0, 3].item() == 2**32 + 3
    assert slots[0, 19].item() == 2**34 + 3
    assert int(seq_lens[0, 0]) == 20
    tokens = torch.tensor([[0, 0], [-1, 19], [3, 0]], dtype=torch.int32, device=device)
    at = slots_at(known, shift, state_row, torch.arange(20, device=device), tokens)
    assert at.tolist() == [[2**32 + 3, 2**34 + 3]]


@st.composite
def named_tokens(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(batch row, row in the batch or -1, slot index), some of which do not exist."""
    one = st.tuples(st.integers(-2, 5), st.integers(-1, 40), st.integers(-3, 400))
    return draw(st.lists(one, min_size=0, max_size=140))


@few_examples
@given(tokens=named_tokens(), index=st.sampled_from([torch.int32, torch.int64]))
def test_slots_at_matches_reference(
    tokens: list[tuple[int, int, int]], index: torch.dtype, device: torch.device
) -> None:
    known = groups(6, 12, device)
    shift, state_row, _, _ = step(
        [(3, 4, 5, 6), (0, 0, 9, 1), (20, 30, 0, 9), (1, 1, 1, 1)], [1, 0, 2, -1], device, index
    )
    positions = torch.arange(30, dtype=index, device=device) + 11
    given_tokens = torch.tensor(tokens, dtype=torch.int32, device=device).view(-1, 3).T.contiguous()
    arguments = known, shift, state_row, positions, given_tokens
    assert torch.equal(slots_at(*arguments), reference_slots_at(*arguments))


def test_slots_at_equals_deep_slots_by_position_and_by_index(device: torch.device) -> None:
    """Every token of a step, named by its row in the batch and by its slot index, in another order."""
    known = groups(3, 12, device)
    shift, state_row, total, query_start = step([(7, 20, 3, 9), (0, 0, 11, 5)], [1, 0], device)
    seq_lens, slots = run(deep_slots, known, shift, state_row, total, query_start)
    positions = torch.cat([torch.arange(23, 32), torch.arange(11, 16)]).to(device)
    order = torch.tensor([13, 0, 5, 9, 8, 1])
    rows = (order >= 9).int()
    by_position = torch.stack([rows, order.int(), torch.full_like(rows, -5)]).to(device)
    expected = slots[list(SLOT_ROWS)][:, order.to(device)]
    assert torch.equal(slots_at(known, shift, state_row, positions, by_position), expected)
    for kind, group in ((0, 0), (1, 2)):
        index = positions[order] - shift[kind][state_row.long()[rows.long()]].to(positions.device)
        assert int(index.max()) < int(seq_lens[kind].max())
        by_index = torch.stack([rows.to(device), torch.full_like(rows, -1).to(device), index.int()])
        assert torch.equal(slots_at(known, shift, state_row, positions, by_index)[group], expected[group])


def test_no_token_is_no_launch(device: torch.device) -> None:
    known = groups(1, 2, device)
    shift, state_row, _, _ = step([(0, 0, 0, 1)], [0], device)
    none = torch.empty(3, 0, dtype=torch.int32, device=device)
    assert slots_at(known, shift, state_row, torch.zeros(0, dtype=torch.int64, device=device), none).shape == (3, 0)


def test_refusals(device: torch.device) -> None:
    known = groups(2, 4, device)
    shift, state_row, total, query_start = step([(0, 0, 1, 1)] * 2, [0, 1], device)
    out = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(5, 9, dtype=torch.int64, device=device)
    good = [known, shift, state_row, total, query_start, *out]

    def refused(position: int, value: Any, message: str, error: type[Exception] = ValueError) -> None:
        arguments = list(good)
        arguments[position] = value
        with pytest.raises(error, match=message):
            deep_slots(*arguments)

    deep_slots(*good)
    refused(1, shift[:1], "shift has 1 rows for 2 kinds")
    refused(1, shift.long(), "shift is int64, expected int32", TypeError)
    refused(2, ints(0, 0, 1, device=device), "total has 2 entries for 3 requests")
    refused(4, query_start[:2], "query_start has 2 entries, 2 requests need one more")
    refused(5, out[0][:1], "seq_lens has 1 rows, 2 needed")
    refused(5, out[0][:, :1], "seq_lens has 1 columns for 2 requests")
    refused(6, out[1][:4], "slot_mapping has 4 rows, 5 needed")
    refused(0, groups(1, 4, device), "the block tables have 1 rows for 2 requests")
    with pytest.raises(TypeError, match="tokens is int64, expected int32"):
        slots_at(known, shift, state_row, total, torch.zeros(3, 2, dtype=torch.int64, device=device))
    table = ints(1, 2, device=device)[None]
    for arguments, message in (
        (([], [], []), "at least one deep group"),
        (([table], [16, 16], [0]), "differ in length"),
        (([table], [0], [0]), "at least one token"),
        (([table], [16], [-1]), "not negative"),
        (([table, table[:, :1].expand(2, 1).contiguous()], [16, 16], [0, 0]), "expected \\[1, any\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepGroups(*arguments)  # type: ignore[arg-type]
