"""What the scheduler counts, and how the HTTP server reads it.

A worker can be asked through `collective_rpc`; for the scheduler vLLM has nothing of the kind. But its client calls a method of
the engine core by name, which is how `collective_rpc` itself gets there (`EngineCoreProc._handle_client_request` in
vllm/v1/engine/core.py), and ``scheduler`` is an attribute of the engine core. So METok's scheduler can be called, and answers
with `SchedulerCounters.snapshot`. The call runs between two steps, on the engine's own thread, and touches no worker.
`tests/server/test_metrics.py` fails once that way is gone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from metok_vllm.contract.refusals import REFUSED_BY_SCHEDULER
from metok_vllm.scheduler.kv_manager import PrunedManager

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request

SCHEDULER_UTILITY = "scheduler"
"""The name by which vLLM's client reaches `MetokScheduler.__call__`."""

GROUP_KINDS = ("every token", "text and retained", "text")
"""What a KV cache group holds: layers below L1, L1 .. L3-1, from L3 up."""

REQUEST_KINDS = ("pruned", "other")


class SchedulerCounters:
    """Totals since the engine started."""

    def __init__(self) -> None:
        self.refused = dict.fromkeys(REFUSED_BY_SCHEDULER, 0)
        self.prompt_tokens = dict.fromkeys(REQUEST_KINDS, 0)
        self.cache_hit_tokens = dict.fromkeys(REQUEST_KINDS, 0)

    def admitted(self, new: Iterable[NewRequestData], requests: Mapping[str, Request], pruned: Container[str]) -> None:
        """Count the prompts that run for the first time in a step, and what the prefix cache gave them.

        Args:
            new: the step's new requests; a resumed one is among them and was counted before.
            requests: the scheduler's requests by id.
            pruned: ids of those with a pruned video.
        """
        for data in new:
            request = requests[data.req_id]
            if request.num_preemptions:
                continue
            kind = REQUEST_KINDS[0] if data.req_id in pruned else REQUEST_KINDS[1]
            self.prompt_tokens[kind] += request.num_prompt_tokens
            self.cache_hit_tokens[kind] += data.num_computed_tokens

    def snapshot(
        self, managers: Iterable[SingleTypeKVCacheManager], deferred: Mapping[str, int], limit: int, pruned: Sized
    ) -> dict[str, Any]:
        """The totals, and what is held right now.

        Args:
            managers: one for each KV cache group.
            deferred: bytes reserved for each prompt that is being deferred.
            limit: most bytes that they may take together.
            pruned: the requests with a pruned video that are queued or running.
        """
        blocks = dict.fromkeys(GROUP_KINDS, 0)
        for manager in managers:
            blocks[group_kind(manager)] += sum(len(held) for held in manager.req_to_blocks.values())
        return {
            "refused": dict(self.refused),
            "prompt_tokens": dict(self.prompt_tokens),
            "cache_hit_tokens": dict(self.cache_hit_tokens),
            "pruned_requests": len(pruned),
            "blocks": blocks,
            "deferral": {"requests": len(deferred), "reserved": sum(deferred.values()), "limit": limit},
        }


def group_kind(manager: SingleTypeKVCacheManager) -> str:
    """Which of `GROUP_KINDS` a KV cache group's manager serves."""
    if not isinstance(manager, PrunedManager):
        return GROUP_KINDS[0]
    return GROUP_KINDS[1] if manager.retains else GROUP_KINDS[2]
