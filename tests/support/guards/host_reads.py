"""Finds where METok's own code makes the host wait for the device while an engine runs:
reads of the device, and copies to it that do not come from pinned memory.

On CPU nothing waits. So reads are found by their operators and methods, and copies by where a tensor comes
from: what METok makes of host data (`torch.from_numpy`, `torch.tensor`, a factory without ``device``) is the
host's, and everything else is the device's. The two meet only in vLLM's `async_tensor_h2d`. Findings are
METok's where the nearest frame of METok or vLLM on the stack is METok's; what vLLM does is its own affair.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.guards.host_sync import WAITING_METHODS, WAITING_OPERATORS

OURS, THEIRS = ("/metok_vllm/", "/metok_kernels/"), ("/vllm/",)

METHODS = WAITING_METHODS | {
    torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__index__
}  # fmt: skip
"""Under inference mode the last ones read without an operator that a dispatch mode sees."""

FACTORIES = {
    torch.tensor, torch.as_tensor, torch.asarray, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange,
    torch.linspace, torch.eye
}  # fmt: skip
"""Without ``device`` they make a tensor on the host."""

FROM_HOST_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
"""With ``device`` they copy from pageable memory, and wait."""

ON_HOST = "_made_on_the_host"


def caller() -> str | None:
    """`file.py:function` of METok's code that is running, or None where vLLM's is."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in OURS):
            return f"{Path(path).name}:{frame.f_code.co_name}"
        if any(part in path for part in THEIRS):
            return None
        frame = frame.f_back
    return None


def _tensors(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
    return found


def _names_a_device(args: Any, kwargs: Any) -> bool:
    given = [*args[1:], *kwargs.values()]
    return any(isinstance(value, (torch.device, str)) for value in given)


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        who = caller()
        if who is None:
            return func(*args, **kwargs)
        if func in METHODS:
            self.found[f"{who} {func.__name__}"] += 1
        given = _tensors(*args, *kwargs.values())
        hosts = [tensor for tensor in given if getattr(tensor, ON_HOST, False)]
        if func is torch.Tensor.new_tensor or (
            func in FROM_HOST_DATA and kwargs.get("device") is not None and not given
        ):
            self.found[f"{who} {func.__name__} on a device"] += 1
        elif func is torch.Tensor.cuda or (func is torch.Tensor.to and hosts and _names_a_device(args, kwargs)):
            self.found[f"{who} {func.__name__} from pageable memory"] += 1
        elif len(hosts) < len(given) and any(tensor.dim() for tensor in hosts):
            self.found[f"{who} {func.__name__} of host and device"] += 1
        result = func(*args, **kwargs)
        if (func in FACTORIES and kwargs.get("device") is None and not given) or (given and len(hosts) == len(given)):
            for tensor in _tensors(result):
                setattr(tensor, ON_HOST, True)
        return result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        # `lift_fresh` is a tensor made of host data; where that goes to a device, the other mode sees it.
        reads = name in WAITING_OPERATORS and name != "lift_fresh"
        if (reads or _counts_first(name, args, kwargs)) and (who := caller()):
            self.found[f"{who} {name}"] += 1
        return func(*args, **kwargs)


def _counts_first(name: str, args: Any, kwargs: Any) -> bool:
    """Indexing by a mask, and repeating without being told the result's size, count on the device first."""
    if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


@contextmanager
def waits_of_metok() -> Iterator[Counter[str]]:
    """Counts, by caller and operation, where METok's code would wait for the device inside the context."""
    found: Counter[str] = Counter()
    from_numpy = torch.from_numpy

    def marked(array: Any) -> torch.Tensor:
        tensor = from_numpy(array)
        if caller():
            setattr(tensor, ON_HOST, True)
        return tensor

    with patch("torch.from_numpy", marked), _Methods(found), _Operators(found):  # type: ignore[no-untyped-call]
        yield found
