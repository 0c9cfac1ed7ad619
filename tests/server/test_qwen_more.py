"""Qwen3-VL with experts and Qwen3.5 behind `vllm serve`, from folders as published."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from metok_vllm.demo.qwen3_5_checkpoint import Qwen3_5Kind
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


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in beside(tmp_path / "site", PLUGIN).items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("patches")
@pytest.mark.parametrize("kind", ["qwen3.5", "qwen3.5-moe"])
def test_stage_1_of_a_hybrid_model(tmp_path: Path, kind: Qwen3_5Kind) -> None:
    """In bfloat16, which vLLM's CPU kernel takes alone."""
    sample = load_qwen3_5(tmp_path / "model", kind, seed=55, layers=4)
    stage_1 = ("--additional-config", json.dumps({"metok": {"stages": 1}}))
    options = [word if word != "float32" else "bfloat16" for word in OPTIONS]
    with serving(sample.path, tmp_path / "log", *NAMED, *stage_1, *options) as server:
        for metok in (None, "off"):
            answer = result(chat(server, [TURN], metok, max_tokens=8))
            reference = expected(sample, off=metok == "off", stages=1, force=answer.tokens, fps=2)
            assert answer.prompt_ids == reference.prompt_ids
            for token, ours, theirs in zip(answer.tokens, answer.logprobs, reference.logprobs, strict=True):
                assert ours[token] == pytest.approx(float(theirs[token]), abs=NEAR)
        with pytest.raises(openai.BadRequestError, match="this server was started with stages 1"):
            chat(server, [TURN], {"stages": 3})
        assert "ERROR" not in (tmp_path / "log").read_text(errors="replace")
