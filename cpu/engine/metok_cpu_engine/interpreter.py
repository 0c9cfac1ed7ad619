"""Two things that Triton's interpreter cannot do with vLLM's sampling kernels,
either of which would end the engine.

- Structured output: the interpreter's comparisons keep the type of their operands beside boolean data, and
  `create_splat` makes numbers of such a scalar, which a store then refuses as a mask. Spreading what is
  there, type and all, mends it.
- Top-k and top-p: vLLM's kernel calls a method of a Triton tensor on what the interpreter holds as a Python
  number. vLLM has the same operation in torch, which it takes itself where there is no Triton; it takes its
  place.

Both are done when the module concerned is imported, and only in the interpreter (`TRITON_INTERPRET=1`).
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


MENDED: dict[str, Callable[[Any], None]] = {
    "triton.runtime.interpreter": spread_scalars_as_they_are,
    "vllm.v1.sample.ops.topk_topp_triton": sample_by_torch,
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
