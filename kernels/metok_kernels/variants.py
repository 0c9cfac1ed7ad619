"""Every kernel in the configurations in use, built from tensors on `meta`: what is compiled ahead of time.

`python -m metok_kernels.variants` compiles all of them for sm_80 and sm_90 without a GPU, and prints one JSON
object a kernel and chip: registers, spills, shared memory and its limit, and what is wrong, if anything.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from metok_kernels.aot import SHARED_LIMIT, Usage, compile_launch
from metok_kernels.deep_slots.groups import DeepGroups
from metok_kernels.deep_slots.launch import prepare as prepare_slots
from metok_kernels.deep_slots.launch import prepare_slots_at
from metok_kernels.event_similarity.launch import prepare as prepare_similarity
from metok_kernels.gather_rows.launch import prepare as prepare_gather
from metok_kernels.launch import Launch
from metok_kernels.select_per_event.launch import prepare as prepare_select
from metok_kernels.text_to_visual_scores.keys import Keys, PackedKeys, PagedKeys
from metok_kernels.text_to_visual_scores.launch import prepare as prepare_scores
from metok_kernels.tiered_pool.launch import prepare as prepare_pool
from metok_kernels.tiered_pool.reference import Mode

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

SPILL_BOUND = 64
"""Bytes a thread may spill: a few registers for an instant. Only float32 scoring spills at all."""


@dataclass(frozen=True)
class Variant:
    """One launch in use, and the chips it is for."""

    name: str
    launch: Launch
    capabilities: tuple[int, ...] = (80, 90)


@dataclass(frozen=True)
class Model:
    """What the kernels see of a language model and its vision tower."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    grid: int
    mode: Mode


MODELS = (
    Model("LLaVA-OneVision-0.5B", 896, 14, 2, 64, 27, "bilinear"),
    Model("LLaVA-OneVision-7B", 3584, 28, 4, 128, 27, "bilinear"),
    Model("LongVA-7B", 3584, 28, 4, 128, 24, "average"),
)


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _scores(
    model: Model, dtype: torch.dtype, cache: torch.dtype | None, page: int = 16, split: int = 1
) -> tuple[Launch, ...]:
    """The three scoring launches; `page` 0 for packed keys, `split` ranks of tensor parallel."""
    heads, kv_heads, dim = model.heads // split, max(model.kv_heads // split, 1), model.head_dim
    keys: Keys
    if page:
        pages = _meta(4096, kv_heads, page, 2 * dim, dtype=cache or dtype).transpose(1, 2)[..., :dim]
        keys = PagedKeys(pages, _meta(64, 2048), _meta(2), _meta(1, dtype=FP32) if cache else None)
    else:
        keys = PackedKeys(_meta(9216, kv_heads, dim, dtype=dtype), _meta(2))
    q = _meta(8192, heads * dim, dtype=dtype).view(-1, heads, dim)
    sizes = {"max_rows": 128, "max_visual": 9216, "max_keys": 10240}
    return prepare_scores(
        q, keys, _meta(200), _meta(3), _meta(9000), _meta(3), scale=0.1, row_index=_meta(200), **sizes
    )[0]


def _score_variants() -> Iterator[Variant]:
    small, large = MODELS[:2]
    both, hopper = (80, 90), (90,)
    cases: list[tuple[str, tuple[Launch, ...], tuple[int, ...]]] = [
        (f"{small.name} {BF16} paged", _scores(small, BF16, None), both),
        (f"{small.name} {FP16} paged", _scores(small, FP16, None), both),
        (f"{small.name} {FP32} paged", _scores(small, FP32, None), both),
        (f"{large.name} {BF16} packed", _scores(large, BF16, None, page=0), both),
        (f"{large.name} {FP32} packed", _scores(large, FP32, None, page=0), both),
        (f"{large.name} {BF16} paged", _scores(large, BF16, None), both),
        (f"{large.name} {BF16} paged by 64", _scores(large, BF16, None, page=64), hopper),
        (f"{large.name} {BF16} tensor parallel 4", _scores(large, BF16, None, split=4), hopper),
        # Triton has no float8_e4m3fn before sm_89; vLLM refuses that cache there too.
        (f"{large.name} {BF16} cache {E4M3}", _scores(large, BF16, E4M3), hopper),
        (f"{large.name} {BF16} cache {E5M2}", _scores(large, BF16, E5M2), both),
        (f"{large.name} {BF16} cache {INT8}", _scores(large, BF16, INT8), both),
    ]
    for name, launches, chips in cases:
        for launch in launches:
            yield Variant(name, launch, chips)
    # As the engine calls it: fresh keys of one prompt, queries already gathered, int64 indices.
    for model in MODELS[:2]:
        q = _meta(200, model.heads, model.head_dim, dtype=BF16)
        keys = PackedKeys(_meta(9216, model.kv_heads, model.head_dim, dtype=BF16), _meta(1))
        index = _meta(9000, dtype=torch.int64)
        launches, _ = prepare_scores(
            q, keys, _meta(200), _meta(2), index, _meta(2), scale=0.1, max_rows=200, max_visual=9000, max_keys=9216
        )[:2]
        for launch in launches:
            yield Variant(f"{model.name} {BF16} one prompt", launch)


