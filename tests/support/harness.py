"""The real engine in the test's process, driven step by step, with its scheduler and worker in sight."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import metok_vllm
from metok_vllm.contract.profile import IGNORED, NAME, read_profile
from metok_vllm.scheduler.kv_manager import DeepKVManager
from tests.support.oracle import Labels, OracleResult, OracleSettings
from tests.support.oracle import run as run_oracle
from tests.support.oracle.samples import QUESTION, Sample
from tests.support.towers import DualTower

Step = Callable[["Engine"], None]


@dataclass(frozen=True)
class Case:
    """One request: what the engine is asked and what the oracle is asked."""

    videos: tuple[NDArray[np.uint8], ...] = ()
    question: str = QUESTION
    images: tuple[Image.Image, ...] = ()
    between: str = ""
    before: str = ""  # a system turn
    metok: Any = None  # mm_processor_kwargs["metok"]
    max_tokens: int = 24
    kwargs: dict[str, Any] = field(default_factory=dict)  # the rest of mm_processor_kwargs; the oracle has none

    def settings(self, server: OracleSettings) -> OracleSettings:
        """The server's settings with this request's."""
        if self.metok == "off":
            return replace(server, off=True)
        overrides = {k: v for k, v in (self.metok or {}).items() if k not in ("query", "report")}
        if "strides" in overrides:
            overrides["strides"] = tuple(overrides["strides"])
        return replace(server, **overrides)


@dataclass
class Engine:
    """A running `vllm.LLM` with METok on a tiny checkpoint."""

    llm: Any
    sample: Sample
    server: OracleSettings
    labels: Labels = field(default_factory=Labels)  # what the model has around and beside its frames
    towers: DualTower | None = None  # that is loaded, and so aligns where a request says nothing
    groups_seen: dict[str, list[list[int]]] = field(default_factory=dict)  # request -> blocks of each group, each step
    internal: dict[str, str] = field(default_factory=dict)
    _next: int = 0

    # --- in sight ---

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def managers(self) -> list[Any]:
        return list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def prefix_unit(self) -> int:
        """Hits in the prefix cache are multiples of so many tokens: whole blocks of every group."""
        return int(self.scheduler.block_size)

    def check_drained(self) -> None:
        """Nothing of any finished request is left: blocks, slot counts, buffers, tables."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks are missing (one is the null block)"
        for manager in self.managers:
            assert not manager.req_to_blocks, "a manager still holds blocks"
        assert self.scheduler.slot_counts == {}
        assert self.scheduler.deferral.held == {}
        # The worker hears of the last finished requests with the next step; give it one.
        state = self.runner.model_state
        alive = set(state.pruned.by_id) - self.scheduler.finished_req_ids
        assert alive == set(), f"the worker still holds {alive}"
        unplaced = set(state.unplaced) - self.scheduler.finished_req_ids
        assert unplaced == set(), f"the worker still waits to place {unplaced}"
        assert sum(r.deferred_bytes for i, r in state.pruned.by_id.items() if i in alive) == 0

    # --- driving ---

    def prompt_ids(self, case: Case) -> list[int]:
        """The case's prompt, one placeholder an item."""
        ids = self.sample.prompt_ids(
            case.question, videos=len(case.videos), images=len(case.images), between=case.between
        )
        if not case.before:
            return ids
        system = f"<|im_start|>system\n{case.before}<|im_end|>\n"
        return [*self.sample.processor.tokenizer(system).input_ids, *ids]

    def read_ids(self, case: Case) -> list[int]:
        """The case's prompt as the model reads it, one placeholder an item."""
        return self.sample.as_read(self.prompt_ids(case))

    def question_at(self, case: Case) -> list[int]:
        """Where in `read_ids` the tokens of the user's turn behind its first item stand, placeholders, and
        space and the template's own tokens at both ends of what stands between them left out.
        """
        ids, tokenizer = self.read_ids(case), self.sample.processor.tokenizer
        config = self.sample.model.config
        items = [i for i, token in enumerate(ids) if token in (config.image_token_id, config.video_token_id)]
        if not items:
            return []
        end = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), items[0])
        found: list[int] = []
        for first, last in zip(items, [*items[1:], end], strict=True):
            words = [i for i in range(first + 1, last) if tokenizer.decode([ids[i]], skip_special_tokens=True).strip()]
            found += range(words[0], words[-1] + 1) if words else ()
        return found

    def add(self, case: Case, **sampling: Any) -> str:
        """Queue a request; returns its id."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        data: dict[str, Any] = {}
        if case.videos:
            data["video"] = [self.sample.as_sent(video) for video in case.videos]
        if case.images:
            data["image"] = list(case.images)
        prompt: dict[str, Any] = {"prompt_token_ids": self.prompt_ids(case)}
        if data:
            prompt["multi_modal_data"] = data
        kwargs = case.kwargs | ({} if case.metok is None else {"metok": case.metok})
        if kwargs:
            prompt["mm_processor_kwargs"] = kwargs
        params = SamplingParams(
            **{"temperature": 0, "max_tokens": case.max_tokens, "logprobs": 3, "ignore_eos": True, **sampling},
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = f"r{self._next}"
        self._next += 1
        # vLLM keeps a request under an id of its own inside the engine.
        self.internal[request_id] = self.llm.llm_engine.add_request(
            request_id, self.llm._preprocess_cmpl_one(prompt), params
        )
        return request_id

    def step(self) -> dict[str, Any]:
        """One engine step; returns outputs of the requests that it finished."""
        finished = {}
        for output in self.llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        for request_id in self.scheduler.requests:
            held = [len(manager.req_to_blocks.get(request_id, ())) for manager in self.managers]
            self.groups_seen.setdefault(request_id, []).append(held)
        return finished

    def run(self, cases: list[Case], each_step: Step | None = None) -> list[OracleResult]:
        """Answer all cases at once; in the order given."""
        ids = [self.add(case) for case in cases]
        outputs: dict[str, Any] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            outputs |= self.step()
            if each_step is not None:
                each_step(self)
        return [observed(outputs[i]) for i in ids]

    def oracle(self, case: Case, force_tokens: list[int] | None = None) -> OracleResult:
        """The oracle's answer to one case."""
        settings = case.settings(self.server)
        images = self.sample.image_inputs(list(case.images)) if case.images else None
        # The question is all that the user's turn says, so text between two videos is part of it.
        question = " ".join(f"{case.between} {case.question}".split())
        if isinstance(case.metok, dict):
            question = case.metok.get("query", question)
        aligner = None
        if self.towers is not None and isinstance(case.metok, dict | None) and "aligner" not in (case.metok or {}):
            settings = replace(settings, aligner="dual-tower")
            aligner = self.towers.of([self.sample.looked_at(video) for video in case.videos], question)
        question_at = None if isinstance(case.metok, dict) and "query" in case.metok else self.question_at(case)
        return run_oracle(
            self.sample.model,
            self.read_ids(case),
            [self.sample.pixels(video) for video in case.videos],
            images,
            self.sample.question_ids(question),
            settings,
            case.max_tokens,
            aligner=aligner,
            force_tokens=force_tokens,
            labels=self.labels,
            question_at=question_at,
        )


