"""`vllm run-batch` with METok, on a folder in the format of LLaVA's authors."""

from __future__ import annotations

import json
import os
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
from tests.support.server.live import environment, vllm


def test_run_batch_takes_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a user without a home folder, as in many containers, and with another plugin beside."""
    beside, loaded = tmp_path / "site", tmp_path / "loaded"
    about = beside / "beside-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: beside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nbeside = beside_plugin:register\n")
    (beside / "beside_plugin.py").write_text(f"def register():\n    open({str(loaded)!r}, 'a').close()\n")
    odd = {
        "HOME": "/proc/none",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(beside), os.environ.get("PYTHONPATH")])),
    }
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
