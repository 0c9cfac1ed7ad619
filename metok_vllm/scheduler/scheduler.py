"""vLLM's async scheduler with three things METok needs: request facts for the KV managers, chunk borders, a bounded deferral.

Chosen through `scheduler_cls`. It overrides `schedule`, `add_request`, `_free_blocks` and `_try_schedule_encoder_inputs` of
vllm/v1/core/sched/scheduler.py; the last one is where vLLM itself lets multimodal items shorten a chunk. To be called is how it
answers the HTTP server (`metrics_scheduler.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from metok_vllm.contract.budgets import bytes_per_token, deferral_limit
from metok_vllm.log import metok_logger
from metok_vllm.scheduler.counters import SchedulerCounters
from metok_vllm.scheduler.kv_manager import PrunedManager
from metok_vllm.scheduler.slot_counts import RequestFacts, pruned_spans
from metok_vllm.worker.memory import ending_limit

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from metok_vllm.contract.refusals import Reason

logger = metok_logger(__name__)

NO_PROMPT_LOGPROBS = (
    "prompt_logprobs do not exist for a prompt whose video is pruned, since its tokens do not reach the last layer; "
    'send the request with mm_processor_kwargs={"metok": "off"}.'
)
NO_SESSIONS = "a session whose input goes on streaming cannot hold a pruned video."


class MetokScheduler(AsyncScheduler):
    """Schedules pruned video requests beside all others.

    Four rules for a pruned request, until its prompt is computed:

    1. no chunk crosses the end of the prompt: what a preempted request had generated attends to the decode-time KV, as it
       did the first time, so it is computed in steps of its own;
    2. no chunk has one token: vLLM runs a one-token chunk as a decode, possibly inside a full CUDA graph, which knows
       neither scoring nor deferral;
    3. a prompt that does not fit one step is deferred, and the prompts being deferred never take more than
       `max_deferred_bytes` together;
    4. deferred prompts that end in the same step are together no longer than one step, or one of them is alone: the layers
       from L1 up run on whole prompts, and memory is reserved for that much (`memory.py`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metok_facts: dict[str, RequestFacts] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, PrunedManager):
                manager.facts = self.metok_facts
        self._deferred_bytes_per_token = bytes_per_token(self.vllm_config.model_config)
        self._deferral_limit = deferral_limit(self.vllm_config.model_config)
        self._deferred: dict[str, int] = {}  # bytes held by each request that is being deferred
        self._pending: dict[str, int] = {}  # and by those that start to be in the step being scheduled
        self._counters = SchedulerCounters()
        self._ending_limit = ending_limit(self.vllm_config)
        self._ending: dict[str, int] = {}  # tokens of the deferred prompts that end in the step being scheduled

    def __call__(self) -> dict[str, Any]:
        """Figures for the HTTP server: totals since the start, and what is held right now."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return self._counters.snapshot(managers, self._deferred, self._deferral_limit, self.metok_facts)

    def add_request(self, request: Request) -> None:
        spans = pruned_spans(request.mm_features)
        if spans and request.request_id not in self.requests:
            self.metok_facts[request.request_id] = RequestFacts(request.num_prompt_tokens, spans)
            # The deep layers of a pruned prompt run once, densely, over all of it: a hit would leave the cached part out.
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.metok_facts.pop(request.request_id, None)
        self._deferred.pop(request.request_id, None)
        self._pending.pop(request.request_id, None)
        self._ending.pop(request.request_id, None)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        facts = self.metok_facts.get(request.request_id)
        if facts is None or num_computed_tokens >= facts.prompt_len:
            return super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
            )
        params = request.sampling_params
        if params is not None and params.prompt_logprobs is not None:
            # The HTTP server has answered 400 before this; `vllm.LLM` users get the finish reason "error" and this line.
            self._refuse(request, "prompt_logprobs", NO_PROMPT_LOGPROBS)
            return [], 0, encoder_compute_budget, [], []
        if request.resumable:
            self._refuse(request, "session", NO_SESSIONS)
            return [], 0, encoder_compute_budget, [], []
        chunk = self._chunk(facts, request, num_computed_tokens, num_new_tokens)
        if num_computed_tokens and not self._may_end(request.request_id, facts, num_computed_tokens + chunk):
            return [], 0, encoder_compute_budget, [], []
        schedule = super()._try_schedule_encoder_inputs
        result: tuple[list[int], int, int, list[int], list[int]] = ([], 0, encoder_compute_budget, [], [])
        while chunk:
            if num_computed_tokens + chunk < facts.prompt_len and not self._may_defer(request.request_id, facts):
                if num_computed_tokens == 0:
                    # It stays in the queue, and must not hold what the look-up below took for it from the encoder cache.
                    self.encoder_cache_manager.free(request)
                return [], 0, encoder_compute_budget, [], []
            result = schedule(request, num_computed_tokens, chunk, encoder_compute_budget, shift_computed_tokens)
            if result[1] == chunk:
                break
            # The encoder's budget has shortened the chunk: ask again for a chunk of that length that keeps the rules.
            chunk = self._chunk(facts, request, num_computed_tokens, result[1])
            result = ([], 0, encoder_compute_budget, [], [])
        if num_computed_tokens and num_computed_tokens + result[1] == facts.prompt_len:
            self._ending[request.request_id] = facts.prompt_len
        if 0 < result[1] < facts.prompt_len - num_computed_tokens:
            self._pending[request.request_id] = facts.prompt_len * self._deferred_bytes_per_token
        return result

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self._pending.clear()
        self._ending.clear()
        output = super().schedule(throttle_prefills)
        self._counters.admitted(output.scheduled_new_reqs, self.requests, self.metok_facts)
        # Read off what was really scheduled: a request that was offered a chunk may have found no blocks for it.
        self._deferred = {
            request_id: facts.prompt_len * self._deferred_bytes_per_token
            for request_id, facts in self.metok_facts.items()
            if 0 < self.requests[request_id].num_computed_tokens < facts.prompt_len
        }
        return output

    def _refuse(self, request: Request, reason: Reason, sentence: str) -> None:
        """End a request whose fault shows only here the way vLLM ends one whose encoder input does not fit."""
        logger.error("METok refused request %s: %s", request.request_id, sentence)
        self._counters.refused[reason] += 1
        self.encoder_cache_mismatch_reqs.add(request.request_id)

    def _may_end(self, request_id: str, facts: RequestFacts, end: int) -> bool:
        """Whether a deferred prompt whose next chunk reaches `end` may take it in this step."""
        others = sum(tokens for other, tokens in self._ending.items() if other != request_id)
        return end < facts.prompt_len or not others or others + facts.prompt_len <= self._ending_limit

    @staticmethod
    def _chunk(facts: RequestFacts, request: Request, computed: int, wanted: int) -> int:
        """The longest chunk of at most `wanted` tokens that has not one token and does not force a later one to have one.

        vLLM ends a chunk before an item that it cannot encode yet, so no chunk may end one token before an item either.
        """
        borders = {feature.mm_position.offset for feature in request.mm_features} | {facts.prompt_len}
        end = min(computed + wanted, facts.prompt_len)
        while end + 1 in borders and end > computed:
            end -= 1
        return end - computed if end - computed > 1 else 0

    def _may_defer(self, request_id: str, facts: RequestFacts) -> bool:
        """Whether the bound leaves room for this prompt beside those being deferred and those offered a chunk in this step."""
        held = {**self._deferred, **self._pending}
        if request_id in held:
            return True
        return sum(held.values()) + facts.prompt_len * self._deferred_bytes_per_token <= self._deferral_limit
