"""`deep_slots` against its reference, and the reference against a plain simulation of ownership."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.deep_slots import PAD_SLOT, DeepGroups, SpanTables, deep_slots, reference, slot_index

from tests.support.kernels.common import cumulative, few_examples, ints

Spans = list[tuple[int, int, int]]


@st.composite
def span_lists(draw: st.DrawFn) -> Spans:
    """Spans in prompt order without overlap, some touching, some retaining nothing or everything."""
    spans, position = [], 0
    for _ in range(draw(st.integers(0, 20))):
        start = position + draw(st.integers(0, 5))
        length = draw(st.integers(1, 9))
        spans.append((start, length, draw(st.sampled_from([0, 1, length // 2, length]))))
        position = start + length
    return spans


request_rows = st.tuples(span_lists(), st.integers(0, 90), st.integers(0, 70))
"""(spans, computed tokens, query length) of one batch row."""


def tables(requests: list[Spans], device: torch.device) -> SpanTables:
    flat = [span for spans in requests for span in spans]
    columns = [torch.tensor([span[i] for span in flat], dtype=torch.int32, device=device) for i in range(3)]
    cu = cumulative((len(spans) for spans in requests), device)
    return SpanTables(*columns, cu[:-1].contiguous(), cu[1:].contiguous())


def groups(rows: int, width: int, device: torch.device) -> DeepGroups:
    gen = torch.Generator().manual_seed(rows)
    sizes = (16, 32)
    blocks = [torch.randperm(rows * width, generator=gen).view(rows, width).int().to(device) for _ in sizes]
    return DeepGroups(blocks, sizes, (True, False))


def run(
    operation: object,
    known: DeepGroups,
    spans: SpanTables,
    computed: list[int],
    lengths: list[int],
    device: torch.device,
    **rows: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(seq_lens, slot_mapping), written over rubbish."""
    seq_lens = torch.full((len(known), len(computed) + 3), -77, dtype=torch.int32, device=device)
    slots = torch.full((len(known), sum(lengths) + 9), -77, dtype=torch.int64, device=device)
    operation(  # type: ignore[operator]
        known, spans, ints(*computed, device=device), cumulative(lengths, device), seq_lens, slots, **rows
    )
    return seq_lens, slots


