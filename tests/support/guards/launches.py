"""What would be a kernel launch on a GPU, and what is alive meanwhile, counted on a machine without one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from metok_vllm.worker.step import PrunedStep
from tests.support.guards import addresses

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}

HIDES_KERNELS = "vllm_ir"
"""Namespace of operators whose implementation may be many kernels that no mode sees."""


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Launches(TorchDispatchMode):
    """Counts operators that compute something, by name.

    Views do not, nor do allocations, nor a `to` or a `reshape` that returns its argument. An operator of
    vLLM's own counts as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        assert namespace != HIDES_KERNELS, f"{func} hides its kernels"
        if name in ALLOCATIONS:
            return out
        held = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        results = tensors(out)
        is_view = bool(results) and all(t.untyped_storage()._cdata in held for t in results)
        if func._schema.is_mutable or not is_view:
            self.counts[f"{namespace}::{name}"] += 1
        return out


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operators inside the mode have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()  # tensors, by their storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in held or storage._cdata in self._holders:
                self._add(tensor, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: torch.Tensor, storage: int, size: int) -> None:
        self.now += size if not self._holders[storage] else 0
        self._holders[storage] += 1
        weakref.finalize(tensor, self._drop, storage, size).atexit = False

    def _drop(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.now -= size


@dataclass(frozen=True)
class DeepLayers:
    """Layers from one pruning layer to the next, in one pruned step."""

    first: int
    others: int  # rows of other requests
    launches: Mapping[str, float]  # of a layer, by operator

    @property
    def total(self) -> float:
        return sum(self.launches.values())


@contextmanager
def deep_launches() -> Iterator[list[DeepLayers]]:
    """Fills the list with what the deep layers of every pruned step launch."""
    found: list[DeepLayers] = []
    layers, check_write = PrunedStep._layers, addresses.check_write

    def counted(step: PrunedStep, start: int, end: int) -> None:
        with Launches() as mode:
            layers(step, start, end)
        launches = {name: count / (end - start) for name, count in mode.counts.items()}
        found.append(DeepLayers(start, step.batch.num_others, launches))

    def unseen(*args: Any) -> None:
        with _disable_current_modes():
            check_write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrunedStep, "_layers", counted)
        patch.setattr(addresses, "check_write", unseen)  # a guard's work is not the step's
        yield found
