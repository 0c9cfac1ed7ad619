"""Every kernel variant of a model, compiled before the server says that it is ready.

Triton compiles at a kernel's first launch, for seconds, in the engine's only thread. So each operation of
stage 1 and of a pruned step runs once at start, through the functions that serve requests, on a few rows with
the types, widths, heads and strides of the model. Nothing of a request can ask for another variant: what
depends on one is not compiled in (`metok_kernels/specialisation.py`; `engine/test_variants.py`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.compression.ratios import MICRO
from metok_vllm.compression.tiers import TierQuota
from metok_vllm.contract.kv_spec import EVERY_TOKEN
from metok_vllm.log import metok_logger
from metok_vllm.worker import ops

if TYPE_CHECKING:
    from metok_kernels.specialisation import Key

logger = metok_logger(__name__)

ROWS = 4
"""Tokens, keys, frames of the warm-up. Any number does."""


@dataclass(frozen=True)
class ModelShapes:
    """What the operations see of a model on this rank."""

    hidden: int  # width of the hidden state
    heads: int  # 0: stage 1 runs alone, and no operation sees the attention
    kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of the hidden state, the features, queries and keys
    style: PoolStyle
    extra_channels: int = 0  # of the vision features, behind as many as the hidden state has
    axes: int = 1  # of rotary positions
    deep_layers: tuple[Any, ...] = ()  # attention layers whose KV METok writes, their caches bound

    @classmethod
    def of(cls, model: Any) -> ModelShapes:
        """Of a `MetokModel` that is loaded, and whose KV cache is allocated."""
        stack = model.decoder_stack
        attention = stack.attention(stack.scoring_layers[0])
        layers = [stack.attention(index) for index in range(len(stack.layers))]
        return cls(
            hidden=stack.decoder.norm.weight.shape[0],
            heads=attention.num_heads,
            kv_heads=attention.num_kv_heads,
            head_dim=attention.head_size,
            dtype=stack.decoder.norm.weight.dtype,
            style=model.pool_style,
            extra_channels=model.extra_channels,
            axes=model.rotary_axes,
            deep_layers=tuple(layer for layer in layers if layer.metok.kind != EVERY_TOKEN),
        )

    @classmethod
    def of_stage_1(cls, model: Any, hidden: int, dtype: torch.dtype) -> ModelShapes:
        """Of a `MetokModel` in a server of stage 1 alone; a rank of a pipeline may have no layers' ends."""
        return cls(hidden, 0, 0, 0, dtype, model.pool_style, model.extra_channels)


@dataclass(frozen=True)
class WarmUp:
    """What was compiled before the first request."""

    seconds: float
    variants: frozenset[Key]  # of METok's own kernels


def warm_up(shapes: ModelShapes, device: torch.device) -> WarmUp:
    """Run every operation that stage 1 and, where there are any, pruned steps launch for this model, once.

    On a CPU with plain torch operations there is nothing to compile, and nothing runs. Allocates some hundred
    kilobytes, and gives them back.

    Raises:
        ValueError: rows of the model do not start at multiples of 16 bytes, so where a request's tokens stand
            would decide which variant runs.
    """
    if not ops.uses_triton(device):
        return WarmUp(0.0, frozenset())
    from metok_kernels.launch import recorded_launches

    _check_alignment(shapes)
    start = perf_counter()
    with recorded_launches() as variants, torch.inference_mode():
        _stage_1(shapes, device)
        if shapes.heads:
            _choices(shapes, device)
            _slots(device)
        if device.type == "cuda":
            if shapes.heads:
                _attention(shapes, device)
                _kv_writes(shapes, device)
            torch.cuda.synchronize(device)
    done = WarmUp(perf_counter() - start, frozenset(variants))
    logger.info("METok: %d kernel variants are ready, after %.1f seconds", len(done.variants), done.seconds)
    return done


def _check_alignment(shapes: ModelShapes) -> None:
    if shapes.hidden % 16 or shapes.head_dim * shapes.dtype.itemsize % 16:
        raise ValueError(
            "METok's kernels take a hidden size that is a multiple of 16 and heads of a multiple of 16 bytes; this "
            f"model has {shapes.hidden} and {shapes.head_dim} x {shapes.dtype.itemsize}."
        )


