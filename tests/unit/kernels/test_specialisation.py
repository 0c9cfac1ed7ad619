"""The key of a launch is what Triton itself would compile by, and no live value is in it.

Every operation is launched here at odd sizes, offsets and row strides; all its launches must share a key.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from metok_kernels.deep_slots import DeepGroups
from metok_kernels.deep_slots.launch import prepare as slots
from metok_kernels.deep_slots.launch import prepare_slots_at as slots_at
from metok_kernels.event_similarity.launch import prepare as similarity
from metok_kernels.gather_rows.launch import prepare as gather
from metok_kernels.launch import Launch, recorded_launches
from metok_kernels.select_per_event import select_per_event
from metok_kernels.select_per_event.launch import prepare as select
from metok_kernels.smooth_by_frame.launch import prepare as smooth
from metok_kernels.specialisation import POINTERS, Argument, Key, key_of, specialised, unspecialised
from metok_kernels.text_to_visual_scores.launch import prepare as scores
from metok_kernels.tiered_pool import pooled_grid
from metok_kernels.tiered_pool.launch import prepare as pool
from metok_kernels.variants import variants
from triton.backends.compiler import BaseBackend

from tests.support.kernels.common import few_examples, ints

pytestmark = pytest.mark.no_gpu

STORAGE = torch.zeros(64)
VALUES: tuple[Argument, ...] = (
    STORAGE, STORAGE[1:], STORAGE[4:], STORAGE.to(torch.bfloat16)[3:], torch.zeros(9, dtype=torch.int64)[1:],
    0, 1, 2, 15, 16, 17, 48, -16, -1, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 0.0, 1.0, 0.5, None,
)  # fmt: skip


@pytest.mark.parametrize("by_alignment", [False, True])
@pytest.mark.parametrize("by_value", [False, True])
def test_the_rules_are_tritons_own(by_value: bool, by_alignment: bool) -> None:
    """Against the function that Triton's launcher calls for each argument."""
    jit = inspect.getmodule(triton.runtime.jit.JITFunction)
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip(f"Triton {triton.__version__} names its own function differently")
    for value in VALUES:
        theirs = jit.native_specialize_impl(BaseBackend, value, False, by_value, by_alignment)
        assert specialised(value, by_value=by_value, by_alignment=by_alignment) == theirs, value


def test_pointer_names_are_tritons() -> None:
    for dtype, name in POINTERS.items():
        mangled = triton.runtime.jit.mangle_type(torch.zeros(1, dtype=dtype))
        assert mangled == name, dtype


def test_a_key_tells_apart_what_triton_compiles_apart() -> None:
    """Each rule by itself, on a kernel that has arguments of every kind."""

    @triton.jit(do_not_specialize=["n", "p_free"], do_not_specialize_on_alignment=["p_any"])
    def some_kernel(p, p_any, p_free, n, stride, BLOCK):  # type: ignore[no-untyped-def]
        pass

    assert unspecialised(some_kernel) == ({"n", "p_free"}, {"p_any"})

    def key(warps: int = 4, block: int = 16, **changes: Argument) -> Key:
        args: dict[str, Argument] = {"p": STORAGE, "p_any": STORAGE, "p_free": STORAGE, "n": 5, "stride": 32, **changes}
        return key_of(some_kernel, args, {"BLOCK": block}, warps, 2)

    assert key() == key(p=STORAGE[8:]) == key(p_any=STORAGE[1:]) == key(p_free=STORAGE[1:])
    assert key() == key(n=1) == key(n=16) == key(stride=48)
    others = [
        key(p=STORAGE[1:]), key(p=STORAGE.half()), key(p_any=None), key(p_any=STORAGE.half()), key(stride=33),
        key(stride=1), key(stride=2**31), key(n=2**31), key(block=32), key(warps=8),
    ]  # fmt: skip
    assert len({key(), *others}) == 1 + len(others)


def test_every_unspecialised_name_is_an_argument() -> None:
    """A misspelt name in a decorator would be ignored by Triton."""
    seen = 0
    for launch in {launch.kernel.__name__: launch for launch in (v.launch for v in variants())}.values():
        for names in unspecialised(launch.kernel):
            assert names <= set(launch.args), launch.kernel.__name__
            seen += len(names)
    assert seen > 30


def test_launches_are_recorded_once_they_are_made(device: torch.device) -> None:
    arguments = torch.rand(9, device=device), ints(9, device=device), ints(3, device=device)
    with recorded_launches() as seen:
        select_per_event(*arguments, 3)
        with recorded_launches() as inner:
            select_per_event(*arguments, 2)
    select_per_event(*arguments, 1)
    assert seen == inner == {select(*arguments, 3)[0].key}


# --- no live value ---

HIDDEN, HEADS, KV_HEADS, DIM = 48, 6, 2, 16

sizes = st.integers(1, 70)
offsets = st.integers(0, 9)


