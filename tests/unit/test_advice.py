"""Every sentence's advice can be followed on the server that gives it.

The sentences are made here as a server makes them, once where requests may state options for their media
(``--trust-request-mm-kwargs``) and once where they may not. What they name is asked of vLLM itself.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vllm import envs
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import merge_media_io_kwargs

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract import advice
from metok_vllm.contract.refusals import no_prompt_logprobs
from metok_vllm.contract.settings import RequestSettings, parse_settings, resolve_request
from metok_vllm.contract.video_plan import VideoGrid, plan_video
from metok_vllm.frontend.command_line import OPTION, apply_plugin_option
from metok_vllm.media.connector import MetokMediaConnector
from metok_vllm.media.loader import register_loader
from tests.unit.test_layers import MODULES

register_loader()


@pytest.fixture(params=[True, False], ids=["trusted", "not trusted"])
def trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv(advice.VARIABLE, str(int(request.param)))
    return bool(request.param)


@pytest.fixture(scope="session")
def options() -> set[str]:
    """All that `vllm serve` takes."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")  # type: ignore[no-untyped-call]
    serve: argparse.ArgumentParser = ServeSubcommand().subparser_init(parser.add_subparsers())
    return {name for action in serve._actions for name in action.option_strings} | {OPTION}


def message(error: type[Exception], cause: Callable[[], object]) -> str:
    with pytest.raises(error) as raised:
        cause()
    return str(raised.value)


def frames(count: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return "data:video/jpeg;base64," + ",".join([base64.b64encode(out.getvalue()).decode()] * count)


def too_small_a_budget() -> object:
    settings = RequestSettings(token_budget=1)
    return plan_video(VideoGrid(40, 8, 8), PoolStyle("bilinear"), 641, settings, "none")


SENTENCES: dict[str, Callable[[], str]] = {
    "a list of frames": lambda: message(
        VLLMValidationError, lambda: MetokMediaConnector({"video": {"video_backend": "metok"}}).fetch_video(frames(40))
    ),
    "token_budget": lambda: message(ValueError, too_small_a_budget),
    "prompt_logprobs": no_prompt_logprobs,
    "fewer frames": advice.fewer_frames,
    "reports": lambda: f"only {advice.with_report()} have one",
}
"""Those that say something else where requests may state nothing. `test_prompt_limits.py` has two more."""


@pytest.mark.parametrize("name", SENTENCES)
def test_a_request_is_told_to_state_only_what_the_server_takes(name: str, trusted: bool, options: set[str]) -> None:
    sentence = SENTENCES[name]()
    stated = dict(re.findall(r"(mm_processor_kwargs|media_io_kwargs)(?:=(\{.*\}))?", sentence))
    if trusted:
        assert stated, f"there is a way for the request itself, and it is not told: {sentence}"
    if not trusted and stated:
        assert "to a server with --trust-request-mm-kwargs" in sentence
        stated = {}
    values = {key: json.loads(value.replace("...", "8")) for key, value in stated.items() if value}
    kwargs = {"mm_processor_kwargs": None, "media_io_kwargs": None} | values
    validate_request_mm_kwargs(**kwargs, trust_request_mm_kwargs=trusted)
    if values.get("mm_processor_kwargs"):
        resolve_request(parse_settings(None), values["mm_processor_kwargs"]["metok"])
    assert set(re.findall(r"--[a-z][a-z-]+", sentence)) <= options


def test_the_advice_for_a_list_of_frames_lets_it_pass(trusted: bool) -> None:
    sentence = SENTENCES["a list of frames"]()
    (stated,) = re.findall(r'(\{"video": \{.*?\}\})', sentence)
    server: dict[str, dict[str, Any]] = {"video": {"video_backend": "metok"}}
    by_operator = {"video": {**server["video"], **json.loads(stated)["video"]}}
    kwargs = merge_media_io_kwargs(server, json.loads(stated)) if trusted else by_operator
    assert len(MetokMediaConnector(kwargs).fetch_video(frames(40)).media[0]) == 40


@pytest.mark.parametrize("given", [[], ["--trust-request-mm-kwargs"], ["--no-trust-request-mm-kwargs"]])
def test_the_command_line_tells_all_processes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    assert advice.requests_state_kwargs(), "LLM(): whoever calls it may state what he likes"
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    monkeypatch.setattr("sys.argv", ["vllm", "serve", str(checkpoint), "--plugin", "metok", *given])
    apply_plugin_option()
    assert advice.requests_state_kwargs() == (given == ["--trust-request-mm-kwargs"])


# --- all sentences, as they stand in the source ---


def texts(source: str) -> list[str]:
    """All string literals but docstrings and descriptions; formatted ones with {} in their gaps."""
    tree = ast.parse(source)
    passed_over: set[ast.AST] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed_over.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg == "description":
            passed_over |= set(ast.walk(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append("".join(parts))
            passed_over |= set(node.values)
    literals = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in passed_over)
    return found + [node.value for node in literals if isinstance(node.value, str)]


SAID = [
    (module, text)
    for module, source in MODULES.items()
    if not module.startswith(
        ("demo", "cli", "calibrate")
    )  # these start a server of their own, and have options of their own
    for text in texts(source)
]


def test_every_option_in_a_sentence_is_one_of_vllms(options: set[str]) -> None:
    named = {(module, option) for module, text in SAID for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)}
    assert len(named) > 40, "the search finds the sentences"
    of_metok = {"--videos"}  # of `metok calibrate`, which a warning tells to run
    assert {option for _, option in named} - options == of_metok


def test_every_variable_in_a_sentence_is_one_of_vllms() -> None:
    named = {name for _, text in SAID for name in re.findall(r"VLLM_[A-Z0-9_]+", text)}
    known = set(envs.environment_variables) | {"VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES"}
    known.add("VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB")  # vLLM 0.33's, for which 0.32 is asked first
    assert len(named) > 5
    assert named - known == set()


def test_options_of_requests_are_advised_in_one_place() -> None:
    """There it is known whether they may be stated. Elsewhere they only name what a request has stated."""
    advised = re.compile(r"(mm_processor_kwargs|media_io_kwargs)\s*[={]")
    assert {module for module, text in SAID if advised.search(text)} == {"contract.advice"}