def assert_same(*arguments: object, **rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    actual = run(deep_slots, *arguments, **rows)  # type: ignore[arg-type]
    expected = run(reference, *arguments, **rows)  # type: ignore[arg-type]
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    return actual


@few_examples
@given(spans=span_lists(), tail=st.integers(0, 20))
def test_slot_index_counts_owners(spans: Spans, tail: int) -> None:
    """Owners before a position, when the first `retained` tokens of a span are taken as its owners."""
    length = (spans[-1][0] + spans[-1][1] if spans else 0) + tail
    owners = [
        all(not start <= p < start + size or p - start < retained for start, size, retained in spans)
        for p in range(length)
    ]
    assert [slot_index(p, spans) for p in range(length + 1)] == [sum(owners[:p]) for p in range(length + 1)]


@few_examples
@given(requests=st.lists(request_rows, min_size=1, max_size=4))
def test_matches_reference(requests: list[tuple[Spans, int, int]], device: torch.device) -> None:
    known = groups(len(requests), 12, device)
    spans = tables([request[0] for request in requests], device)
    computed = [request[1] for request in requests]
    assert_same(known, spans, computed, [request[2] for request in requests], device)


def test_every_text_token_owns_one_slot_and_every_retained_one_too(device: torch.device) -> None:
    """Slots of the text and indices of the retained tokens together are `seq_lens` different slots."""
    spans: Spans = [(3, 20, 7), (23, 40, 0), (70, 5, 5)]
    known, length = groups(1, 12, device), 100
    seq_lens, slots = assert_same(known, tables([spans], device), [0], [length], device)
    text = slots[0, :length][slots[0, :length] != PAD_SLOT].tolist()
    indices = [slot_index(start, spans) + i for start, _, retained in spans for i in range(retained)]
    retained = [int(known.tables[0][0, r // 16]) * 16 + r % 16 for r in indices]
    assert len(text) == length - 65
    assert len(retained) == 12
    assert len({*text, *retained}) == int(seq_lens[0, 0]) == length - 65 + 12
    assert int(seq_lens[1, 0]) == length - 65  # the other group retains nothing


def test_chunks_and_decode_steps_continue_one_request(device: torch.device) -> None:
    spans: Spans = [(5, 60, 11)]
    known, table = groups(1, 12, device), tables([[(5, 60, 11)]], device)
    _, whole = assert_same(known, table, [0], [90], device)
    pieces = []
    for computed, length in ((0, 7), (7, 50), (57, 20), (77, 12), (89, 1)):
        seq_lens, slots = assert_same(known, table, [computed], [length], device)
        assert int(seq_lens[0, 0]) == slot_index(computed + length, spans)
        pieces.append(slots[:, :length])
    assert torch.equal(torch.cat(pieces, dim=1), whole[:, :90])


def test_padding_rows_and_rows_in_any_order(device: torch.device) -> None:
    """A mixed step: prefill, decode, text only, padding row; tables indexed by state row."""
    known = groups(6, 12, device)
    spans = tables([[(2, 30, 4)], [], [(0, 16, 16), (20, 3, 0)], [(1, 1, 0)]], device)
    rows = {"span_row": ints(2, 0, 1, -1, device=device), "table_row": ints(5, 0, 3, -1, device=device)}
    seq_lens, slots = assert_same(known, spans, [10, 64, 0, 9], [40, 1, 17, 4], device, **rows)
    assert seq_lens[:, 3:].tolist() == [[0] * 4] * 2
    assert (slots[:, 58:] == PAD_SLOT).all()
    assert (slots[:, 40:58] != PAD_SLOT).all()  # a decode token and a text-only prompt


def test_persistent_span_table(device: torch.device) -> None:
    """A table with room for 4 spans a request gives what the packed one gives."""
    requests: list[Spans] = [[(2, 30, 4)], [(0, 16, 16), (20, 3, 0)]]
    packed, room = tables(requests, device), 4
    persistent = SpanTables(*(torch.full((8,), 999, dtype=torch.int32, device=device) for _ in range(3)),
                            ints(0, room, device=device), ints(1, room + 2, device=device))  # fmt: skip
    for request, spans in enumerate(requests):
        for index, span in enumerate(spans):
            columns = persistent.start, persistent.length, persistent.retained
            for column, value in zip(columns, span, strict=True):
                column[request * room + index] = value
    known = groups(2, 12, device)
    expected = run(deep_slots, known, packed, [0, 3], [50, 30], device)
    actual = run(deep_slots, known, persistent, [0, 3], [50, 30], device)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_slots_past_the_table_are_padding(device: torch.device) -> None:
    known = groups(1, 2, device)  # 32 slots in group 0, 64 in group 1
    _, slots = assert_same(known, tables([[]], device), [0], [40], device)
    assert (slots[0, 32:] == PAD_SLOT).all()
    assert (slots[1, :40] != PAD_SLOT).all()


def test_slots_past_2_to_the_31(device: torch.device) -> None:
    table = ints(2**28, 2**30, device=device)[None]
    known = DeepGroups([table], [16], [False])
    seq_lens, slots = assert_same(known, tables([[]], device), [0], [20], device)
    assert slots[0, 3].item() == 2**32 + 3
    assert slots[0, 19].item() == 2**34 + 3
    assert int(seq_lens[0, 0]) == 20


def test_outputs_are_written_in_place(device: torch.device) -> None:
    """The buffers' addresses never change: a captured graph replays over them."""
    known, spans = groups(2, 12, device), tables([[(2, 30, 4)], []], device)
    seq_lens = torch.zeros(2, 2, dtype=torch.int32, device=device)
    slots = torch.zeros(2, 8, dtype=torch.int64, device=device)
    addresses = seq_lens.data_ptr(), slots.data_ptr()
    for computed in (40, 41):
        step = ints(computed, computed, device=device), cumulative((1, 1), device)
        deep_slots(known, spans, *step, seq_lens, slots)
        assert seq_lens[0].tolist() == [slot_index(computed + 1, [(2, 30, 4)]), computed + 1]
    assert (seq_lens.data_ptr(), slots.data_ptr()) == addresses


def test_refusals(device: torch.device) -> None:
    known, spans = groups(2, 4, device), tables([[], []], device)
    step = ints(0, 0, 0, device=device), cumulative((1, 1, 1), device)
    out = torch.zeros(2, 3, device=device).int(), torch.zeros(2, 9, device=device).long()
    with pytest.raises(ValueError, match="without span_row, the table needs 3 requests and has 2"):
        deep_slots(known, spans, *step, *out)
    with pytest.raises(ValueError, match="seq_lens has 1 columns for 3 requests"):
        deep_slots(known, spans, *step, out[0][:, :1], out[1])
    with pytest.raises(TypeError, match="slot_mapping is int32, expected int64"):
        deep_slots(known, spans, *step, out[0], out[1].int())
    with pytest.raises(ValueError, match="differ"):
        DeepGroups(known.tables, [16], [True, True])
