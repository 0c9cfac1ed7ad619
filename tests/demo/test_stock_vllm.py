"""Stock vLLM, no plugin loaded, serves the checkpoint as it is and answers as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.support.demo.stock_vllm import run_stock
from tests.support.oracle import OracleResult, OracleSettings, assert_same, run
from tests.support.oracle.samples import Sample, picture, scene_video

STEPS = 24
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from tests.support.oracle.samples import picture, scene_video

def main(path, prompts):
    llm = LLM(path, dtype="float32", max_model_len=512, block_size=32, enforce_eager=True, max_num_seqs=4)
    media = [{"video": scene_video(1, 8)}, {"video": scene_video(2, 5), "image": picture(3, 60, 100)}, {}]
    requests = [{"prompt_token_ids": p, "multi_modal_data": m} for p, m in zip(prompts, media, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
    for request in requests:  # one at a time: stock vLLM cannot encode videos of different length together
        out = llm.generate(request, params, use_tqdm=False)[0]
        rows = [{str(t): v.logprob for t, v in row.items()} for row in out.outputs[0].logprobs]
        print("RESULT", json.dumps([out.prompt_token_ids, list(out.outputs[0].token_ids), rows]))

if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
"""


def test_stock_vllm_answers_as_transformers_does(sample: Callable[..., Sample]):
    pytest.importorskip("vllm")
    tiny = sample(seed=1, layers=4)
    prompts = [tiny.prompt_ids(), tiny.prompt_ids(images=1), tiny.prompt_ids(videos=0)]
    done = run_stock(PROGRAM, str(tiny.path), json.dumps(prompts))
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 3, done.stderr[-3000:]

    videos = [[tiny.pixels(scene_video(1, 8))], [tiny.pixels(scene_video(2, 5))], []]
    images = [None, tiny.image_inputs([picture(3, 60, 100)]), None]
    for line, ids, shown, pictures in zip(lines, prompts, videos, images, strict=True):
        prompt, tokens, rows = json.loads(line.removeprefix("RESULT "))
        served = OracleResult(prompt, tokens, [{int(t): value for t, value in row.items()} for row in rows])
        assert_same(run(tiny.model, ids, shown, pictures, [], OracleSettings(off=True), STEPS), served, atol=1e-3)
