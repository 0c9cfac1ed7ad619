"""Half precision in the engine: exact counts, nothing left behind,
and log-probabilities near those of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.coarse import check_near
from tests.support.harness import Case, engine
from tests.support.oracle.internvl_chat import load_internvl_chat
from tests.support.oracle.internvl_samples import load_internvl
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.qwen_samples import load_qwen
from tests.support.oracle.samples import Sample, load_sample, scene_video

NEAR = {"bfloat16": 0.6, "float16": 0.15}
"""Of the log-probabilities of the chosen tokens.

Wide, since a rounded score may choose another of two near equals.
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=29)
    asked = [
        Case((scene_video(1, 9),), metok={"decode_retention": 0.5}, max_tokens=4),
        Case((scene_video(2, 12), scene_video(3, 8)), metok={"decode_retention": 1}, max_tokens=4),
        Case((scene_video(2, 5),), metok="off", max_tokens=4),
    ]
    with engine(sample, dtype=dtype, max_num_batched_tokens=64, max_num_seqs=8) as running:
        check_near(running, asked, pruned=2, near=NEAR[dtype])


# How each is loaded, a frame's side in pixels, and what stock vLLM asks for.
FAMILIES: dict[str, tuple[Callable[[Path], Sample], int, dict[str, Any]]] = {
    "qwen2-vl": (lambda folder: load_qwen(folder, "qwen2-vl", seed=33), 140, {}),
    "qwen2.5-vl": (lambda folder: load_qwen(folder, "qwen2.5-vl", seed=33), 140, {}),
    "qwen3-vl": (lambda folder: load_qwen3(folder, "qwen3-vl", seed=33), 160, {}),
    "qwen3-vl-moe": (lambda folder: load_qwen3(folder, "qwen3-vl-moe", seed=33), 160, {}),
    "internvl": (lambda folder: load_internvl(folder, seed=33), 84, {}),
    "internvl-chat": (lambda folder: load_internvl_chat(folder, seed=33), 84, {"trust_remote_code": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_of_a_family(tmp_path: Path, family: str) -> None:
    load, side, options = FAMILIES[family]
    asked = [
        Case((scene_video(1, 14, side=side),), max_tokens=4),
        Case(
            (scene_video(2, 9, side=side), scene_video(3, 12, side=side)), metok={"decode_retention": 1}, max_tokens=4
        ),
        Case((scene_video(4, 11, side=side),), metok={"decode_retention": 0.5}, max_tokens=4),
        Case((scene_video(2, 5, side=side),), metok="off", max_tokens=4),
    ]
    limits: dict[str, Any] = {"max_num_batched_tokens": 272, "max_num_seqs": 8, "max_model_len": 1088}
    with engine(load(tmp_path), dtype="bfloat16", **limits, **options) as running:
        check_near(running, asked, pruned=3, near=NEAR["bfloat16"])
