"""One engine start: ask a job's questions and write down what was answered.

    echo '["job.json", "result.json", "progress"]' | python -m metok_vllm.calibrate.worker

It runs in a process of its own, so that a GPU's memory is free again when it ends. vLLM is imported before
the job is read, which takes no memory of a GPU.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from metok_vllm.calibrate.jobs import Asked, Counts, Facts, Job, Result, StockAnswer, Told, Variant
from metok_vllm.calibrate.measure import sample
from metok_vllm.contract.forced import TOP, ids_to_compare, read, told

BATCH = 64
"""Requests handed to the engine at a time; METok keeps 256 reports."""


def run(job: Job, told: Callable[[int], None]) -> Result:
    """Start the engine and ask everything; `told` hears how many requests are done."""
    import vllm

    import metok_vllm
    from metok_vllm.plugin import register

    began = time.monotonic()
    register()
    llm = vllm.LLM(job.model, **{**_ENGINE, **job.engine}, **metok_vllm.enable(**job.server))
    try:
        session = _Session(llm, job, told)
        asked = session.with_answers()
        found = {variant.name: session.force(asked, variant) for variant in job.variants}
        stock = [one.stock for one in asked if one.stock is not None]
        return Result(facts=_facts(llm), stock=stock, told=found, seconds=time.monotonic() - began)
    finally:
        llm.llm_engine.engine_core.shutdown()


_ENGINE: dict[str, Any] = {
    "enforce_eager": True,
    "enable_trace_replay": True,
    "allowed_local_media_path": "/",  # files that the user has named on this command line
    "disable_log_stats": True,
    "enable_prefix_caching": False,  # every variant is computed in full
}


def _facts(llm: Any) -> Facts:
    import vllm

    from metok_vllm.models.registry import family_of
    from metok_vllm.worker.report import model_shape

    config = llm.llm_engine.vllm_config.model_config
    family = family_of(config.architectures)
    assert family is not None
    return Facts(
        layers=config.hf_text_config.num_hidden_layers,
        strides=family.strides,
        first_layer=max(1, family.levels(config.hf_config)),
        shape=vars(model_shape(config)),
        frame_group=int(getattr(config.hf_config.vision_config, "temporal_patch_size", 1)),
        element_bytes=config.dtype.itemsize,
        vllm=vllm.__version__,
    )


class _Session:
    """The engine at work on one job."""

    def __init__(self, llm: Any, job: Job, told: Callable[[int], None]) -> None:
        self._llm, self._job, self._told = llm, job, told
        self._done = 0

    def with_answers(self) -> list[Asked]:
        """The questions, each with the stock model's answer."""
        from vllm import SamplingParams

        fresh = [i for i, one in enumerate(self._job.asked) if one.stock is None]
        params = SamplingParams(temperature=0, max_tokens=self._job.answer_tokens, logprobs=TOP)
        answers = {}
        for batch in _batches(fresh):
            outputs = self._chat(batch, [params] * len(batch), Variant(name="stock"))
            for index, output in zip(batch, outputs, strict=True):
                said = output.outputs[0]
                steps = [{token: entry.logprob for token, entry in step.items()} for step in said.logprobs]
                answers[index] = StockAnswer(tokens=list(said.token_ids), steps=steps, text=said.text)
        return [
            one.model_copy(update={"stock": answers[i]}) if i in answers else one
            for i, one in enumerate(self._job.asked)
        ]

    def force(self, asked: Sequence[Asked], variant: Variant) -> list[Told]:
        """The stock model's answers, as the variant sees them."""
        indices = list(range(len(asked))) if variant.of is None else variant.of
        found = []
        for batch in _batches(indices):
            answers = [asked[i].stock for i in batch]
            params = [told(answer.tokens, ids=ids_to_compare(answer.steps)) for answer in answers if answer is not None]
            for index, answer, output in zip(batch, answers, self._chat(batch, params, variant), strict=True):
                assert answer is not None
                said = output.outputs[0]
                if list(said.token_ids) != answer.tokens:
                    raise RuntimeError("the engine did not follow the answer that it was told")
                seen = sample(answer.tokens, answer.steps, *read(said.logprobs))
                found.append(
                    Told(
                        index=index,
                        kl=seen.kl,
                        harm=seen.harm,
                        agrees=seen.agrees,
                        prompt_tokens=len(output.prompt_token_ids),
                        counts=self._counts(output.request_id) if isinstance(variant.metok, dict) else None,
                    )
                )
        return found

    def _chat(self, batch: Sequence[int], params: Sequence[Any], variant: Variant) -> list[Any]:
        stated = variant.metok if variant.metok == "off" else {**variant.metok, "report": True}
        messages = [message(self._job.asked[i], variant.with_video) for i in batch]
        kwargs = {"metok": stated} if variant.with_video else None
        outputs: list[Any] = self._llm.chat(messages, list(params), use_tqdm=False, mm_processor_kwargs=kwargs)
        self._done += len(batch)
        self._told(self._done)
        return outputs

    def _counts(self, request_id: str) -> Counts:
        from metok_vllm.contract.request_ids import key

        found = next(
            one for one in self._llm.collective_rpc("metok_report", args=(key(request_id),)) if one is not None
        )
        return Counts(
            **found["visual_tokens"],
            text=found["text_tokens"],
            frames=sum(video["frames"] for video in found["videos"]),
            flops=found["prefill_flops"]["metok"],
            flops_stock=found["prefill_flops"]["stock"],
            kv_bytes=found["kv_bytes"]["metok"],
            kv_bytes_stock=found["kv_bytes"]["stock"],
        )


def message(asked: Asked, with_video: bool) -> Any:
    """One question as the messages of `vllm.LLM.chat`."""
    video = {"type": "video_url", "video_url": {"url": Path(asked.video).resolve().as_uri()}}
    text = {"type": "text", "text": asked.question}
    return [{"role": "user", "content": [video, text] if with_video else [text]}]


def _batches(indices: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), BATCH):
        yield list(indices[start : start + BATCH])


def main() -> int:
    """Read the job, do it, write the result; the result is there whole or not at all. No job: end."""
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", "metok")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    vllm.LLM  # noqa: B018  # its module is imported when it is asked for
    gc.freeze()  # vLLM collects garbage several times while it starts, and would look through all of that
    stated = sys.stdin.read()
    if not stated:
        return 0
    job_file, result_file, progress_file = map(Path, json.loads(stated))
    job = Job.model_validate_json(job_file.read_bytes())

    def told(done: int) -> None:
        progress_file.write_text(str(done))

    result = run(job, told)
    unfinished = result_file.with_suffix(".part")
    unfinished.write_text(result.model_dump_json())
    unfinished.replace(result_file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
