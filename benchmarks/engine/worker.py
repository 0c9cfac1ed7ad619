"""One variant, measured in a process of its own:
`python -m benchmarks.engine.worker JOB.json`, started by `cli.py`.

The engine core runs inside this process (no HTTP, no other process), so that the scheduler's block tables and
the model's parts can be looked at, and so that no transport is measured.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.models import spread_weights
from benchmarks.engine.timing import Spans, attach, attach_step
from benchmarks.engine.workload import prompt_ids, times, video

WARM_UP = 2
"""Requests before what is reported as warm; the very first one after the start is reported apart."""


@dataclass
class Timeline:
    """When one request was submitted and when each of its tokens came, in seconds."""

    submitted: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.submitted

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


class Bench:
    """A running engine and the prepared requests."""

    def __init__(self, job: dict[str, Any]) -> None:
        options = dict(job["engine"])
        began = time.perf_counter()

        import torch
        from vllm import LLM

        self.job = job
        self.cuda = torch.cuda.is_available()
        if job["metok"] is not None:
            from metok_vllm import enable
            from metok_vllm.plugin import register

            register()  # works where the package is on the path but not installed
            options |= enable(**job["metok"])
        options |= job["pruning"]
        self.llm = LLM(job["model"], **options)
        client: Any = self.llm.llm_engine.engine_core  # the one that holds the core itself, in this process
        self.core: Any = client.engine_core
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        if job["dummy"]:
            spread_weights(self.runner.model)
        self.start_s = time.perf_counter() - began
        self.peak_running = 0
        self._number = 0
        self._unanswered = 0  # requests without a first token
        self._prepare(prompt_ids(Path(job["model"]), job["text_tokens"], job["turn"]))

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    def _prepare(self, ids: list[int]) -> None:
        """Process every distinct video once; what that takes is measured here and is in no TTFT."""
        from vllm.inputs import TokensPrompt

        self.prepared: list[Any] = []
        self.processing: list[float] = []
        for seed in range(self.job["videos"]):
            frames: Any = video(seed, self.job["frames"], *self.job["frame_size"])
            if self.job["whole_frames"] is not None:
                frames = frames, times(self.job["frames"], self.job["whole_frames"])
            prompt = TokensPrompt(prompt_token_ids=ids, multi_modal_data={"video": frames})
            began = time.perf_counter()
            self.prepared.append(self.llm._preprocess_cmpl_one(prompt))
            self.processing.append(time.perf_counter() - began)
            if seed == 0 and self.job["metok"] is not None:
                prompt["mm_processor_kwargs"] = {"metok": {"report": True}}
                self.with_report: Any = self.llm._preprocess_cmpl_one(prompt)

    def submit(self, prepared: Any, max_tokens: int) -> tuple[str, str]:
        """Queue a request; returns its id for the client and the one inside the engine."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        # A hash of its own, or vLLM would find the tower's output for the same video in its caches.
        fresh: Any = {**prepared, "mm_hashes": {"video": [f"benchmark-{self.job['name']}-{self._number}"]}}
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        name = f"r{self._number}"
        self._unanswered += 1
        return name, str(self.llm.llm_engine.add_request(name, fresh, params))

    def step(self, timelines: dict[str, Timeline]) -> int:
        """One engine step; notes the tokens' times. Returns how many requests finished."""
        outputs: list[Any] = [*self.llm.llm_engine.step()]  # of completions: nothing here is pooled
        now = time.perf_counter()
        finished = 0
        for output in outputs:
            new = sum(len(completion.token_ids) for completion in output.outputs)
            tokens = timelines[output.request_id].tokens
            self._unanswered -= new > 0 and not tokens
            tokens += [now] * new
            finished += output.finished
        self.peak_running = max(self.peak_running, len(self.scheduler.running))
        return finished

    def serve(self, concurrency: int, count: int, max_tokens: int) -> dict[str, Any]:
        """`count` requests, `concurrency` of them at any time until the last ones are under way."""
        timelines: dict[str, Timeline] = {}
        decode_steps = []
        self.peak_running = done = 0
        began, busy = time.perf_counter(), time.process_time()
        while done < count:
            while len(timelines) - done < concurrency and len(timelines) < count:
                submitted = time.perf_counter()
                name, _ = self.submit(self.prepared[len(timelines) % len(self.prepared)], max_tokens)
                timelines[name] = Timeline(submitted)
            # No request is in prefill, and all that there may be are decoding.
            decoding = self._unanswered == 0 and len(timelines) - done == concurrency
            step_began = time.perf_counter()
            done += self.step(timelines)
            if decoding:
                decode_steps.append(time.perf_counter() - step_began)
        wall = time.perf_counter() - began
        return {
            "concurrency": concurrency,
            "requests": count,
            "wall_s": wall,
            "requests_per_s": count / wall,
            "cpu_s_per_request": (time.process_time() - busy) / count,
            "ttft_s": [timeline.ttft for timeline in timelines.values()],
            "token_gaps_s": [gap for timeline in timelines.values() for gap in timeline.gaps],
            "decode_steps_s": decode_steps,
            "most_running": self.peak_running,
        }

    def one(self, prepared: Any, max_tokens: int) -> tuple[Timeline, str]:
        """One request alone, to its end; returns its times and its id inside the engine."""
        submitted = time.perf_counter()
        name, internal = self.submit(prepared, max_tokens)
        timelines = {name: Timeline(submitted)}
        while not self.step(timelines):
            pass
        return timelines[name], internal

    def tokens(self) -> dict[str, Any]:
        """Tokens of one request, as they stand in the engine's prompt, or as METok reports them.

        Text that labels frames inside a video counts as text.
        """
        prompt = self.prepared[0]["prompt_token_ids"]
        if self.job["metok"] is None:
            visual = sum(token == self.job["video_token"] for token in prompt)
            counts = {"prompt_tokens": len(prompt), "text_tokens": len(prompt) - visual}
            return {**counts, "visual_tokens": {"stock": self.job["stock_tokens"], "encoded": visual}}
        from metok_vllm.contract.request_ids import client_id, key

        _, internal = self.one(self.with_report, 2)
        report = self.runner.model_state.reports.find(key(client_id(internal)))
        keys = ("text_tokens", "prune_layers", "visual_tokens", "kv_bytes", "prefill_flops")
        return {"prompt_tokens": len(prompt), **{key: report[key] for key in keys}}

    def kv(self, max_tokens: int) -> dict[str, Any]:
        """What a request holds at its largest,
        from the blocks that one more was really given, and what fits.

        Looked at in a request of its own: looking takes longer with more groups, and would be in their times.
        """
        config = self.scheduler.kv_cache_config
        pool = self.scheduler.kv_cache_manager.block_pool
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        name, internal = self.submit(self.prepared[0], max_tokens)
        timelines = {name: Timeline(time.perf_counter())}
        each = [0] * len(managers)
        while not self.step(timelines):
            held = [len(manager.req_to_blocks.get(internal, ())) for manager in managers]
            each = [max(pair) for pair in zip(each, held, strict=True)]
        return {
            "groups": [
                {
                    "layers": len(group.layer_names),
                    "kind": type(group.kv_cache_spec).__name__,
                    "block_size": manager.block_size,
                    "blocks_of_a_request": blocks,
                }
                for group, manager, blocks in zip(config.kv_cache_groups, managers, each, strict=True)
            ],
            **capacity(config, pool.num_gpu_blocks, sum(each)),
        }

    def breakdown(self, repeats: int, max_tokens: int) -> dict[str, Any]:
        """Milliseconds by part, of a request alone: of the steps that compute its prompt,
        and of each decode step after them.
        """
        import torch

        from metok_vllm.compression.selection import prune_layers

        spans = Spans(torch.cuda.synchronize if self.cuda else lambda: None)
        first = prune_layers(self.job["layers"])[0]
        compiled = not self.llm.llm_engine.vllm_config.model_config.enforce_eager
        attach(spans, self.runner.model, first, compiled=compiled)
        attach_step(spans, self.scheduler, self.runner)
        prefill, decode = [], []
        for repeat in range(WARM_UP + repeats):
            of_prompt, of_answer = Counter[str](), Counter[str]()
            spans.take()
            spans.enter("outside_model")
            name, internal = self.submit(self.prepared[repeat % len(self.prepared)], max_tokens)
            timelines = {name: Timeline(time.perf_counter())}
            finished = 0
            while not finished:
                # By what a step computes, not by what it returns: vLLM starts the first decode step before it
                # hands out the first token.
                request = self.scheduler.requests[internal]
                target = of_prompt if request.num_computed_tokens < request.num_prompt_tokens else of_answer
                finished = self.step(timelines)
                spans.leave()
                target.update(spans.take())
                spans.enter("outside_model")
            spans.leave()
            if repeat >= WARM_UP:
                prefill.append(dict(of_prompt))
                decode.append({part: value / (max_tokens - 1) for part, value in of_answer.items()})
        return {"first_prune_layer": first, "compiled": compiled, "prefill_ms": prefill, "decode_step_ms": decode}


