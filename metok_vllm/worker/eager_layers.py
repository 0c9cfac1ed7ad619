"""How a pruned step runs the decoder's layers: with fused operators, and the MLP in slices.

A pruned step runs the layers uncompiled. In vLLM's default mode they are built to be compiled: a norm is
eleven small operations, rotary embedding seventeen, and the activation would compile itself at its first
call, in live traffic. The layers' modules are therefore given other forward methods, for the length of the
step alone. The compiled path keeps its own, and with it everything that Inductor fuses there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import vllm.kernels  # noqa: F401  (registers the implementations that are looked up here)
from torch import nn
from vllm import ir
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform

from metok_vllm.log import metok_logger
from metok_vllm.worker.decoder import Decoder

logger = metok_logger(__name__)

Forward = Callable[..., Any]

NORM_KERNELS = "vllm_c"
"""The name under which vLLM registers its own kernels as implementations of a norm."""

CPU_VECTOR = 8
"""The CPU's norms take a row only in vectors of so many elements."""


class EagerLayers:
    """The forward methods that the layers' modules have inside a pruned step."""

    def __init__(self, decoder: Decoder, most_rows: int, custom_ops: Iterable[str]) -> None:
        """Choose them once, while vLLM's configuration is set.

        Args:
            decoder: the layers, their MLPs, and what follows the last of them.
            most_rows: rows that an MLP takes at once; `max_num_batched_tokens`, with which vLLM has measured
                its memory.
            custom_ops: vLLM's list of that name; an operator that is switched off there by its own name
                ("-silu_and_mul") stays as it is.

        Raises:
            TypeError: a layer has no `mlp`.
        """
        self._forwards: list[tuple[nn.Module, str, Forward]] = []
        kept, off = set[str](), set(custom_ops)
        for operator in operators_of((*decoder.layers, decoder.norm)):
            if f"-{operator.name}" in off:
                kept.add(operator.name)
            else:
                self._forwards.append((operator, "_forward_method", fused_forward(operator)))
        for index in range(len(decoder.layers)):
            mlp = decoder.mlp(index)
            self._forwards.append((mlp, "forward", partial(in_slices, mlp.forward, most_rows)))
        if kept:
            logger.info("METok: custom_ops switch off %s, in steps that prune too", ", ".join(sorted(kept)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside the ``with`` block the layers run as this class says, behind it as vLLM has built them."""
        # In the instances' own dictionaries: `nn.Module.__setattr__` would cost more than a norm's launch.
        before = [(vars(module), name, vars(module).get(name)) for module, name, _ in self._forwards]
        try:
            for module, name, forward in self._forwards:
                vars(module)[name] = forward
            yield
        finally:
            for attributes, name, previous in before:
                if previous is None:
                    del attributes[name]
                else:
                    attributes[name] = previous


def operators_of(roots: Iterable[nn.Module]) -> list[Any]:
    """vLLM's custom operators in these modules, each once: layers share their rotary embedding."""
    found = {id(m): m for root in roots for m in root.modules() if isinstance(m, CustomOp)}
    return [operator for operator in found.values() if "_forward_method" in vars(operator)]


def fused_forward(operator: CustomOp) -> Forward:
    """What an uncompiled step calls in place of `operator`'s forward: one kernel where vLLM has one."""
    by_kernel = _norm_by_kernel(operator) if type(operator) is RMSNorm else None
    if by_kernel is not None:
        return by_kernel
    # What vLLM itself takes on this platform where it does not compile.
    enforced = operator._enforce_enable
    operator._enforce_enable = True
    try:
        forward: Forward = operator.dispatch_forward(compile_native=False)
    finally:
        operator._enforce_enable = enforced
    return forward


def _norm_by_kernel(norm: RMSNorm) -> Forward | None:
    """`norm` by vLLM's own kernels, or None where they do not cover it, or where vLLM's list of
    implementations (`ir_op_priority`) begins with another kernel.

    With a residual both arguments are overwritten, as in vLLM without compilation.
    """
    operators = (ir.ops.rms_norm, ir.ops.fused_add_rms_norm)
    if not all(hasattr(torch.ops._C, op.name) and NORM_KERNELS in op.impls for op in operators):
        return None
    if any(op.get_priority()[:1] not in ([], ["native"], [NORM_KERNELS]) for op in operators):
        return None
    on_cpu = current_platform.is_cpu()
    # While a model is built the default dtype is the model's.
    covered = norm.variance_size_override is None and norm.weight.dtype == torch.get_default_dtype()
    if not covered or (on_cpu and norm.hidden_size % CPU_VECTOR):
        _warn_of(repr(norm))
        return None
    alone, added = (op.impls[NORM_KERNELS].impl_fn for op in operators)
    epsilon, pass_weight, pass_weight_add = norm.variance_epsilon, norm.pass_weight, norm.pass_weight_add

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            # The CPU's kernel takes no strides.
            return alone(x.contiguous() if on_cpu else x, norm.weight.data if pass_weight else None, epsilon)
        return added(x, residual, norm.weight.data if pass_weight_add else None, epsilon)

    return forward


@cache
def _warn_of(norm: str) -> None:
    logger.warning("METok: no kernel of vLLM takes %s; steps that prune run it by small operations", norm)


def in_slices(forward: Forward, most_rows: int, x: torch.Tensor) -> torch.Tensor:
    """`forward(x)` for a `forward` that treats each row alone.

    What it allocates between its layers is bounded by `most_rows` rows. vLLM has measured that much; a pruned
    step's deep layers may run on a whole prompt, which can be many times longer.

    Args:
        forward: of an MLP, [rows, ...] to [rows, ...].
        most_rows: rows of a slice.
        x: [rows, hidden].

    Returns:
        What `forward` returns for all rows, [rows, ...].
    """
    rows = x.shape[0]
    if rows <= most_rows:
        whole: torch.Tensor = forward(x)
        return whole
    out: torch.Tensor | None = None
    for start in range(0, rows, most_rows):
        part = forward(x[start : start + most_rows])
        if out is None:
            out = part.new_empty(rows, *part.shape[1:])
        out[start : start + most_rows] = part
        del part
    assert out is not None
    return out
