"""vLLM's async scheduler, with what pruned requests need: their slot counts,
chunk borders, and a bound on deferral.

vLLM takes it through `scheduler_cls`. It overrides methods of vllm/v1/core/sched/scheduler.py, one of
them in `queue_order.py`. `schedule`, `add_request` and `_free_blocks` keep the tables;
`_try_schedule_encoder_inputs` is where vLLM itself lets multimodal items shorten a chunk, and where the rules
of `chunking.py` are kept. `__call__` answers the HTTP server (`scheduler/counters.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.outputs import RequestError
from vllm.v1.core.sched.interface import PauseState

from metok_vllm.contract.admission import asks_for_prompt_logprobs
from metok_vllm.contract.beside import put_together
from metok_vllm.contract.budgets import bytes_per_token, deferral_limit, ending_limit
from metok_vllm.contract.extents import most_positions, taken, too_far
from metok_vllm.contract.refusals import NO_SESSIONS, no_prompt_logprobs
from metok_vllm.contract.request_ids import is_shadow, shown
from metok_vllm.contract.spans import UnusableItem, pruned_spans
from metok_vllm.log import metok_logger
from metok_vllm.scheduler.answers import KeptAnswers
from metok_vllm.scheduler.chunking import DeferralBudget, EncoderSchedule, EndingLimit, longest_chunk
from metok_vllm.scheduler.counters import SchedulerCounters
from metok_vllm.scheduler.kv_manager import DeepKVManager
from metok_vllm.scheduler.queue_order import QueueOrderScheduler
from metok_vllm.scheduler.slot_counts import SlotCounts

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from metok_vllm.contract.refusals import Reason
    from metok_vllm.contract.spans import VideoSpan

logger = metok_logger(__name__)


class MetokScheduler(QueueOrderScheduler):
    """Schedules pruned requests beside all others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot_counts: dict[str, SlotCounts] = {}  # the pruned requests, queued and running
        managers = self.kv_cache_manager.coordinator.single_type_managers
        shifted = [manager for manager in managers if isinstance(manager, DeepKVManager)]
        for manager in shifted:
            manager.slot_counts = self.slot_counts
        self._releasing = [manager for manager in shifted if manager.releases]
        model_config = self.vllm_config.model_config
        self._vocabulary = int(model_config.get_vocab_size())
        self.deferral = DeferralBudget(bytes_per_token(model_config), deferral_limit(model_config))
        self.ending = EndingLimit(ending_limit(self.vllm_config))
        self._counters = SchedulerCounters()
        self._answers = KeptAnswers()
        self._refusals: dict[str, tuple[Reason, str]] = {}  # of requests that wait to be ended, why

    def __call__(self, answer: str | None = None) -> dict[str, Any] | None:
        """Figures for the HTTP server: totals since the start, and what is held right now.

        With the name of an answer: that answer, once (`KeptAnswers.take`).
        """
        if answer is not None:
            return self._answers.take(answer)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        paused = self.pause_state != PauseState.UNPAUSED
        others = sum(not is_shadow(name, one.sampling_params) for name, one in self.requests.items())
        return self._counters.snapshot(managers, self.deferral, self.slot_counts, others, paused)

    # --- requests come and go ---

    def add_request(self, request: Request) -> None:
        """Take a request, and note why it has to be refused where it has to.

        Nothing that a request holds makes this raise: that would end the engine.
        """
        put_together(request)
        try:
            spans = pruned_spans(request.mm_features, request.num_prompt_tokens, vocabulary=self._vocabulary)
        except UnusableItem as error:
            self._refusals[request.request_id] = ("features", str(error))
            spans = ()
        if refusal := self._refusal(request, spans):
            self._refusals[request.request_id] = refusal
        elif spans:
            self.slot_counts[request.request_id] = SlotCounts(request.num_prompt_tokens, spans)
        if spans or request.request_id in self._refusals:
            # The deep layers of a pruned prompt run once, over all of it: a prefix hit would leave the cached
            # part out.
            request.skip_reading_prefix_cache = True
        super().add_request(request)

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self._answers.ended(request)
        self.slot_counts.pop(request.request_id, None)
        self._refusals.pop(request.request_id, None)
        self.deferral.forget(request.request_id)
        self.ending.forget(request.request_id)

    # --- one step ---

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.deferral.offered.clear()
        self.ending.ending.clear()
        if self._releasing:
            self._release_complete()
        output = super().schedule(throttle_prefills)
        self._counters.admitted(output.scheduled_new_reqs, self.requests, self.slot_counts)
        self.deferral.settle(
            {
                request_id: counts.prompt_len
                for request_id, counts in self.slot_counts.items()
                if 0 < self.requests[request_id].num_computed_tokens < counts.prompt_len
            }
        )
        return output

    def _release_complete(self) -> None:
        """Take from the prompts that the step before has completed the blocks of their visual tokens, in the
        layers below L1 that decoding does not need them in.

        That step may not have run yet. The device runs steps in their order, so whoever gets the blocks now
        writes them after that step has read them, and has moved the text out of them.
        """
        for request_id, counts in self.slot_counts.items():
            if self.requests[request_id].num_computed_tokens == counts.prompt_len:
                for manager in self._releasing:
                    manager.release(request_id)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        if request.request_id in self._refusals:
            self._end_refused(request)  # and nobody need wait for it (`turn_away`)
            return EncoderSchedule.nothing(encoder_compute_budget)
        counts = self.slot_counts.get(request.request_id)
        if counts is None or num_computed_tokens >= counts.prompt_len:
            return super()._try_schedule_encoder_inputs(
                request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
            )
        schedule = self._schedule_chunk(
            request,
            counts.prompt_len,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        if not schedule.num_tokens and not num_computed_tokens:
            # It stays in the queue, and must not hold what a look-up took for it from the encoder cache.
            self.encoder_cache_manager.free(request)
            self.turn_away(request)
        end = num_computed_tokens + schedule.num_tokens
        if schedule.num_tokens and end < counts.prompt_len:
            self.deferral.offer(request.request_id, counts.prompt_len)
        elif schedule.num_tokens and num_computed_tokens:
            self.ending.ending[request.request_id] = counts.prompt_len
        return schedule

    def _schedule_chunk(
        self, request: Request, prompt_len: int, computed: int, wanted: int, encoder_budget: int, shift: int
    ) -> EncoderSchedule:
        """The next chunk of a pruned prompt by the four rules of `chunking.py`,
        and what the encoder does for it.
        """
        request_id = request.request_id
        item_starts = {feature.mm_position.offset for feature in request.mm_features}
        nothing = EncoderSchedule.nothing(encoder_budget)
        chunk = longest_chunk(computed, wanted, prompt_len, item_starts)  # rules 1 and 2
        # Rule 4: deferred prompts that end in one step.
        if computed and computed + chunk == prompt_len and not self.ending.admits(request_id, prompt_len):
            return nothing
        while chunk:
            # Rule 3: memory of deferred prompts.
            if computed + chunk < prompt_len and not self.deferral.admits(request_id, prompt_len):
                return nothing
            schedule = EncoderSchedule(
                *super()._try_schedule_encoder_inputs(request, computed, chunk, encoder_budget, shift)
            )
            if schedule.num_tokens == chunk:
                return schedule
            # The encoder's budget has shortened the chunk: ask again for one of that length that keeps the
            # rules.
            chunk = longest_chunk(computed, schedule.num_tokens, prompt_len, item_starts)
        return nothing

    # --- refusals ---

    def _refusal(self, request: Request, spans: tuple[VideoSpan, ...]) -> tuple[Reason, str] | None:
        """Why a request with videos cannot be served.

        The front end has refused most of these (`contract/admission.py`).
        """
        if spans and (request.resumable or request.request_id in self.requests):
            return "session", NO_SESSIONS
        if spans and asks_for_prompt_logprobs(request.sampling_params):
            return "prompt_logprobs", no_prompt_logprobs()
        positions = taken(request.mm_features)
        if positions and positions > (most := most_positions(self.vllm_config.model_config)):
            return "features", f"the prompt has videos {too_far(positions, most)}"
        return None

    def _end_refused(self, request: Request) -> None:
        """End a request the way vLLM ends one whose encoder input does not fit.

        vLLM 0.32 answers HTTP 500 then, or the finish reason "error"; 0.33 takes a sentence, for HTTP 400.
        """
        reason, sentence = self._refusals[request.request_id]
        ending: Any = self.grammar_compile_error_reqs
        told = isinstance(ending, dict)
        ended = ending if told else self.encoder_cache_mismatch_reqs
        if request.request_id in ended:
            return  # asked for again before the step's end
        logger.error("METok refused request %s: %s", shown(request.request_id), sentence)
        self._counters.refused[reason] += 1
        if told:
            ending[request.request_id] = RequestError("validation_error", f"METok: {sentence}")
        else:
            self.encoder_cache_mismatch_reqs.add(request.request_id)
