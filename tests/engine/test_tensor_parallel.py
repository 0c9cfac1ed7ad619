"""Two tensor-parallel ranks give the answers of one: the scores are averaged over the heads of both.

So do two halves of the layers (pipeline parallel), where stage 1 alone runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.internvl_chat import load_internvl_chat
from tests.support.oracle.internvl_samples import load_internvl
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.qwen_samples import load_qwen
from tests.support.oracle.samples import QUESTION, Sample, load_sample, scene_video
from tests.support.server.live import beside

# The ranks are processes of their own, and vLLM's multiprocessing starts them from the main module. One
# process for all families, one after the other, and ranks that another one has imported vLLM for: to import
# it costs more than an engine's work here.
SCRIPT = """
import gc, json, multiprocessing, sys
import metok_vllm, numpy as np
from vllm import LLM, SamplingParams
from vllm.v1.executor import multiproc_executor

multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(["tests.support.rank"])

def answers(job):
    gc.freeze()
    llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=2048, block_size=32,
              max_num_batched_tokens=128, **job["options"], **metok_vllm.enable(**job["settings"]))
    videos, known = np.load(job["videos"]), job["known"]
    sent = [(videos[name], known[name]) if known else videos[name] for name in job["asked"]]
    prompts = [{"prompt_token_ids": job["ids"], "multi_modal_data": {"video": [video]}} for video in sent]
    params = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=True)
    rows = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        done = output.outputs[0]
        rows.append([list(output.prompt_token_ids), list(done.token_ids),
                     [{t: e.logprob for t, e in row.items()} for row in done.logprobs]])
    llm.llm_engine.engine_core.shutdown()
    return rows

if __name__ == "__main__":
    for name, job in json.load(open(sys.argv[1])).items():
        print("RESULT" + json.dumps([name, answers(job)]), flush=True)
"""

TENSORS, LAYERS = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
BY_DATA = {**TENSORS, "mm_encoder_tp_mode": "data"}
"""The ranks share the work of one video's tower out by blocks of its frames."""


@dataclass(frozen=True)
class Family:
    """A model over two ranks, and METok's settings."""

    load: Callable[[Path], Sample]
    options: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=lambda: {"decode_retention": 0.5})
    asked: str = "b"  # of `VIDEOS`, at once


