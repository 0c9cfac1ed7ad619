"""vLLM's async scheduler with three things METok needs: request facts for the KV managers, chunk borders, a bounded deferral.

Chosen through `scheduler_cls`. It overrides `add_request`, `_free_blocks` and `_try_schedule_encoder_inputs` of
vllm/v1/core/sched/scheduler.py; the last one is where vLLM itself lets multimodal items shorten a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from metok_vllm.engine.deferral import bytes_per_token, deferral_limit
from metok_vllm.engine.facts import RequestFacts, pruned_spans
from metok_vllm.engine.kv_cache import PrunedManager
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = metok_logger(__name__)

NO_PROMPT_LOGPROBS = (
    "prompt_logprobs do not exist for a prompt whose video is pruned, since its tokens do not reach the last layer; "
    'send the request with mm_processor_kwargs={"metok": "off"}.'
)


class MetokScheduler(AsyncScheduler):
    """Schedules pruned video requests beside all others.

    Three rules for a pruned request, until its prompt is computed:

    1. no chunk crosses the end of the prompt: what a preempted request had generated attends to the decode-time KV, as it
       did the first time, so it is computed in steps of its own;
    2. no chunk has one token: vLLM runs a one-token chunk as a decode, possibly inside a full CUDA graph, which knows
       neither scoring nor deferral;
    3. a prompt that does not fit one step is deferred, and the prompts being deferred never take more than
       `max_deferred_bytes` together.
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

    def add_request(self, request: Request) -> None:
        spans = pruned_spans(request.mm_features)
        if spans:
            self.metok_facts[request.request_id] = RequestFacts(request.num_prompt_tokens, spans)
            # The deep layers of a pruned prompt run once, densely, over all of it: a hit would leave the cached part out.
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._deferred.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.metok_facts.pop(request.request_id, None)
        self._deferred.pop(request.request_id, None)

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
            # The HTTP server has answered 400 before this; `vllm.LLM` users get the finish reason "error" and this line. A
            # request with a fault that shows only here ends the way vLLM ends one whose encoder input does not fit.
            logger.error("METok refused request %s: %s", request.request_id, NO_PROMPT_LOGPROBS)
            self.encoder_cache_mismatch_reqs.add(request.request_id)
            return [], 0, encoder_compute_budget, [], []
        schedule = super()._try_schedule_encoder_inputs
        remaining = facts.prompt_len - num_computed_tokens
        chunk = self._chunk(remaining, num_new_tokens)
        result = schedule(request, num_computed_tokens, chunk, encoder_compute_budget, shift_computed_tokens)
        # The encoder's budget may have shortened the chunk. What was to be encoded may no longer overlap it then: ask again.
        shorter = self._chunk(remaining, result[1])
        if shorter != result[1]:
            result = schedule(request, num_computed_tokens, shorter, encoder_compute_budget, shift_computed_tokens)
        scheduled = result[1]
        if scheduled == remaining:
            self._deferred.pop(request.request_id, None)
        elif scheduled > 0:
            if not self._may_defer(request.request_id, facts):
                return [], 0, encoder_compute_budget, [], []
            self._deferred[request.request_id] = facts.prompt_len * self._deferred_bytes_per_token
        return result

    @staticmethod
    def _chunk(remaining: int, wanted: int) -> int:
        """The longest chunk of at most `wanted` tokens that has not one token and does not leave one behind."""
        chunk = min(wanted, remaining)
        if remaining - chunk == 1:
            chunk -= 1
        return chunk if chunk != 1 else 0

    def _may_defer(self, request_id: str, facts: RequestFacts) -> bool:
        if request_id in self._deferred:
            return True
        held = sum(self._deferred.values())
        return held + facts.prompt_len * self._deferred_bytes_per_token <= self._deferral_limit