def _slot_variants() -> Iterator[Variant]:
    groups = DeepGroups([_meta(256, 2048)] * 9, [16] * 9, [0] * 6 + [1] * 3, range(1, 10))
    of_batch = groups, _meta(2, 256), _meta(200)
    out = _meta(2, 256), _meta(10, 8192, dtype=torch.int64)
    yield Variant("a step's slots", prepare_slots(*of_batch, _meta(208), _meta(209), *out))
    tokens = _meta(3, 4000)
    yield Variant("slots of any tokens", prepare_slots_at(*of_batch, _meta(8192, dtype=torch.int64), tokens)[0])


def _select_variants() -> Iterator[Variant]:
    for longest in (1, 200, 1500, 4000, 100_000):
        launch = prepare_select(_meta(10_000, dtype=FP32), _meta(6), _meta(5), max_length=longest)[0]
        yield Variant(f"events up to {longest}", launch)
    edges, keep = _meta(6, dtype=torch.int64), _meta(5, dtype=torch.int64)
    for longest in (1500, 9000):
        launch = prepare_select(_meta(9000, dtype=FP32), edges, keep, max_length=longest, capacity=5000)[0]
        yield Variant(f"one prompt of up to {longest}", launch)


def _gather_variants() -> Iterator[Variant]:
    index = _meta(4000, dtype=torch.int64)
    for model in MODELS[:2]:
        for axes in ((), (3,)):
            positions = _meta(*axes, 8192, dtype=torch.int64)
            hidden = _meta(8192, model.hidden, dtype=BF16)
            yield Variant(
                f"{model.name} {len(axes) + 1}-D positions", prepare_gather(index, hidden, hidden, positions)[0]
            )
    yield Variant("hidden alone", prepare_gather(index, _meta(8192, 896, dtype=FP32))[0])


def _pool_variants() -> Iterator[Variant]:
    for model in MODELS:
        for dtype in (BF16, FP16) if model.hidden == 896 else (BF16,):
            frames = _meta(64, model.grid, model.grid, model.hidden, dtype=dtype)
            separators = {"separator": _meta(model.hidden, dtype=dtype), "separator_offset": _meta(5)}
            for launch in (
                *prepare_similarity(frames.flatten(1, 2), _meta(3))[0],
                prepare_pool(frames, _meta(64), _meta(64), mode=model.mode, total=6000, min_stride=2, **separators)[0],
            ):
                yield Variant(f"{model.name} {dtype}", launch)
            wide = {"separator": separators["separator"], "separator_offset": _meta(5, dtype=torch.int64)}
            strides, offsets = _meta(64, dtype=torch.int64), _meta(64, dtype=torch.int64)
            launch = prepare_pool(frames, strides, offsets, mode=model.mode, total=6000, min_stride=2, **wide)[0]
            yield Variant(f"{model.name} {dtype} one video", launch)


def variants() -> Iterator[Variant]:
    """All launches in use. Needs kernels that are not interpreted only once one is compiled."""
    yield from _score_variants()
    yield from _slot_variants()
    yield from _select_variants()
    yield from _gather_variants()
    yield from _pool_variants()


def narrow_addresses(ttir: str) -> list[str]:
    """The pointer additions of a kernel whose offset has fewer than 64 bits."""
    additions = [line.strip() for line in ttir.splitlines() if "tt.addptr" in line]
    wide = re.compile(r", (i64|tensor<(\d+x)+i64>)( loc\(.*\))?$")  # the last type is the offset's
    return [line for line in additions if not wide.search(line)]


def problems(name: str, usage: Usage) -> list[str]:
    """What is wrong with a compiled kernel, one sentence each; empty if nothing is."""
    where = f"{usage.kernel} ({name}, sm_{usage.capability})"
    found = []
    if usage.spills > SPILL_BOUND:
        found.append(f"{where} spills {usage.spills} bytes a thread, more than {SPILL_BOUND}")
    if usage.shared > SHARED_LIMIT[usage.capability]:
        limit = SHARED_LIMIT[usage.capability]
        found.append(f"{where} needs {usage.shared} bytes of shared memory, the chip has {limit}")
    found += [f"{where} computes an address in 32 bits: {line}" for line in narrow_addresses(usage.ttir)]
    return found


def main() -> int:
    """Compile all variants, print one JSON object a line; 1 if any of them has a problem."""
    warnings.simplefilter("ignore")
    failed = False
    for variant in variants():
        for capability in variant.capabilities:
            usage = compile_launch(variant.launch, capability)
            report = {
                "variant": variant.name,
                "kernel": usage.kernel,
                "capability": capability,
                "registers": usage.registers,
                "spills": usage.spills,
                "shared": usage.shared,
                "shared_limit": SHARED_LIMIT[capability],
                "problems": problems(variant.name, usage),
            }
            failed |= bool(report["problems"])
            print(json.dumps(report), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