# What vLLM launches at every step for prefix caching takes Triton's interpreter half a second.
HYBRID = {"enable_prefix_caching": False}
DEEPSTACK = {"decode_retention": 0.5, "prune_layers": [3, 5, 7]}  # L1 as early as three levels allow
FAMILIES = {
    "qwen2-vl": Family(lambda folder: load_qwen(folder, "qwen2-vl", seed=21), TENSORS),
    "qwen2.5-vl, tower by data": Family(lambda folder: load_qwen(folder, "qwen2.5-vl", seed=21), BY_DATA, asked="ab"),
    "internvl": Family(lambda folder: load_internvl(folder, seed=23), TENSORS, asked="ab"),
    "internvl-chat": Family(lambda folder: load_internvl_chat(folder, seed=23), {**TENSORS, "trust_remote_code": True}),
    "qwen3-vl": Family(lambda folder: load_qwen3(folder, "qwen3-vl", seed=24, deepstack=(1, 2, 3)), TENSORS, DEEPSTACK),
    "qwen3-vl-moe": Family(
        lambda folder: load_qwen3(folder, "qwen3-vl-moe", seed=22, deepstack=(1, 2, 3)),
        TENSORS,
        {**DEEPSTACK, "quota": "video", "frame_smoothing": 0.5, "final_keep": 0.3},
        "ab",
    ),
    "qwen3.5": Family(
        lambda folder: load_qwen3_5(folder, "qwen3.5", seed=25, layers=4, state_heads=(2, 4)),
        {**TENSORS, **HYBRID},
        {"stages": 1},
    ),
    "qwen3.5-moe": Family(
        lambda folder: load_qwen3_5(folder, "qwen3.5-moe", seed=27, layers=4, state_heads=(2, 4)),
        {**TENSORS, **HYBRID},
        {"stages": 1},
    ),
    "llava-onevision, pipeline": Family(lambda folder: load_sample(folder, seed=19), LAYERS, {"stages": 1}),
    "qwen3-vl, pipeline": Family(
        lambda folder: load_qwen3(folder, "qwen3-vl", seed=22, deepstack=(1, 2, 3)), LAYERS, {"stages": 1}
    ),
    "qwen2-vl, pipeline": Family(lambda folder: load_qwen(folder, "qwen2-vl", seed=30), LAYERS, {"stages": 1}),
    "qwen2.5-vl, pipeline": Family(lambda folder: load_qwen(folder, "qwen2.5-vl", seed=28), LAYERS, {"stages": 1}),
    "internvl, pipeline": Family(lambda folder: load_internvl(folder, seed=29), LAYERS, {"stages": 1}),
    "internvl-chat, pipeline": Family(
        lambda folder: load_internvl_chat(folder, seed=31), {**LAYERS, "trust_remote_code": True}, {"stages": 1}
    ),
    "qwen3-vl-moe, pipeline": Family(
        lambda folder: load_qwen3(folder, "qwen3-vl-moe", seed=32, deepstack=(1, 2, 3)), LAYERS, {"stages": 1}
    ),
    "qwen3.5-moe, pipeline": Family(
        lambda folder: load_qwen3_5(folder, "qwen3.5-moe", seed=33), {**LAYERS, **HYBRID}, {"stages": 1}
    ),
    "qwen3.5, pipeline": Family(
        lambda folder: load_qwen3_5(folder, "qwen3.5", seed=26), {**LAYERS, **HYBRID}, {"stages": 1}
    ),
}
TOKENS = 12  # of an answer
VIDEOS = {"a": scene_video(1, 18), "b": scene_video(2, 27)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    return {name: family.load(tmp_path_factory.mktemp("model")) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def answers(samples: dict[str, Sample], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the two ranks said, by family, a row for each video."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("two ranks need two cores")
    folder = tmp_path_factory.mktemp("ranks")
    np.savez(folder / "videos.npz", **VIDEOS)  # type: ignore[arg-type]
    jobs = {}
    for name, sample in samples.items():
        sent = {video: sample.as_sent(frames) for video, frames in VIDEOS.items()}
        jobs[name] = {
            "model": str(sample.path),
            "ids": sample.prompt_ids(QUESTION, videos=1),
            "videos": str(folder / "videos.npz"),
            "asked": FAMILIES[name].asked,
            "known": {video: one[1] for video, one in sent.items() if isinstance(one, tuple)},
            "options": FAMILIES[name].options,
            "settings": FAMILIES[name].settings,
            "tokens": TOKENS,
        }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "main.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", root, prepend=os.pathsep)
        plugin = beside(folder / "site", "from tests.support.rank import register\n")
    env = {
        **os.environ,
        **plugin,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
    }
    done = subprocess.run(
        [sys.executable, str(folder / "main.py"), str(folder / "jobs.json")],
        env=env, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("RESULT"))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_equal_the_oracle(answers: dict[str, Any], samples: dict[str, Sample], family: str) -> None:
    sample, settings = samples[family], FAMILIES[family].settings
    ids = sample.as_read(sample.prompt_ids(QUESTION, videos=1))
    for video, (prompt, tokens, logprobs) in zip(FAMILIES[family].asked, answers[family], strict=True):
        frames = VIDEOS[video]
        expected = run_oracle(
            sample.model, ids, [sample.pixels(frames)], None, sample.question_ids(QUESTION),
            OracleSettings(strides=sample.strides, **settings), TOKENS,
        )  # fmt: skip
        observed = OracleResult(prompt, tokens, [{int(t): v for t, v in row.items()} for row in logprobs])
        assert_same(expected, observed, 1e-3)
