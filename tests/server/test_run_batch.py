"""`vllm run-batch` with METok, on a folder in the format of LLaVA's authors."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from metok_vllm.contract import advice
from metok_vllm.contract.refusals import no_prompt_logprobs
from tests.support.oracle import OracleSettings
from tests.support.oracle import run as run_oracle
from tests.support.oracle.originals import load_original
from tests.support.oracle.samples import scene_video
from tests.support.server.asking import OPTIONS, QUESTION, user
from tests.support.server.clips import data_url, mp4, seen
from tests.support.server.live import beside, environment, vllm


def test_run_batch_takes_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a user without a home folder, as in many containers, and with another plugin beside."""
    loaded = tmp_path / "loaded"
    plugin = f"def register():\n    open({str(loaded)!r}, 'a').close()\n"
    odd = {"HOME": "/proc/none", **beside(tmp_path / "site", plugin)}
    sample = load_original(tmp_path / "model", "longva-dpo", seed=43)
    video = mp4(scene_video(10, 14))
    line = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": str(sample.path),
            "temperature": 0,
            "max_tokens": 24,
            "ignore_eos": True,
            "return_token_ids": True,
            "messages": [user(QUESTION, data_url(video))],
        },
    }
    refused = {**line, "custom_id": "two", "body": {**line["body"], "prompt_logprobs": 1}}  # type: ignore[dict-item]
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(refused)}\n{json.dumps(line)}\n")
    subprocess.run(
        [vllm(), "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", str(sample.path), "--plugin", "metok",
         "--additional-config", json.dumps({"metok": {"preset": "balanced"}}), *OPTIONS],
        cwd=tmp_path, env=environment() | odd, check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    outputs = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert loaded.exists()
    two, one = sorted(outputs, key=lambda output: output["custom_id"], reverse=True)
    assert two["response"]["status_code"] == 400
    monkeypatch.setenv(advice.VARIABLE, "0")  # run-batch was not given --trust-request-mm-kwargs
    assert two["error"]["error"]["message"] == f"METok: {no_prompt_logprobs()}"
    body = one["response"]["body"]
    expected = run_oracle(
        sample.model, sample.prompt_ids(QUESTION, videos=1), [sample.pixels(seen(video))], None,
        sample.question_ids(QUESTION), OracleSettings(decode_retention=1, quota="video"), 24,
    )  # fmt: skip
    assert body["prompt_token_ids"] == expected.prompt_ids
    assert body["choices"][0]["token_ids"] == expected.tokens
