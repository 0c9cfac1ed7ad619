"""A prompt that is turned away keeps its place in the queue: in that step nobody behind it starts.

What differs: a waiting request that gets no token ends the queue for this step in vLLM 0.32 (a `break` in
`Scheduler.schedule`, vllm/v1/core/sched/scheduler.py:1219). vLLM 0.33 steps over it and goes on with the
next (`skip_request`, same file, lines 1394 to 1398). What a turned-away prompt waits for, be it room to be
deferred, room in the encoder cache or two tokens of the step, then goes to whoever comes later, and so on for
ever. vLLM 0.33 means its own few cases; the rules of `chunking.py` make many more.

Here the order is 0.32's with both. Ordinary requests that vLLM itself turns away are treated as vLLM does.

It can go when no accepted vLLM steps over a waiting request: `tests/unit/test_vllm_versions.py` looks at the
vLLM at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class QueueOrderScheduler(AsyncScheduler):
    """vLLM's async scheduler, in which nobody overtakes a prompt that `turn_away` was called for."""

    _turned_away = False  # whether it was, in the step being scheduled

    def turn_away(self, request: Request) -> None:
        """A waiting request gets no token in this step; those behind it wait as well.

        Not for a request that is about to end with an error: nobody need wait for that one.
        """
        if request.request_id not in self.encoder_cache_mismatch_reqs:
            self._turned_away = True

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._turned_away = False
        return super().schedule(throttle_prefills)

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM asks this of every waiting request in turn: whether it may be scheduled in this step.

        A look at each costs less than a microsecond, and is less than what vLLM 0.33 does with the same
        requests: it looks each of them up in the prefix cache.
        """
        return not self._turned_away and super()._handle_blocked_waiting_request(request)
