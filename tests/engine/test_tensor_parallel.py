"""Two tensor-parallel ranks give the answers of one: the scores are averaged over the heads of both.

So do two halves of the layers (pipeline parallel), where stage 1 alone runs. The second half is handed the
positions of the compressed video, on three axes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.demo.qwen3_checkpoint import Qwen3Kind
from tests.support.oracle import OracleResult, OracleSettings, assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.samples import QUESTION, Sample, scene_video

# The ranks are processes of their own, and vLLM's multiprocessing starts them from the main module.
SCRIPT = """
import json, sys
import metok_vllm, numpy as np
from vllm import LLM, SamplingParams

def main():
    folder, ids, videos, options = sys.argv[1], json.loads(sys.argv[2]), np.load(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=2048, block_size=32, max_num_batched_tokens=128,
              **options, **metok_vllm.enable(**json.loads(sys.argv[6])))
    known = json.loads(sys.argv[5])
    sent = [(videos[name], known[name]) if known else videos[name] for name in videos.files]
    prompts = [{"prompt_token_ids": ids, "multi_modal_data": {"video": [video]}} for video in sent]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=1, ignore_eos=True)
    rows = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        done = output.outputs[0]
        rows.append([list(output.prompt_token_ids), list(done.token_ids),
                     [{t: e.logprob for t, e in row.items()} for row in done.logprobs]])
    print("RESULT" + json.dumps(rows))

if __name__ == "__main__":
    main()
"""


SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3-vl, pipeline": {"stages": 1},
    "qwen3-vl-moe, tower by data": {
        "decode_retention": 0.5,
        "quota": "video",
        "frame_smoothing": 0.5,
        "final_keep": 0.3,
        "prune_layers": [3, 5, 7],
    },
}


def _load(family: str, folder: Path) -> Sample:
    kind: Qwen3Kind = "qwen3-vl" if family.startswith("qwen3-vl,") else "qwen3-vl-moe"
    return load_qwen3(folder, kind, seed=22, deepstack=(1, 2, 3))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("family", SETTINGS)
def test_two_ranks_equal_the_oracle(tmp_path: Path, family: str) -> None:
    import numpy as np

    sample = _load(family, tmp_path / "model")
    videos = {"a": scene_video(1, 18), "b": scene_video(2, 27)}
    # Ranks share the work of one video's tower out by blocks of its frames then.
    options: dict[str, Any] = {"mm_encoder_tp_mode": "data"} if family.endswith("by data") else {}
    options["pipeline_parallel_size" if family.endswith("pipeline") else "tensor_parallel_size"] = 2
    sent = {name: sample.as_sent(video) for name, video in videos.items()}
    known = {name: video[1] for name, video in sent.items() if isinstance(video, tuple)}
    np.savez(tmp_path / "videos.npz", **videos)  # type: ignore[arg-type]
    (tmp_path / "main.py").write_text(SCRIPT)
    ids = sample.prompt_ids(QUESTION, videos=1)
    cores = sorted(os.sched_getaffinity(0))[:2]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    arguments = [
        str(sample.path),
        json.dumps(ids),
        str(tmp_path / "videos.npz"),
        json.dumps(options),
        json.dumps(known),
    ]
    env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py"), *arguments, json.dumps(SETTINGS[family])],
        env=env, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for video, (prompt, tokens, logprobs) in zip(videos.values(), json.loads(line[6:]), strict=True):
        expected = run_oracle(
            sample.model, ids, [sample.pixels(video)], None, sample.question_ids(QUESTION),
            OracleSettings(strides=sample.strides, **SETTINGS[family]), 24,
        )  # fmt: skip
        observed = OracleResult(prompt, tokens, [{int(t): v for t, v in row.items()} for row in logprobs])
        assert_same(expected, observed, 1e-3)
