"""What the kernels' benchmark measures: each operation of `metok_kernels` at sizes in use,
beside plain torch.

A case holds one set of inputs, the operation, its float32 reference, and the same function in plain torch as
one would write it today (with lengths known on the host, which favours torch). Bytes and FLOPs are those the
operation must move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from metok_kernels import deep_slots as slots_op
from metok_kernels import event_similarity as similarity_op
from metok_kernels import gather_rows as gather_op
from metok_kernels import select_per_event as select_op
from metok_kernels import smooth_by_frame as smooth_op
from metok_kernels import text_to_visual_scores as scores_op
from metok_kernels import tiered_pool as pool_op

INT = torch.int32


@dataclass(frozen=True)
class Case:
    """One measurement."""

    op: str
    shape: str
    run: Callable[[], Any]
    """The operation; returns what is compared."""
    reference: Callable[[], Any]
    plain: Callable[[], Any]
    """The same in plain torch; what `torch.compile` is given too."""
    bytes: int
    flops: int
    tolerance: float
    """Relative tolerance of the operation against the reference; 0 means equal."""
    plain_tolerance: float = 0.0
    """The same of plain torch, where it rounds on the way."""
    compile: bool = True
    """Whether to measure torch.compile too; not where it would unroll thousands of events."""


def _ints(values: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=INT, device=device)


def similarity(frames: int, tokens: int, width: int, device: torch.device) -> Case:
    """Frame vectors and similarities of one video."""
    x = torch.randn(frames, tokens, width, dtype=torch.bfloat16, device=device)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        mean = x.mean(1, dtype=torch.float32)
        return mean, F.cosine_similarity(mean[:-1], mean[1:])

    moved = x.numel() * 2 + frames * width * 4
    return Case(
        "event_similarity", f"{frames} frames x {tokens} x {width} bf16", partial(similarity_op.event_similarity, x),
        partial(similarity_op.reference, x), plain, moved, x.numel(), 1e-3, 1e-3,
    )  # fmt: skip


def pool(frames: int, side: int, width: int, mode: Literal["average", "bilinear"], device: torch.device) -> Case:
    """Strides 2, 4 and 8 mixed as docs/method.md section 4 counts them for equal events: about 3 : 5 : 2."""
    x = torch.randn(frames, side, side, width, dtype=torch.bfloat16, device=device)
    strides = [(2, 4, 4, 8, 2, 4, 4, 2, 4, 8)[index % 10] for index in range(frames)]
    sizes = [pool_op.pooled_grid(side, side, stride) for stride in strides]
    counts = [rows * columns for rows, columns in sizes]
    starts = [sum(counts[:index]) + 1 for index in range(frames)]
    total = sum(counts) + 1
    separator = torch.randn(width, dtype=torch.bfloat16, device=device)
    options: dict[str, Any] = {"mode": mode, "total": total, "min_stride": 2, "separator": separator}
    options["separator_offset"] = _ints([0], device)
    arguments = x, _ints(strides, device), _ints(starts, device)
    members = {stride: [i for i in range(frames) if strides[i] == stride] for stride in sorted(set(strides))}
    rows = {
        stride: torch.cat([torch.arange(starts[i], starts[i] + counts[i]) for i in chosen]).to(device)
        for stride, chosen in members.items()
    }
    frame_index = {stride: torch.tensor(chosen, device=device) for stride, chosen in members.items()}

    def plain() -> torch.Tensor:
        out = x.new_empty(total, width)
        out[0] = separator
        for stride, index in frame_index.items():
            grid = x[index].permute(0, 3, 1, 2)
            size = pool_op.pooled_grid(side, side, stride)
            if mode == "bilinear":
                pooled = F.interpolate(grid, size=size, mode="bilinear")
            else:
                pooled = F.avg_pool2d(grid, stride, ceil_mode=True, count_include_pad=False)
            out[rows[stride]] = pooled.permute(0, 2, 3, 1).reshape(-1, width)
        return out

    taps = 4 * (total - 1) * width if mode == "bilinear" else x.numel()
    read = min(taps, x.numel()) * 2
    return Case(
        "tiered_pool", f"{frames} frames x {side} x {side} x {width} bf16 {mode}",
        partial(pool_op.tiered_pool, *arguments, **options), partial(pool_op.reference, *arguments, **options), plain,
        read + total * width * 2, taps, 2.0**-7, 2.0**-7,
    )  # fmt: skip


def scores(heads: tuple[int, int, int], rows: int, visual: int, text: int, device: torch.device) -> Case:
    """One request: `text` tokens, then `visual` ones, then `rows` of question."""
    query_heads, kv_heads, dim = heads
    keys_count = text + visual + rows
    q = torch.randn(rows, query_heads, dim, dtype=torch.bfloat16, device=device)
    keys = torch.randn(keys_count, kv_heads, dim, dtype=torch.bfloat16, device=device)
    row_keys = torch.arange(keys_count - rows + 1, keys_count + 1, device=device)
    arguments = q, keys, row_keys, torch.arange(text, text + visual, device=device)
    scale = dim**-0.5
    hidden = torch.arange(keys_count, device=device)[None] >= row_keys[:, None]

    def plain() -> torch.Tensor:
        grouped = q.view(rows, kv_heads, -1, dim)
        logits = torch.einsum("rhgd,khd->hgrk", grouped, keys).float() * scale
        shares: torch.Tensor = logits.masked_fill(hidden, float("-inf")).softmax(-1)[..., text : text + visual]
        return shares.mean((0, 1, 2))

    moved = (keys_count + visual) * kv_heads * dim * 2 + q.numel() * 2 + visual * 4
    return Case(
        "text_to_visual_scores", f"{rows} rows, {visual} visual, {keys_count} keys, "
        f"{query_heads}/{kv_heads} heads of {dim} bf16",
        partial(scores_op.text_to_visual_scores, *arguments, scale=scale),
        partial(scores_op.reference, *arguments, scale=scale), plain,
        moved, 2 * rows * query_heads * dim * (keys_count + visual), 2e-3, 3e-2,
    )  # fmt: skip


def select(lengths: list[int], keep: list[int], device: torch.device) -> Case:
    """The tokens kept of each event."""
    values = torch.rand(sum(lengths), device=device)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    arguments = values, torch.tensor(lengths, device=device), torch.tensor(keep, device=device), sum(keep)

    def plain() -> torch.Tensor:
        parts = [
            values[start : start + length].topk(k).indices.sort().values + start
            for start, length, k in zip(starts, lengths, keep, strict=True)
        ]
        return torch.cat(parts)

    return Case(
        "select_per_event", f"{len(lengths)} events, {sum(lengths)} tokens, {sum(keep)} kept",
        partial(select_op.select_per_event, *arguments), partial(select_op.reference, *arguments),
        plain, values.numel() * 4 + sum(keep) * 8, 0, 0.0, compile=len(lengths) < 100,
    )  # fmt: skip


def smooth(frames: int, tokens: int, device: torch.device) -> Case:
    """Scores of one video mixed with their frames' means."""
    values = torch.rand(frames * tokens, device=device)
    frame = torch.arange(frames * tokens, device=device) // tokens
    arguments = values, frame, frames, 0.5

    def plain() -> torch.Tensor:
        return 0.5 * values + 0.5 * values.view(frames, tokens).mean(1).repeat_interleave(tokens)

    return Case(
        "smooth_by_frame", f"{frames} frames x {tokens}", partial(smooth_op.smooth_by_frame, *arguments),
        partial(smooth_op.reference, *arguments), plain, values.numel() * 16, 4 * values.numel(), 1e-5, 1e-5,
    )  # fmt: skip


