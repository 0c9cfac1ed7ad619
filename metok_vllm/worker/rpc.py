"""Methods that METok adds to vLLM's worker, for `collective_rpc`; chosen through `worker_extension_cls`."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank

from metok_vllm.contract.kv_spec import group_kind
from metok_vllm.contract.request_ids import shown


class MetokWorkerExtension:
    """Read-only questions to the worker about the requests that METok prunes."""

    model_runner: Any

    def metok_report(self, request_key: str) -> dict[str, Any] | None:
        """The report of a request that asked for one, by the key of the id that the client saw
        (`contract/request_ids.py`); None where there is none.
        """
        return self.model_runner.model_state.reports.find(request_key)  # type: ignore[no-any-return]

    def metok_stats(self) -> dict[str, Any] | None:
        """What this worker has counted since its start, as plain numbers;
        None on all tensor-parallel ranks but the first.
        """
        if get_tensor_model_parallel_rank() != 0:
            return None
        state = self.model_runner.model_state
        return {
            **state.reports.counters.snapshot(),
            "deferred_bytes": state.pruned.deferred_bytes,
            "seconds": state.reports.times.snapshot(),
            "unmeasured": state.reports.times.unmeasured,
        }

    def metok_recent(self) -> list[dict[str, Any]] | None:
        """The latest pruned requests, latest first (`Record.status`);
        None on all tensor-parallel ranks but the first.
        """
        if get_tensor_model_parallel_rank() != 0:
            return None
        return self.model_runner.model_state.reports.recent()  # type: ignore[no-any-return]

    def metok_state(self) -> dict[str, Any]:
        """What this worker holds right now: deferred prompts,
        and the KV blocks of every request in each group.

        What a group holds is one of `contract.kv_spec.GROUP_KINDS`; its block size is in tokens.
        """
        runner = self.model_runner
        pruned = runner.model_state.pruned
        held = runner.block_tables.num_blocks.np
        groups = []
        for i, group in enumerate(runner.kv_cache_config.kv_cache_groups):
            blocks = {shown(req_id): int(held[i, index]) for req_id, index in runner.req_states.req_id_to_index.items()}
            groups.append(
                {
                    "holds": group_kind(group.kv_cache_spec),
                    "layers": len(group.layer_names),
                    "block_size": group.kv_cache_spec.block_size,
                    "blocks": blocks,
                }
            )
        return {
            "pruned_requests": len(pruned.by_id),
            "deferred_bytes": pruned.deferred_bytes,
            "groups": groups,
        }
