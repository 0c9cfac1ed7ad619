"""A guard under which anything that would make the host wait for a GPU raises, on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATORS = {
    "_local_scalar_dense",  # item, bool(), int(), float()
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
    "lift_fresh",  # torch.tensor([...]): a blocking copy from host memory
}

# On the CPU these read memory without any operator.
WAITING_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class HostSyncError(AssertionError):
    pass


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING_METHODS:
            raise HostSyncError(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in WAITING_OPERATORS:
            raise HostSyncError(name)
        # Indexing by a mask, and repeating without being told the result's size, count on the device first.
        masks = (torch.bool, torch.uint8)
        if name.startswith("index") and isinstance(args[1], (list, tuple)):
            if any(index is not None and index.dtype in masks for index in args[1]):
                raise HostSyncError(f"{name} by a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostSyncError(name)
        return func(*args, **kwargs)


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises HostSyncError, naming the operator, for one that waits for the device."""
    with _Methods(), _Operators():  # type: ignore[no-untyped-call]
        yield