def gather(rows: int, out: int, width: int, device: torch.device) -> Case:
    """Hidden state, residual and M-RoPE positions of the survivors."""
    hidden, residual = (torch.randn(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    positions = torch.randint(rows, (3, rows), device=device)
    index = torch.randperm(rows, device=device)[:out].sort().values

    def plain() -> tuple[torch.Tensor, ...]:
        return hidden[index], residual[index], positions[:, index]

    return Case(
        "gather_rows", f"{out} of {rows} rows x {width} bf16, hidden, residual, 3-D positions",
        partial(gather_op.gather_rows, index, hidden, residual, positions),
        partial(gather_op.reference, index, hidden, residual, positions), plain,
        2 * (2 * out * width * 2 + 3 * out * 8) + out * 8, 0, 0.0,
    )  # fmt: skip


def slots(batch: int, query: int, groups: int, device: torch.device) -> Case:
    """One step of `batch` requests behind their prompts, each with one pruned video of 3900 tokens."""
    width, length, retained = 512, 3900, 200
    known = slots_op.DeepGroups(
        [torch.randint(10**6, (batch, width), dtype=INT, device=device) for _ in range(groups)],
        [16] * groups, [int(index * 2 >= groups) for index in range(groups)],
    )  # fmt: skip
    shift = torch.tensor([[length - retained], [length]], dtype=INT, device=device).repeat(1, batch)
    request = torch.arange(batch, dtype=INT, device=device)
    total = torch.full((batch,), 4100 + query, dtype=INT, device=device)
    query_start = torch.arange(batch + 1, dtype=INT, device=device) * query
    seq_lens = torch.zeros(2, batch, dtype=INT, device=device)
    mapping = torch.zeros(groups, batch * query, dtype=torch.int64, device=device)
    kinds = torch.tensor(known.kinds, device=device)
    tables = torch.stack(known.tables)
    row = torch.arange(batch * query, device=device) // query

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        position = total[row] - query + torch.arange(batch * query, device=device) - query_start[row]
        indices = position - shift[kinds][:, row]
        page = indices // 16
        slot = tables[:, row].gather(2, page[..., None].clamp_max(width - 1))[..., 0].long() * 16 + indices % 16
        return total - shift, torch.where(page < width, slot, -1)

    def run(operation: Callable[..., None]) -> tuple[torch.Tensor, torch.Tensor]:
        operation(known, shift, request, total, query_start, seq_lens, mapping)
        return seq_lens, mapping

    return Case(
        "deep_slots", f"{groups} groups, {batch} requests x {query} tokens", partial(run, slots_op.deep_slots),
        partial(run, slots_op.reference), plain, groups * (batch * query * 12 + batch * 16), 0, 0.0,
    )  # fmt: skip


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """All cases: sizes of LLaVA-OneVision 0.5B / 7B and LongVA 7B at 64 frames,
    or ones for the interpreter.
    """
    if small:
        yield similarity(5, 30, 60, device)
        yield pool(4, 9, 60, "bilinear", device)
        yield pool(4, 8, 60, "average", device)
        yield scores((14, 2, 64), 5, 40, 9, device)
        yield select([60, 1, 90], [40, 1, 30], device)
        yield smooth(5, 9, device)
        yield gather(63, 40, 60, device)
        yield slots(3, 1, 2, device)
        return
    yield similarity(64, 729, 3584, device)
    yield similarity(256, 729, 896, device)
    yield pool(64, 27, 3584, "bilinear", device)
    yield pool(256, 27, 896, "bilinear", device)
    yield pool(64, 24, 3584, "average", device)
    for rows in (32, 200):
        yield scores((28, 4, 128), rows, 5000, 15, device)
        yield scores((28, 4, 128), rows, 2800, 15, device)
    yield scores((14, 2, 64), 32, 5000, 15, device)
    yield select([1500, 1500, 1500, 700, 700], [1140, 1140, 1140, 266, 266], device)
    yield select([5100], [3952], device)  # a whole video
    yield select([100] * 2000, [76] * 2000, device)
    yield smooth(64, 80, device)
    yield gather(16384, 12000, 3584, device)
    yield gather(65536, 50000, 896, device)
    yield slots(256, 1, 9, device)
    yield slots(4, 4096, 9, device)
