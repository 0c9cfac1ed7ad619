"""Two API server processes and an engine for each, with a key, questions shown, and one hostile name."""

from __future__ import annotations

import json
import os

from tests.support.server.asking import OPTIONS

KEY = "the-operators-key"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def cores() -> list[str]:
    """The first two cores that the tests may use; two engines need two."""
    return [str(core) for core in sorted(os.sched_getaffinity(0))[:2]]


def options() -> list[str]:
    """For `vllm serve`."""
    settings = {"metok": {"decode_retention": 0.5, "status_shows_questions": True}}
    return [
        "--data-parallel-size", "2", "--api-server-count", "2", "--api-key", KEY, "--plugin", "metok",
        "--additional-config", json.dumps(settings), "--trust-request-mm-kwargs", "--max-num-batched-tokens", "256",
        "--served-model-name", "tiny", HOSTILE, *OPTIONS,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """Variables for it.

    vLLM 0.33's CPU worker gives each engine a memory node of its own, and ends with an IndexError on a
    machine of one node (vllm/utils/cpu_resource_utils.py: `get_visible_memory_node`). With "0" here both
    versions take all nodes and simulate none.
    """
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores()), "VLLM_CPU_SIM_MULTI_NUMA": "0"}