def capacity(config: Any, blocks: int, of_a_request: int) -> dict[str, float]:
    """What fits in a KV cache, for requests of so many blocks; `config` is vLLM's `KVCacheConfig`.

    A block has a page in each layer of one group, whichever group takes it. Every `KVCacheTensor` states the
    size of the one allocation that all of them are placed in, so sizes must not be added up.
    """
    usable = blocks - 1  # one is vLLM's null block
    block_bytes = max(tensor.size for tensor in config.kv_cache_tensors) / config.num_blocks
    return {
        "blocks": usable,
        "block_bytes": block_bytes,
        "blocks_of_a_request": of_a_request,
        "bytes_of_a_request": of_a_request * block_bytes,
        "requests_that_fit": usable // of_a_request,
        "requests_per_gib": 2**30 / (of_a_request * block_bytes),
    }


def peak_memory(cuda: bool) -> dict[str, float]:
    """MiB at the most since the engine's start; the KV cache and the weights are part of it."""
    if not cuda:
        return {"process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    import torch

    peak = {"allocated_mib": torch.cuda.max_memory_allocated(), "reserved_mib": torch.cuda.max_memory_reserved()}
    return {name: value / 2**20 for name, value in peak.items()}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that the job asks for, as plain data with raw figures; `report.py` sums them up."""
    bench = Bench(job)
    result: dict[str, Any] = {"start_s": bench.start_s, "processing_s": bench.processing}
    if "counts" in job["parts"]:
        result |= {"tokens": bench.tokens(), "kv": bench.kv(job["max_tokens"])}
    if "serve" in job["parts"]:
        first, _ = bench.one(bench.prepared[0], job["max_tokens"])
        result["first_request"] = {"ttft_s": first.ttft, "token_gaps_s": first.gaps}
        bench.serve(WARM_UP, 2 * WARM_UP, job["max_tokens"])
        result["tokens"] = bench.tokens()
        if bench.cuda:
            import torch

            idle = torch.cuda.memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
        result["levels"] = []
        for concurrency in job["concurrency"]:
            count = max(job["requests"], 2 * concurrency)
            result["levels"].append(bench.serve(concurrency, count, job["max_tokens"]))
        result["memory"] = peak_memory(bench.cuda)
        if bench.cuda:
            result["memory"]["above_idle_mib"] = result["memory"]["allocated_mib"] - idle
        result["kv"] = bench.kv(job["max_tokens"])
    if "breakdown" in job["parts"]:
        result["breakdown"] = bench.breakdown(job["repeats"], job["max_tokens"])
    bench.llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    JOB = json.loads(Path(sys.argv[1]).read_text())
    Path(JOB["out"]).write_text(json.dumps(measure(JOB)))
