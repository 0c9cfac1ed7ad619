"""With METok off a server answers as one of stock vLLM does, on the same checkpoint: prompts, tokens and
log-probabilities. One engine after the other, in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.gated_delta import in_float32
from tests.support.harness import Case, Engine, engine, stock_engine
from tests.support.oracle.internvl_chat import load_internvl_chat
from tests.support.oracle.internvl_samples import load_internvl
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.qwen_samples import load_qwen
from tests.support.oracle.samples import Sample, load_sample, picture, scene_video

ATOL = 1e-4
LIMITS = {
    "max_num_batched_tokens": 272,
    "max_num_seqs": 8,
    "max_model_len": 768,
    "num_gpu_blocks_override": 128,
}


@dataclass(frozen=True)
class Family:
    """A model, and what its servers are started with."""

    load: Callable[[Path], Sample]
    side: int  # pixels of a frame
    settings: dict[str, Any] = field(default_factory=dict)  # METok's
    options: dict[str, Any] = field(default_factory=dict)  # stock vLLM's, too
    stated: tuple[dict[str, Any], ...] = ()  # what its requests may state of a video


ONE = {"stages": 1}
SIZE = {"size": {"shortest_edge": 28 * 28, "longest_edge": 4 * 28 * 28}}
QWEN = ({"fps": 1.0}, {"num_frames": 4}, SIZE)
# What vLLM launches at every step for prefix caching takes Triton's interpreter half a second.
HYBRID = {"enable_prefix_caching": False}
FAMILIES = {
    "llava-onevision": Family(lambda folder: load_sample(folder, seed=5, layers=4), 84),
    "qwen2-vl": Family(lambda folder: load_qwen(folder, "qwen2-vl", seed=5, layers=4), 112, stated=QWEN),
    "qwen2.5-vl": Family(lambda folder: load_qwen(folder, "qwen2.5-vl", seed=5, layers=4), 112, stated=QWEN),
    "qwen3-vl": Family(lambda folder: load_qwen3(folder, "qwen3-vl", seed=5), 96, stated=QWEN),
    "qwen3-vl-moe": Family(lambda folder: load_qwen3(folder, "qwen3-vl-moe", seed=5), 96, stated=QWEN),
    "qwen3.5": Family(lambda folder: load_qwen3_5(folder, "qwen3.5", seed=5, layers=4), 96, ONE, HYBRID),
    "qwen3.5-moe": Family(lambda folder: load_qwen3_5(folder, "qwen3.5-moe", seed=5, layers=4), 96, ONE, HYBRID),
    "internvl": Family(lambda folder: load_internvl(folder, seed=5), 84),
    "internvl-chat": Family(lambda folder: load_internvl_chat(folder, seed=5), 84, options={"trust_remote_code": True}),
}


def cases(side: int, stated: Sequence[dict[str, Any]]) -> list[Case]:
    """All at once; videos of one length, since stock vLLM encodes no two of LLaVA's of different lengths."""
    asked = [
        Case((scene_video(1, 9, side=side),), max_tokens=6),
        Case((), "What is in the picture?", images=(picture(2, 90, 120),), max_tokens=6),
        Case((), "Say something without a video.", max_tokens=6),
        Case((scene_video(3, 9, side=side),), images=(picture(4, 60, 60),), between="\nand then\n", max_tokens=6),
    ]
    return asked + [replace(asked[0], kwargs=kwargs) for kwargs in stated]


def whose(running: Engine) -> set[str]:
    """The packages of what serves."""
    core = running.core
    return {type(one).__module__.split(".")[0] for one in (core.scheduler, running.runner.model, *running.managers)}


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_stock(family: str, tmp_path: Path) -> None:
    about = FAMILIES[family]
    sample, asked = about.load(tmp_path), cases(about.side, about.stated)
    off = [replace(case, metok="off") for case in asked]
    with ExitStack() as stack:
        if "qwen3.5" in family:
            stack.enter_context(in_float32())
        with stock_engine(sample, **LIMITS, **about.options) as stock:
            assert whose(stock) == {"vllm"}
            expected = stock.run(asked)
        with engine(sample, about.settings, **LIMITS, **about.options) as running:
            assert "metok_vllm" in whose(running)
            found = running.run(off)
            running.check_drained()
    if about.stated:  # the last states the size
        assert len(expected[-1].prompt_ids) < len(expected[0].prompt_ids)
    for case, ours, theirs in zip(off, found, expected, strict=True):
        assert ours.prompt_ids == theirs.prompt_ids, case
        assert ours.tokens == theirs.tokens, case
        for mine, stocks in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine == pytest.approx(stocks, abs=ATOL), case
