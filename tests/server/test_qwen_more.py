"""Qwen3-VL with experts and Qwen3.5 behind `vllm serve`, from folders as published."""

from __future__ import annotations

import json
import os
from pathlib import Path

import openai
import pytest

from tests.engine.test_qwen3_5 import NEAR
from tests.server.test_qwen3 import VIDEO, expected
from tests.support.oracle import assert_same
from tests.support.oracle.qwen3_5_samples import load_qwen3_5
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.server.asking import OPTIONS, QUESTION, chat, result, user
from tests.support.server.clips import data_url
from tests.support.server.live import beside, serving

NAMED = ("--plugin", "metok", "--served-model-name", "tiny", "--trust-request-mm-kwargs")
TURN = user(QUESTION, data_url(VIDEO))


def test_experts(tmp_path: Path) -> None:
    sample = load_qwen3(tmp_path / "model", "qwen3-vl-moe", seed=53)
    with serving(sample.path, tmp_path / "log", *NAMED, *OPTIONS) as server:
        for metok in (None, "off"):
            answer = result(chat(server, [TURN], metok, max_tokens=12))
            assert_same(expected(sample, off=metok == "off", fps=2), answer, 1e-3)
        assert_same(expected(sample, videos=0, fps=2), result(chat(server, [user(QUESTION)], max_tokens=12)), 1e-3)
        assert "ERROR" not in (tmp_path / "log").read_text(errors="replace")


PLUGIN = """
def register():
    from vllm.model_executor.models import qwen3_vl
    qwen3_vl.triton_pos_embed_interpolate = qwen3_vl.pos_embed_interpolate_native
"""
"""Another plugin of the server's. In bfloat16 Triton's interpreter makes no numbers of patches' positions,
METok on or off; vLLM's function for platforms without Triton does.
"""


def with_plugin(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that start from here on load this plugin."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    for name, value in beside(folder, source).items():
        monkeypatch.setenv(name, value)


STAGE_1 = ("--additional-config", json.dumps({"metok": {"stages": 1}}))


def test_stage_1_of_a_hybrid_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, which vLLM's CPU kernel takes alone."""
    with_plugin(tmp_path / "site", PLUGIN, monkeypatch)
    sample = load_qwen3_5(tmp_path / "model", "qwen3.5", seed=55, layers=4)
    options = [word if word != "float32" else "bfloat16" for word in OPTIONS]
    with serving(sample.path, tmp_path / "log", *NAMED, *STAGE_1, *options) as server:
        for metok in (None, "off"):
            answer = result(chat(server, [TURN], metok, max_tokens=8))
            reference = expected(sample, off=metok == "off", stages=1, force=answer.tokens, fps=2)
            assert answer.prompt_ids == reference.prompt_ids
            for token, ours, theirs in zip(answer.tokens, answer.logprobs, reference.logprobs, strict=True):
                assert ours[token] == pytest.approx(float(theirs[token]), abs=NEAR)
        with pytest.raises(openai.BadRequestError, match="this server was started with stages 1"):
            chat(server, [TURN], {"stages": 3})
        assert "ERROR" not in (tmp_path / "log").read_text(errors="replace")


def test_stage_1_of_a_hybrid_model_with_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32: in bfloat16 a rounded token goes to other experts, and the answer is another one."""
    with_plugin(tmp_path / "site", "from tests.support.rank import register\n", monkeypatch)
    sample = load_qwen3_5(tmp_path / "model", "qwen3.5-moe", seed=55, layers=4)
    with serving(sample.path, tmp_path / "log", *NAMED, *STAGE_1, *OPTIONS) as server:
        for metok in (None, "off"):
            answer = result(chat(server, [TURN], metok, max_tokens=12))
            assert_same(expected(sample, off=metok == "off", stages=1, fps=2), answer, 1e-3)
        assert "ERROR" not in (tmp_path / "log").read_text(errors="replace")
