"""Methods that METok adds to vLLM's worker, for `collective_rpc`; chosen through `worker_extension_cls`."""

from __future__ import annotations

from typing import Any


class MetokWorkerExtension:
    """Read-only questions to the worker about the requests that METok pruned."""

    model_runner: Any

    def metok_report(self, request_id: str) -> dict[str, Any] | None:
        """The report of a request that asked for one, by the id that the client saw; None where there is none."""
        return self.model_runner.model_state.reports.find(request_id)  # type: ignore[no-any-return]

    def metok_state(self) -> dict[str, int]:
        """What METok holds on this worker: requests, and bytes of deferred prompts."""
        pruned = self.model_runner.model_state.pruned
        return {"requests": len(pruned.by_id), "deferred_bytes": pruned.deferred_bytes}
