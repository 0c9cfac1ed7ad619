"""What the scheduler counts, and how the HTTP server reads it.

A worker can be asked through `collective_rpc`; for the scheduler vLLM has nothing of the kind. But its client
calls a method of the engine core by name, which is how `collective_rpc` itself gets there
(`EngineCoreProc._handle_client_request` in vllm/v1/engine/core.py), and ``scheduler`` is an attribute of the
engine core. So METok's scheduler can be called, and answers with `SchedulerCounters.snapshot`. The call runs
between two steps, on the engine's own thread, and touches no worker. `tests/server/test_metrics.py` fails
once that way is gone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from metok_vllm.contract.kv_spec import PLAIN_KINDS, group_kind
from metok_vllm.contract.refusals import REFUSED_BY_SCHEDULER
from metok_vllm.contract.request_ids import is_shadow
from metok_vllm.scheduler.chunking import DeferralBudget

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request

REQUEST_KINDS = ("pruned", "other")
"""Requests with a pruned video, and all others."""


class SchedulerCounters:
    """Totals since the engine started."""

    def __init__(self) -> None:
        self.refused = dict.fromkeys(REFUSED_BY_SCHEDULER, 0)
        self.prompt_tokens = dict.fromkeys(REQUEST_KINDS, 0)
        self.cache_hit_tokens = dict.fromkeys(REQUEST_KINDS, 0)

    def admitted(self, new: Iterable[NewRequestData], requests: Mapping[str, Request], pruned: Container[str]) -> None:
        """Count the prompts that run for the first time in a step, and what the prefix cache gave them.

        Args:
            new: the step's new requests; a resumed one is among them and was counted before. METok's own
                count nowhere.
            requests: the scheduler's requests by id.
            pruned: ids of those with a pruned video.
        """
        for data in new:
            request = requests[data.req_id]
            if request.num_preemptions or is_shadow(data.req_id, data.sampling_params):
                continue
            kind = REQUEST_KINDS[0] if data.req_id in pruned else REQUEST_KINDS[1]
            self.prompt_tokens[kind] += request.num_prompt_tokens
            self.cache_hit_tokens[kind] += data.num_computed_tokens

    def snapshot(
        self,
        managers: Iterable[SingleTypeKVCacheManager],
        deferral: DeferralBudget,
        pruned: Sized,
        requests: int = 0,
        paused: bool = False,
    ) -> dict[str, Any]:
        """The totals, and what is held right now.

        Args:
            managers: one for each KV cache group.
            deferral: the prompts that are being deferred.
            pruned: the requests with a pruned video that are queued or running.
            requests: all that clients have queued or running.
            paused: whether the operator has paused the engine, or put it to sleep.
        """
        kinds = [group_kind(manager.kv_cache_spec) for manager in managers]
        shown = PLAIN_KINDS if set(kinds) <= set(PLAIN_KINDS) else kinds
        blocks: dict[str, int] = dict.fromkeys(shown, 0)
        for kind, manager in zip(kinds, managers, strict=True):
            blocks[kind] += sum(len(ids) for ids in manager.req_to_blocks.values())
        return {
            "refused": dict(self.refused),
            "prompt_tokens": dict(self.prompt_tokens),
            "cache_hit_tokens": dict(self.cache_hit_tokens),
            "pruned_requests": len(pruned),
            "requests": requests,
            "paused": int(paused),
            "blocks": blocks,
            "deferral": {
                "requests": len(deferral.held),
                "reserved": sum(deferral.held.values()),
                "limit": deferral.limit,
            },
        }