def observed(output: Any) -> OracleResult:
    """An engine's output in the oracle's form."""
    completion = output.outputs[0]
    return OracleResult(
        prompt_ids=list(output.prompt_token_ids),
        tokens=list(completion.token_ids),
        logprobs=[{token: entry.logprob for token, entry in row.items()} for row in completion.logprobs],
    )


@contextmanager
def engine(sample: Sample, server: dict[str, Any] | None = None, **llm_kwargs: Any) -> Iterator[Engine]:
    """Start the engine on a checkpoint with METok on; shut it down at the end."""
    server = server or {}
    of_the_engine = ("aligner_model", "max_deferred_bytes", "preset", "profile", "status_shows_questions")
    oracle_keys = {k: v for k, v in server.items() if k not in of_the_engine}
    found = Path(sample.path) / NAME
    profile = server.get("profile") or (found if found.is_file() else IGNORED)
    if profile != IGNORED:
        oracle_keys = read_profile(Path(profile)).settings | oracle_keys
    if server.get("preset") == "balanced":
        gives_way = {"decode_retention": 0.0} if "kv_layers" in oracle_keys else {}
        oracle_keys = {"decode_retention": 1.0, "quota": "video"} | gives_way | oracle_keys
    oracle_keys.setdefault("strides", sample.strides)
    oracle_keys |= {key: tuple(value) for key, value in oracle_keys.items() if isinstance(value, list)}
    with _started(sample, OracleSettings(**oracle_keys), **metok_vllm.enable(**server), **llm_kwargs) as running:
        yield running


@contextmanager
def stock_engine(sample: Sample, **llm_kwargs: Any) -> Iterator[Engine]:
    """The same without METok: nobody has asked for the plugin."""
    with _started(sample, OracleSettings(off=True), **llm_kwargs) as running:
        yield running


@contextmanager
def _started(sample: Sample, server: OracleSettings, **llm_kwargs: Any) -> Iterator[Engine]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        "block_size": 32,
        "disable_log_stats": True,
        **llm_kwargs,
    }
    # vLLM collects garbage over and over while it starts, half a second each time over all that is imported.
    # Its end lifts this.
    gc.freeze()
    llm = LLM(str(sample.path), **options)
    running = Engine(llm, sample, server)
    try:
        yield running
    finally:
        llm.llm_engine.engine_core.shutdown()
        del running.llm, llm
        cleanup_dist_env_and_memory()


def deep_managers(running: Engine) -> list[DeepKVManager]:
    """Managers of the deep layers' groups."""
    return [manager for manager in running.managers if isinstance(manager, DeepKVManager)]
