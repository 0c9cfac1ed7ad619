"""What Triton's interpreter cannot do with vLLM's kernels, or takes too long for.

Two things in the sampling kernels would end the engine:

- Structured output: the interpreter's comparisons keep the type of their operands beside boolean data, and
  `create_splat` makes numbers of such a scalar, which a store then refuses as a mask. Spreading what is
  there, type and all, mends it.
- Top-k and top-p: vLLM's kernel calls a method of a Triton tensor on what the interpreter holds as a Python
  number. vLLM has the same operation in torch, which it takes itself where there is no Triton; it takes its
  place.

And these make every step slow, so torch operations do the same in well under a millisecond:

- Block tables and slots take a program a KV cache group and request, about four milliseconds each: most of a
  small model's step.
- The greedy choice takes a program for each 1024 tokens of the vocabulary, and logprobs pass through it
  twice: with the 49,152 tokens of a real model that is nine tenths of its step.

`METOK_CPU_KERNELS=triton` keeps these kernels.

All are done when the module concerned is imported, and only in the interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def spread_scalars_as_they_are(interpreter: Any) -> None:
    """Mend `create_splat` of `triton.runtime.interpreter`."""
    import numpy as np

    def create_splat(builder: Any, ret_ty: Any, arg: Any) -> Any:
        block = np.full(ret_ty.shape, arg.data.reshape(-1)[0], dtype=arg.data.dtype)
        return interpreter.TensorHandle(block, arg.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


def sample_by_torch(kernels: Any) -> None:
    """Give `vllm.v1.sample.ops.topk_topp_triton` vLLM's own torch function."""

    def apply_top_k_top_p_triton(logits: Any, k: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

        return apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    kernels.apply_top_k_top_p_triton = apply_top_k_top_p_triton


def block_tables_by_torch(block_table: Any) -> None:
    """Give `BlockTables` of `vllm.v1.worker.gpu.block_table` torch operations for its two kernels of a step.

    Both write what the kernels write, but for the entries of a block table behind a request's last block:
    nothing reads those.
    """
    import torch

    pad = block_table.PAD_SLOT_ID
    gather, compute = block_table.BlockTables.gather_block_tables, block_table.BlockTables.compute_slot_mappings

    def keeps_kernels(out: Any) -> bool:
        # Where a caller brings buffers of its own, the kernels are asked.
        return _keeps_kernels() or out is not None

    def gather_block_tables(
        tables: Any, idx_mapping: Any, num_reqs_padded: int, out: Any = None, out_ptrs: Any = None, **masking: Any
    ) -> Any:
        # vLLM 0.33 states more, by which it masks the blocks before a sliding window; 0.32 has no such thing.
        if keeps_kernels(out) or getattr(tables, "has_sliding_window_groups", False):
            return gather(tables, idx_mapping, num_reqs_padded, out, out_ptrs, **masking)
        rows = idx_mapping.to(torch.int64)
        count = rows.shape[0]
        for source, target in zip(tables.block_tables, tables.input_block_tables, strict=True):
            target[:count] = source.gpu[rows]
            target[count:num_reqs_padded] = 0
        return tuple(table[:num_reqs_padded] for table in tables.input_block_tables)

    def compute_slot_mappings(
        tables: Any, idx_mapping: Any, query_start_loc: Any, positions: Any, num_tokens_padded: int, out: Any = None
    ) -> Any:
        if keeps_kernels(out) or tables.cp_size != 1 or not all(tables._slot_mapping_enabled):
            return compute(tables, idx_mapping, query_start_loc, positions, num_tokens_padded, out)
        rows = idx_mapping.to(torch.int64)
        starts = query_start_loc[: rows.shape[0] + 1].to(torch.int64)
        row_of_token = torch.repeat_interleave(rows, starts.diff())
        tokens = row_of_token.shape[0]
        at = positions[:tokens]
        slots = tables.slot_mappings
        for i, (table, size) in enumerate(zip(tables.block_tables, tables.block_sizes, strict=True)):
            blocks = table.gpu[row_of_token.clamp(min=0), at // size].to(torch.int64)
            slots[i, :tokens] = torch.where(row_of_token < 0, pad, blocks * size + at % size)
        slots[:, tokens:] = pad
        return slots[:, :num_tokens_padded]

    block_table.BlockTables.gather_block_tables = gather_block_tables
    block_table.BlockTables.compute_slot_mappings = compute_slot_mappings


def greedy_by_torch(gumbel: Any) -> None:
    """Give `vllm.v1.worker.gpu.sample.gumbel` a greedy choice that launches nothing.

    The kernel decides where any request draws at random, or logits are kept for a draft.
    """
    import torch

    draw = gumbel.gumbel_sample

    def gumbel_sample(
        logits: Any,
        expanded_idx_mapping: Any,
        temperature: Any,
        seed: Any,
        pos: Any,
        apply_temperature: bool,
        is_drafting: bool,
        logits_cache: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        rows = expanded_idx_mapping.to(torch.int64)
        if _keeps_kernels() or logits_cache is not None or temperature[rows[rows >= 0]].any():
            stated = (seed, pos, apply_temperature, is_drafting, logits_cache, *args)
            return draw(logits, expanded_idx_mapping, temperature, *stated, **kwargs)
        return torch.from_numpy(logits.float().numpy().argmax(axis=-1))  # the first of equals, as the kernel's

    gumbel.gumbel_sample = gumbel_sample


def logprobs_by_torch(logprob: Any) -> None:
    """Give `vllm.v1.worker.gpu.sample.logprob` a softmax that launches nothing."""
    import torch

    launch = logprob.compute_token_logprobs

    def compute_token_logprobs(logits: Any, token_ids: Any) -> Any:
        if _keeps_kernels():
            return launch(logits, token_ids)
        return logits.float().log_softmax(dim=-1).gather(-1, token_ids.to(torch.int64))

    logprob.compute_token_logprobs = compute_token_logprobs


def _keeps_kernels() -> bool:
    return os.environ.get("METOK_CPU_KERNELS") == "triton"


MENDED: dict[str, Callable[[Any], None]] = {
    "triton.runtime.interpreter": spread_scalars_as_they_are,
    "vllm.v1.sample.ops.topk_topp_triton": sample_by_torch,
    "vllm.v1.worker.gpu.block_table": block_tables_by_torch,
    "vllm.v1.worker.gpu.sample.gumbel": greedy_by_torch,
    "vllm.v1.worker.gpu.sample.logprob": logprobs_by_torch,
}


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader would, then mends it."""

    def __init__(self, loader: importlib.abc.Loader, mend: Callable[[Any], None]) -> None:
        self.loader = loader
        self.mend = mend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.mend(module)

    def __getattr__(self, name: str) -> Any:
        # Readers of source and resources look for further methods of the real one.
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mend = MENDED.get(fullname)
        if mend is None or os.environ.get("TRITON_INTERPRET") != "1":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, mend)
        return spec


def install() -> None:
    """Watch for the modules' imports. Called from the `.pth` file; imports none of them itself."""
    sys.meta_path.insert(0, _Finder())