def launched(*made: Any) -> Iterator[Launch]:
    """The launches in what the launchers' `prepare` return, those of an empty grid left out."""
    for result in made:
        items = result if isinstance(result, tuple) else (result,)
        for item in items:
            for launch in item if isinstance(item, tuple) else (item,):
                if isinstance(launch, Launch) and 0 not in launch.grid:
                    yield launch


def numbers(size: int, offset: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A slice that begins anywhere in its storage, as positions and choices do."""
    return torch.zeros(size + offset, dtype=dtype)[offset:]


def rows(size: int, offset: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows from `offset` on."""
    return torch.zeros(size + offset, *shape, dtype=dtype)[offset:]


def stage_1(n: int, m: int, offset: int, dtype: torch.dtype) -> Iterator[Launch]:
    height, width = n % 17 + 1, m % 17 + 1
    frames = rows(n, offset, height, width, HIDDEN, dtype=dtype)
    yield from launched(similarity(frames.flatten(1, 2)))
    for mode in ("average", "bilinear"):
        for stride in (1, 2, 8):
            pooled = pooled_grid(height, width, stride)
            yield from launched(
                pool(
                    frames, numbers(n, offset), numbers(n, offset + 1), mode=mode, total=n * pooled[0] * pooled[1],  # type: ignore[arg-type]
                    min_stride=stride, separator=rows(HIDDEN, offset, dtype=dtype), separator_offset=numbers(m, offset),
                )
            )  # fmt: skip


def scoring(n: int, m: int, offset: int, dtype: torch.dtype) -> Iterator[Launch]:
    count = n if offset < 5 else 40 * n  # in one split of the keys, or in several
    keys = rows(count, offset, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)[:, HEADS * DIM :][:, : KV_HEADS * DIM]
    q = rows(m, offset + 1, HEADS, DIM, dtype=dtype)
    for packed in (keys, keys.contiguous()):
        yield from launched(
            scores(q, packed.view(count, KV_HEADS, DIM), numbers(m, offset), numbers(n, offset + 1), scale=0.25)
        )


def choosing(n: int, m: int, offset: int, dtype: torch.dtype) -> Iterator[Launch]:
    values = rows(n, offset, dtype=torch.float32)
    yield from launched(select(values, numbers(m, offset), numbers(m, offset + 1), n))
    yield from launched(smooth(values, numbers(m + 1, offset), 1.0 if offset == 1 else 0.3))


def gathering(n: int, m: int, offset: int, dtype: torch.dtype) -> Iterator[Launch]:
    hidden, residual = (rows(n, offset, HIDDEN, dtype=dtype) for _ in range(2))
    for positions in (numbers(n, offset), torch.zeros(3, n + offset, dtype=torch.int64)[:, offset:]):
        yield from launched(gather(numbers(m, offset + 1), hidden, residual, positions))


def slotting(n: int, m: int, offset: int, dtype: torch.dtype) -> Iterator[Launch]:
    narrow, batch = torch.int32, min(n, m)
    tables = [torch.zeros(n, width, dtype=narrow) for width in (m, m + offset)]
    groups = DeepGroups(tables, [16, m], [0, 1], [offset, offset + 1])
    shift = torch.zeros(2, n + offset, dtype=narrow)[:, offset:]
    state = numbers(batch, offset, narrow)
    lengths = numbers(n, offset + 1, narrow), numbers(n + 1, offset, narrow)
    outputs = torch.zeros(2, n + offset, dtype=narrow), torch.zeros(offset + 2, m + offset, dtype=torch.int64)
    yield from launched(slots(groups, shift, state, *lengths, *(out[:, offset:] for out in outputs)))
    tokens = torch.zeros(3, n + offset, dtype=narrow)[:, offset:]
    yield from launched(slots_at(groups, shift, state, numbers(m, offset), tokens))


Launches = Callable[[int, int, int, torch.dtype], Iterator[Launch]]


def fixed(key: Key) -> tuple[Any, ...]:
    """What of a key hangs on the model alone: kernel, constants, types of tensors."""
    types = tuple((name, kind) for name, (kind, _) in key.arguments if kind.startswith("*"))
    return key.kernel, key.constants, types, key.num_warps, key.num_stages


@pytest.mark.parametrize("launches", [stage_1, scoring, choosing, gathering, slotting])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(few_examples, max_examples=60)
@given(n=sizes, m=sizes, offset=offsets)
def test_no_live_value_makes_a_variant(launches: Launches, dtype: torch.dtype, n: int, m: int, offset: int) -> None:
    """Token counts, grids, batches, strides, starts of slices: odd ones launch what round ones do."""
    round_ones = {launch.key for launch in launches(64, 32, 0, dtype)}
    keys = round_ones | {launch.key for launch in launches(n, m, offset, dtype)}
    assert len(keys) == len({fixed(key) for key in keys}) == len(round_ones)
