"""Finds what METok's own code reads from the device while an engine runs.

On a GPU each such read makes the host wait. On CPU nothing waits, so the reads are found by their operators
and methods, and by who calls them: the nearest frame of METok or vLLM on the stack must be METok's. What vLLM
reads is its own affair.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.guards.host_sync import WAITING_METHODS, WAITING_OPERATORS

OURS, THEIRS = ("/metok_vllm/", "/metok_kernels/"), ("/vllm/",)

METHODS = WAITING_METHODS | {
    torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__bool__, torch.Tensor.__index__
}  # fmt: skip
"""Under inference mode the last ones read without an operator that a dispatch mode sees."""

READS = WAITING_OPERATORS - {"lift_fresh"}
"""`lift_fresh` is a tensor made of host data; its copy to the device does not make the host wait."""


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


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS and (who := caller()):
            self.found[f"{who} {func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if (name in READS or _counts_first(name, args, kwargs)) and (who := caller()):
            self.found[f"{who} {name}"] += 1
        return func(*args, **kwargs)


def _counts_first(name: str, args: Any, kwargs: Any) -> bool:
    """Indexing by a mask, and repeating without being told the result's size, count on the device first."""
    if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name == "repeat_interleave" and kwargs.get("output_size") is None


@contextmanager
def reads_by_metok() -> Iterator[Counter[str]]:
    """Counts, by caller and operator, what METok's code reads inside the context."""
    found: Counter[str] = Counter()
    with _Methods(found), _Operators(found):  # type: ignore[no-untyped-call]
        yield found
