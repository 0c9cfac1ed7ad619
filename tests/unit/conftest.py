"""A tiny checkpoint and vLLM configurations made from it. No engine is started in this folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from metok_vllm.contract.advice import VARIABLE

settings.register_profile("unit", deadline=None)  # the first example of a test may pay for an import
settings.load_profile("unit")

METOK = "METokLlavaOnevisionForConditionalGeneration"


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's command line says of requests is gone with it."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-OneVision checkpoint of four layers."""
    from metok_vllm.demo.checkpoint import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("models") / "tiny", layers=4)


@pytest.fixture(scope="session")
def text_checkpoint(checkpoint: Path) -> Path:
    """The config and tokenizer of a text-only Qwen2 model."""
    folder = checkpoint.parent / "text-only"
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    config["architectures"] = ["Qwen2ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.symlink(checkpoint / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def make_config(checkpoint: Path) -> Callable[..., Any]:
    """`make_config(**engine_args)`: vLLM's whole configuration for the checkpoint,
    with METok unless `metok=False`.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make(metok: bool = True, **kwargs: Any) -> Any:
        options: dict[str, Any] = {
            "model": str(checkpoint),
            "dtype": "float32",
            "max_model_len": 4096,
            "block_size": 32,
            "enforce_eager": True,
        }
        if metok:
            options["hf_overrides"] = {"architectures": [METOK]}
        return EngineArgs(**(options | kwargs)).create_engine_config()

    return make
