"""Every kernel as the engine launches it, built from tensors on `meta`: what is compiled ahead of time.

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
from typing import Literal

import torch

from metok_kernels.aot import SHARED_LIMIT, Usage, compile_launch
from metok_kernels.deep_slots.groups import DeepGroups
from metok_kernels.deep_slots.launch import prepare as prepare_slots
from metok_kernels.deep_slots.launch import prepare_slots_at
from metok_kernels.event_similarity.launch import prepare as prepare_similarity
from metok_kernels.gather_rows.launch import prepare as prepare_gather
from metok_kernels.launch import Launch
from metok_kernels.select_per_event.launch import prepare as prepare_select
from metok_kernels.smooth_by_frame.launch import prepare as prepare_smooth
from metok_kernels.specialisation import Key
from metok_kernels.text_to_visual_scores.launch import prepare as prepare_scores
from metok_kernels.tiered_pool.launch import prepare as prepare_pool
from metok_kernels.tiered_pool.reference import Mode

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

SPILL_BOUND = 64
"""Bytes a thread may spill: a few registers for an instant. Only float32 scoring spills at all."""

CHIPS = (80, 90)
"""Compute capabilities that every variant is compiled for."""


@dataclass(frozen=True)
class Variant:
    """One launch in use, and the chips it is for."""

    name: str
    launch: Launch
    capabilities: tuple[int, ...] = CHIPS


@dataclass(frozen=True)
class Model:
    """What the kernels see of a language model on one rank, and of its vision tower."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    grid: int | tuple[int, int]
    mode: Mode
    separators: Literal["event", "row", "none"] = "event"
    axes: int = 1  # of rotary positions
    levels: int = 0  # of extra channels of the tower, as many as the hidden state has each


ONEVISION_SMALL = Model("LLaVA-OneVision-0.5B", 896, 14, 2, 64, 27, "bilinear")
ONEVISION = Model("LLaVA-OneVision-7B", 3584, 28, 4, 128, 27, "bilinear")
ONEVISION_SPLIT = Model("LLaVA-OneVision-7B, tensor parallel 4", 3584, 7, 1, 128, 27, "bilinear")
LONGVA = Model("LongVA-7B", 3584, 28, 4, 128, 24, "average", "none")
VIDEO = Model("LLaVA-Video-7B", 3584, 28, 4, 128, 27, "bilinear", "row")
QWEN_SMALL = Model("Qwen2.5-VL-3B", 2048, 16, 2, 128, (20, 36), "average", "none", 3)
QWEN = Model("Qwen2.5-VL-7B", 3584, 28, 4, 128, (20, 36), "average", "none", 3)
QWEN3 = Model("Qwen3-VL-8B", 4096, 32, 8, 128, (22, 40), "average", "none", 3, 3)
INTERNVL = Model("InternVL3-8B", 3584, 28, 4, 128, 16, "average", "none")
INTERNVL_NEWER = Model("InternVL3.5-8B", 4096, 32, 8, 128, 16, "average", "none")

IN_USE = (
    (ONEVISION_SMALL, BF16),
    (ONEVISION_SMALL, FP16),
    (ONEVISION_SMALL, FP32),
    (ONEVISION, BF16),
    (ONEVISION, FP32),
    (ONEVISION_SPLIT, BF16),
    (LONGVA, BF16),
    (VIDEO, BF16),
    (QWEN_SMALL, BF16),
    (QWEN, BF16),
    (QWEN3, BF16),
    (INTERNVL, BF16),
    (INTERNVL_NEWER, BF16),
)


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(model: Model, dtype: torch.dtype) -> Iterator[Launch]:
    """All launches that the engine can make for a model in `dtype`, as `metok_vllm/worker/ops.py` and
    `slots.py` there call the operations; some share a variant.
    """
    # Stage 1.
    height, width = model.grid if isinstance(model.grid, tuple) else (model.grid, model.grid)
    wide = model.hidden * (1 + model.levels)
    frames = _meta(64, height, width, wide, dtype=dtype)
    yield from prepare_similarity(frames[..., : model.hidden].flatten(1, 2))[0]
    separator, offsets = (_meta(wide, dtype=dtype), _meta(5)) if model.separators != "none" else (None, None)
    per_frame, row_gap = (_meta(64), _meta(64)), model.separators == "row"
    yield prepare_pool(
        frames, *per_frame, mode=model.mode, total=6000, min_stride=2, row_gap=row_gap, separator=separator,
        separator_offset=offsets,
    )[0]  # fmt: skip
    # Scores: the keys stand alone or beside queries and values, as the model's projection leaves them.
    rows, count = (model.heads + 2 * model.kv_heads) * model.head_dim, model.kv_heads * model.head_dim
    q = _meta(200, model.heads, model.head_dim, dtype=dtype)
    first = model.heads * model.head_dim
    for keys in (_meta(9000, count, dtype=dtype), _meta(9000, rows, dtype=dtype)[:, first : first + count]):
        packed = keys.view(9000, model.kv_heads, model.head_dim)
        yield from prepare_scores(q, packed, _meta(200), _meta(5000), scale=0.1)[0]
    yield prepare_smooth(_meta(5000, dtype=FP32), _meta(65), 0.5)[0]
    # Choice, and the rows that go on.
    yield prepare_select(_meta(9000, dtype=FP32), _meta(5), _meta(5), 5000)[0]
    hidden = _meta(8192, model.hidden, dtype=dtype)
    positions = _meta(8192) if model.axes == 1 else _meta(model.axes, 8192)
    yield prepare_gather(_meta(4000), hidden, hidden, positions)[0]
    # Slots.
    narrow = torch.int32
    tables = [_meta(256, 2048, dtype=narrow) for _ in range(9)]
    groups = DeepGroups(tables, [16] * 9, [0] * 6 + [1] * 3, range(1, 10))
    step = groups, _meta(2, 256, dtype=narrow), _meta(200)
    lengths = _meta(208, dtype=narrow), _meta(209, dtype=narrow), _meta(2, 256, dtype=narrow)
    yield prepare_slots(*step, *lengths, _meta(10, 8192))
    yield prepare_slots_at(*step, _meta(8192), _meta(3, 4000, dtype=narrow))[0]


def variants() -> Iterator[Variant]:
    """All variants in use, each once. Needs kernels that are not interpreted only once one is compiled."""
    seen: set[Key] = set()
    for model, dtype in IN_USE:
        for launch in launches(model, dtype):
            if launch.key not in seen:
                seen.add(launch.key)
                yield Variant(f"{model.name} {dtype}", launch)


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