def _stage_1(shapes: ModelShapes, device: torch.device) -> None:
    """Similarities and pooling of a video. The grid and the strides are values, not constants."""
    width = shapes.hidden + shapes.extra_channels
    features = torch.zeros(ROWS, 2, 2, width, dtype=shapes.dtype, device=device)
    ops.event_similarity(features[..., : shapes.hidden].flatten(1, 2))
    zeros = torch.zeros(ROWS, dtype=torch.int64, device=device)
    has_separator = shapes.style.separators != "none"
    separator = torch.zeros(width, dtype=shapes.dtype, device=device) if has_separator else None
    ops.pool_video(features, zeros, (2, 4, 8), TierQuota(1, ROWS, 0, 0), shapes.style, separator, zeros)


def _projected(shapes: ModelShapes, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Queries [ROWS, heads, d]; and keys [ROWS, KV heads, d] in both layouts that a step has.

    They are parts of a wider row where rotation works in place, and rows of their own where it does not or
    where the prompt was deferred. Both are the same variant, unless one of the rows is no multiple of 16.
    """
    query, count = shapes.heads * shapes.head_dim, shapes.kv_heads * shapes.head_dim
    together = torch.zeros(ROWS, query + 2 * count, dtype=shapes.dtype, device=device)
    part = together[:, query : query + count]
    keys = tuple(key.view(ROWS, shapes.kv_heads, shapes.head_dim) for key in (part, part.contiguous()))
    return together[:, :query].contiguous().view(ROWS, shapes.heads, shapes.head_dim), keys


def _choices(shapes: ModelShapes, device: torch.device) -> None:
    """Scores, what smooths them, the choice by them, and the rows that go on: at all pruning layers alike."""
    query, keys = _projected(shapes, device)
    positions = torch.arange(ROWS, device=device)
    for key in keys:
        ops.scores(query[1:], key, positions[:2], positions[1:], positions, 1.0)
    one = torch.ones(ROWS, dtype=torch.int64, device=device)
    ops.smooth(torch.zeros(ROWS, device=device), one.cumsum(0) - 1, ROWS, MICRO)
    index = ops.select(torch.zeros(ROWS, device=device), one, one, ROWS)
    hidden = torch.zeros(ROWS, shapes.hidden, dtype=shapes.dtype, device=device)
    rotary = positions if shapes.axes == 1 else positions.repeat(shapes.axes, 1)
    ops.gather(index, hidden, hidden.clone(), rotary)


def _attention(shapes: ModelShapes, device: torch.device) -> None:
    """A prompt's dense attention, which is vLLM's: some of its kernels are compiled at first use."""
    query, keys = _projected(shapes, device)
    lengths = [ROWS - 1, 1]
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device)
    starts[1:] += ROWS - 2
    for layer, key, value in itertools.product(shapes.deep_layers[:1], keys, keys):
        out = torch.empty_like(query)
        ops.causal_attention(query, key, value, lengths, starts, ROWS - 1, 1.0, out, layer.dense)


def _kv_writes(shapes: ModelShapes, device: torch.device) -> None:
    """The backend's cache update: vLLM's, and compiled in some backends. Its slots begin anywhere in a longer
    list. Slot -1 is nobody's, so nothing is written.
    """
    _, keys = _projected(shapes, device)
    slots = torch.full((ROWS + 1,), -1, dtype=torch.int64, device=device)
    for layer, key, value in itertools.product(shapes.deep_layers, keys, keys):
        for of_rows in (slots[:ROWS], slots[1:]):
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, of_rows)


def _slots(device: torch.device) -> None:
    """Slots of a decode step and of a pruned one."""
    from metok_kernels.deep_slots import DeepGroups, deep_slots, slots_at

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    # Types as vLLM 0.32 has them: `idx_mapping`, positions and slots are int64, all else is int32.
    groups = DeepGroups([zeros(ROWS, 2), zeros(ROWS, 3)], [16, 32], [0, 1])
    shift, state_row = zeros(2, ROWS), zeros(ROWS, dtype=torch.int64)
    starts, slots = torch.arange(ROWS + 1, dtype=torch.int32, device=device), zeros(2, ROWS, dtype=torch.int64)
    deep_slots(groups, shift, state_row, zeros(ROWS), starts, zeros(2, ROWS), slots)
    slots_at(groups, shift, state_row, zeros(ROWS, dtype=torch.int64), zeros(3, ROWS))
