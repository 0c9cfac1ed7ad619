"""For ranks that are processes of their own: what they import, and a plugin of vLLM's that does there what
`in_float32`, `quick` and the engine tests' `conftest.py` do in the tests' process.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack

import vllm.v1.worker.cpu_worker
import vllm.v1.worker.gpu.model_runner
from vllm.model_executor.models import qwen3_vl

import metok_vllm.worker.model_state
from tests.support.gated_delta import in_float32
from tests.support.interpreter import quick

__all__ = ["metok_vllm", "register", "vllm"]

_FOR_GOOD = ExitStack()


def register() -> None:
    """Called by vLLM in every process, maybe more than once."""
    gc.freeze()  # as in `harness.py`
    if qwen3_vl.triton_pos_embed_interpolate is not qwen3_vl.pos_embed_interpolate_native:
        qwen3_vl.triton_pos_embed_interpolate = qwen3_vl.pos_embed_interpolate_native
        _FOR_GOOD.enter_context(in_float32())
        _FOR_GOOD.enter_context(quick())
