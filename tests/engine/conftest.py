"""Engines of these tests run in the test's process, with every address checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.guards.addresses import guarded
from tests.support.interpreter import quick


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    with quick():
        yield


@pytest.fixture(scope="session", autouse=True)
def addresses() -> Iterator[None]:
    from vllm import _custom_ops as ops

    write, attend = guarded(ops.cpu_attn_reshape_and_cache, ops.cpu_attention_with_kv_cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "cpu_attn_reshape_and_cache", write)
        patch.setattr(ops, "cpu_attention_with_kv_cache", attend)
        yield


@pytest.fixture(scope="session", autouse=True)
def positions_of_patches() -> Iterator[None]:
    """Of Qwen3-VL's tower, by vLLM's own function for platforms without Triton. In Triton's interpreter the
    kernel takes milliseconds a patch, and in bfloat16 it gives what is no number. Servers under test run it.
    """
    from vllm.model_executor.models import qwen3_vl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_vl, "triton_pos_embed_interpolate", qwen3_vl.pos_embed_interpolate_native)
        yield
