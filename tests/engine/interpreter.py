"""Triton's interpreter as vLLM's grammar kernel needs it.

In Triton 3.9 the interpreter's comparisons keep the type of their operands beside boolean data, and spreading such a scalar
over a block makes numbers of it, which a store then refuses as a mask: vLLM's `_apply_grammar_bitmask_kernel` masks with
`position_idx < num_req_logits`. A compiled kernel has no such trouble. Spreading what is there, type and all, is all that
is mended here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def spread_scalars_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's `create_splat` until the test's end."""
    from triton.runtime import interpreter

    def create_splat(builder: Any, ret_ty: Any, arg: Any) -> Any:
        block = np.full(ret_ty.shape, arg.data.reshape(-1)[0], dtype=arg.data.dtype)
        return interpreter.TensorHandle(block, arg.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
