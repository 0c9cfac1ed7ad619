"""`--plugin metok`: what becomes of the command line, and that no other command line changes."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PretrainedConfig

from metok_vllm import plugin
from metok_vllm.contract import advice
from metok_vllm.frontend.command_line import CONNECTOR_VARIABLE, MIDDLEWARE, apply_plugin_option, rewritten
from metok_vllm.frontend.programs import WORKS_WITH, program_of
from tests.unit.conftest import METOK

ENTRY = "vllm.entrypoints"
VLLM = "/lib/site-packages/vllm/entrypoints"
BATCH = ["-i", "in.jsonl", "-o", "out.jsonl"]


@pytest.fixture
def serve(checkpoint: Path) -> Callable[..., Namespace]:
    """What vLLM reads after `vllm serve ...` was rewritten;
    MODEL in an argument stands for the checkpoint.
    """

    def read(*arguments: str, command: str = "serve") -> Namespace:
        argv = ["vllm", command, *(a.replace("MODEL", str(checkpoint)) for a in arguments)]
        result = rewritten(argv)
        assert result[:2] == argv[:2]
        assert not any(argument.startswith("--plugin") for argument in result)
        return _parsed(result)

    return read


@pytest.mark.parametrize(
    "arguments",
    [
        ["MODEL", "--plugin", "metok"],
        ["MODEL", "--plugin=metok"],
        ["--plugin", "metok", "MODEL"],
        ["--plugin=metok", "MODEL"],
        ["MODEL", "--plugin", "metok", "--plugin=metok"],
        ["MODEL", "--port", "8001", "--plugin", "metok", "--enforce-eager"],
        ["--port", "8001", "MODEL", "--plugin", "metok"],
        ["--enforce-eager", "MODEL", "--plugin", "metok"],
        ["-tp", "2", "--enforce-eager", "--port=8001", "MODEL", "--plugin=metok"],
        ["--served-model-name", "a", "b", "--plugin", "metok", "--model", "MODEL"],
        ["--plugin", "metok", "--model", "MODEL"],
        ["--plugin", "metok", "--model=MODEL"],
        ["--model=MODEL", "--port", "8001", "--plugin", "metok"],
    ],
)
def test_serve(serve: Callable[..., Namespace], checkpoint: Path, arguments: list[str]) -> None:
    options = serve(*arguments)
    assert (options.model_tag or options.model) == str(checkpoint)
    assert options.hf_overrides == {"architectures": [METOK]}
    assert options.middleware == [MIDDLEWARE]
    assert options.port == (8001 if any("8001" in argument for argument in arguments) else 8000)
    assert options.enforce_eager == ("--enforce-eager" in arguments)


@pytest.mark.parametrize("model", [["--model", "MODEL"], ["--model=MODEL"]])
@pytest.mark.parametrize("option", [["--plugin", "metok"], ["--plugin=metok"]])
def test_run_batch(serve: Callable[..., Namespace], checkpoint: Path, model: list[str], option: list[str]) -> None:
    for arguments in ([*BATCH, *model, *option], [*option, *model, *BATCH]):
        options = serve(*arguments, command="run-batch")
        assert options.model == str(checkpoint)
        assert options.hf_overrides == {"architectures": [METOK]}
        assert not hasattr(options, "middleware"), "there is no server to add routes to"


# --- the config file ---


@pytest.fixture
def config_file(tmp_path: Path, checkpoint: Path) -> Callable[..., str]:
    def write(**entries: Any) -> str:
        path = tmp_path / "serve.yaml"
        path.write_text(
            yaml.safe_dump(
                {k: v.replace("MODEL", str(checkpoint)) if isinstance(v, str) else v for k, v in entries.items()}
            )
        )
        return str(path)

    return write


def test_the_model_in_a_config_file(
    serve: Callable[..., Namespace], config_file: Callable[..., str], checkpoint: Path
) -> None:
    path = config_file(model="MODEL", port=8123)
    for arguments in (["--config", path, "--plugin", "metok"], ["--plugin=metok", "--config", path]):
        options = serve(*arguments)
        assert (options.model, options.port) == (str(checkpoint), 8123)
        assert options.hf_overrides == {"architectures": [METOK]}
    options = serve(*BATCH, "--config", path, "--plugin", "metok", command="run-batch")
    assert options.model == str(checkpoint)


def test_the_command_line_wins_over_the_config_file(
    serve: Callable[..., Namespace], config_file: Callable[..., str], text_checkpoint: Path, checkpoint: Path
) -> None:
    options = serve("MODEL", "--config", config_file(model=str(text_checkpoint)), "--plugin", "metok")
    assert options.model_tag == str(checkpoint)


def test_overrides_and_middleware_in_a_config_file_stay(
    serve: Callable[..., Namespace], config_file: Callable[..., str]
) -> None:
    path = config_file(**{"model": "MODEL", "hf-overrides": {"rope_theta": 5}, "middleware": ["a.b"]})
    options = serve("--config", path, "--plugin", "metok")
    assert options.hf_overrides == {"rope_theta": 5, "architectures": [METOK]}
    assert options.middleware == ["a.b", MIDDLEWARE]


# --- what the user overrides ---


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--hf-overrides", '{"a": 1, "b": {"c": [2]}}'], {"a": 1, "b": {"c": [2]}}),
        (['--hf-overrides={"a": 1}'], {"a": 1}),
        (["--hf_overrides", '{"a": 1}'], {"a": 1}),
        (['--hf_overrides={"a": 1}'], {"a": 1}),
        (["--hf-overrides.a", "1"], {"a": 1}),
        (
            ["--hf_overrides.text_config.x=1", "--hf-overrides.text_config.y", "two"],
            {"text_config": {"x": 1, "y": "two"}},
        ),
        (["--hf-overrides.a+", "x,y"], {"a": ["x", "y"]}),
        (["--hf-overrides", '{"architectures": ["Other"], "a": 1}'], {"a": 1}),
        (["--hf-overrides.architectures", '["Other"]'], {}),
        (["--hf-overrides", "{}"], {}),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_other_overrides_stay(
    serve: Callable[..., Namespace], given: list[str], kept: dict[str, Any], before: bool
) -> None:
    arguments = ["MODEL", "--plugin", "metok", "--port", "8001"]
    options = serve(*([*given, *arguments] if before else [*arguments, *given]))
    assert options.hf_overrides == kept | {"architectures": [METOK]}
    assert options.port == 8001


@pytest.mark.parametrize("given", ["[1]", "3", '"x"', "{broken"])
def test_overrides_that_are_no_object(checkpoint: Path, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        rewritten(["vllm", "serve", str(checkpoint), "--plugin", "metok", "--hf-overrides", given])
    if isinstance(error.value, ValueError):
        assert str(error.value).startswith("--hf-overrides takes a JSON object, not ")
    else:
        assert "--hf-overrides" in capsys.readouterr().err


def test_middleware_of_the_users_own(serve: Callable[..., Namespace]) -> None:
    options = serve("MODEL", "--middleware", "a.b", "--plugin", "metok", "--middleware=c.d")
    assert options.middleware == ["a.b", "c.d", MIDDLEWARE]


def test_there_are_no_requests_to_watch_in_a_batch(serve: Callable[..., Namespace]) -> None:
    settings = ("--additional-config", '{"metok": {"shadow_rate": 0.5}}')
    assert serve("MODEL", "--plugin", "metok", *settings).additional_config["metok"] == {"shadow_rate": 0.5}
    with pytest.raises(ValueError, match="'shadow_rate' watches the requests of vllm serve, and has no effect here"):
        serve(*BATCH, "--model", "MODEL", "--plugin", "metok", *settings, command="run-batch")


# --- what is not asked for METok ---


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["vllm"],
        ["vllm", "serve"],
        ["vllm", "serve", "no-such-model"],
        ["vllm", "serve", "no-such-model", "--plugin", "other"],
        ["vllm", "serve", "no-such-model", "--plugin"],
        ["vllm", "serve", "no-such-model", "--plugin=metok2", "--plugins", "metok"],
        ["vllm", "serve", "--config", "no-such-file.yaml"],
        ["vllm", "run-batch", *BATCH, "--model", "no-such-model"],
        ["vllm", "chat", "--plugin", "other"],
        ["vllm", "bench", "serve", "--plugin=metok2"],
        ["vllm", "bench", "sweep", "serve", "--serve-cmd", "vllm serve m --plugin metok"],
        ["vllm", "collect-env"],
        ["my-tool", "chat", "--plugin", "metok"],
        ["my_tool.py", "--plugin", "metok"],
        ["python -m pytest", "tests", "--plugin", "metok"],
    ],
)
def test_all_else_is_left_alone(argv: list[str]) -> None:
    before = list(argv)
    result = rewritten(argv)
    assert result == argv == before


# --- where the option means nothing ---


@pytest.mark.parametrize(
    ("argv", "called"),
    [
        (["vllm", "chat", "--plugin", "metok"], "vllm chat"),
        (["vllm", "complete", "--plugin=metok"], "vllm complete"),
        (["vllm", "bench", "serve", "--model", "m", "--plugin", "metok"], "vllm bench serve"),
        (["vllm", "bench", "sweep", "serve", "--plugin", "metok"], "vllm bench sweep"),
        (["vllm", "launch", "render", "m", "--plugin=metok"], "vllm launch render"),
        (["vllm", "collect-env", "--plugin", "metok"], "vllm collect-env"),
        (["vllm", "--plugin", "metok"], "vllm"),
        ([f"{VLLM}/cli/main.py", "chat", "--plugin", "metok"], "vllm chat"),
        ([f"{VLLM}/launchers/grpc_server.py", "--plugin", "metok"], f"python -m {ENTRY}.launchers.grpc_server"),
    ],
)
def test_where_the_option_means_nothing(argv: list[str], called: str) -> None:
    with pytest.raises(ValueError, match="--plugin metok") as error:
        rewritten(argv)
    assert str(error.value) == f"{called} does not take --plugin metok; it works with {WORKS_WITH}."


# --- programs other than `vllm serve` and `vllm run-batch` ---


@pytest.mark.parametrize("module", ["openai/api_server.py", "launchers/api_server/entry.py"])
@pytest.mark.parametrize("place", ["--model", "--config"])
def test_the_server_as_a_module(checkpoint: Path, config_file: Callable[..., str], module: str, place: str) -> None:
    argument = str(checkpoint) if place == "--model" else config_file(model="MODEL", plugin="metok")
    asked = ["--plugin", "metok"] if place == "--model" else []
    argv = rewritten([f"{VLLM}/{module}", place, argument, *asked, "--port", "8123"])
    options = _parsed(argv)
    assert (options.model, options.port) == (str(checkpoint), 8123)
    assert options.hf_overrides == {"architectures": [METOK]}
    assert options.middleware == [MIDDLEWARE]


@pytest.mark.parametrize("module", ["openai/run_batch.py", "launchers/run_batch.py"])
def test_batches_as_a_module(checkpoint: Path, module: str) -> None:
    options = _parsed(rewritten([f"{VLLM}/{module}", *BATCH, "--model", str(checkpoint), "--plugin=metok"]))
    assert options.hf_overrides == {"architectures": [METOK]}


@pytest.mark.parametrize("kind", ["latency", "mm-processor", "startup", "throughput"])
def test_benchmarks_with_an_engine_of_their_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    argv = ["vllm", "bench", kind, "--plugin", "metok", "--model", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", list(argv))  # vLLM looks there before it builds the parsers of its benchmarks
    options = _parsed(rewritten(argv))
    assert options.hf_overrides == {"architectures": [METOK]}
    assert not hasattr(options, "middleware")


@pytest.mark.parametrize(
    ("program", "may_state"),
    [
        (["vllm", "serve"], False),
        (["vllm", "serve", "--trust-request-mm-kwargs"], True),
        ([f"{VLLM}/openai/api_server.py"], False),
        (["vllm", "run-batch", *BATCH], False),
        ([f"{VLLM}/openai/run_batch.py", *BATCH, "--trust-request-mm-kwargs"], True),
        *((["vllm", "bench", kind], True) for kind in ("latency", "mm-processor", "startup", "throughput")),
    ],
)
def test_every_program_starts_with_the_option(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, program: list[str], may_state: bool
) -> None:
    """And METok's sentences know what its requests may state; a benchmark's are its own."""
    monkeypatch.setattr(sys, "argv", [*program, "--model", str(checkpoint), "--plugin", "metok"])
    monkeypatch.setenv(CONNECTOR_VARIABLE, "http")
    monkeypatch.setenv(advice.VARIABLE, "")
    assert apply_plugin_option()
    assert advice.requests_state_kwargs() == may_state
    assert _parsed(sys.argv).hf_overrides == {"architectures": [METOK]}


def test_every_program_that_is_named_exists() -> None:
    """vLLM has no other benchmark with an engine, and none of these is gone."""
    import vllm.benchmarks

    folder = Path(vllm.benchmarks.__file__).parent
    kinds = {path.stem for path in folder.glob("*.py") if "EngineArgs.add_cli_args" in path.read_text()}
    assert {kind.replace("_", "-") for kind in kinds} == set(re.findall(r"[\w-]+", WORKS_WITH.split(" bench ")[1])) - {
        "or"
    }


# --- a config file that asks ---


@pytest.mark.parametrize("plugin", ["metok", ["metok"]])
def test_a_config_file_that_asks(
    serve: Callable[..., Namespace], config_file: Callable[..., str], checkpoint: Path, plugin: Any
) -> None:
    entries = {
        "model": "MODEL", "plugin": plugin, "port": 8123, "enforce-eager": True, "middleware": ["a.b"],
        "additional-config": {"metok": {"events": 3}}, "hf-overrides": {"rope_theta": 5},
    }  # fmt: skip
    options = serve("--config", config_file(**entries), "--max-num-seqs", "3")
    assert (options.model_tag, options.port, options.max_num_seqs) == (str(checkpoint), 8123, 3)
    assert options.enforce_eager
    assert options.hf_overrides == {"rope_theta": 5, "architectures": [METOK]}
    assert options.additional_config == {"metok": {"events": 3}}
    assert options.middleware == ["a.b", MIDDLEWARE]
    batch = serve(*BATCH, "--config", config_file(model="MODEL", plugin=plugin), command="run-batch")
    assert batch.hf_overrides == {"architectures": [METOK]}


@pytest.mark.parametrize("model", [["MODEL"], ["--model", "MODEL"], ["--model=MODEL"]])
def test_the_command_line_wins_over_a_config_file_that_asks(
    serve: Callable[..., Namespace],
    config_file: Callable[..., str],
    text_checkpoint: Path,
    checkpoint: Path,
    model: list[str],
) -> None:
    path = config_file(model=str(text_checkpoint), plugin="metok", port=8123)
    options = serve(*model, "--config", path, "--port", "8124")
    assert (options.model_tag, options.port) == (str(checkpoint), 8124)


@pytest.mark.parametrize(
    ("content", "end"),
    [
        (None, "No such file or directory."),
        (b"a: [", None),
        (b"- a", "there are no keys and values in it."),
        (b"", "there are no keys and values in it."),
        (b"\xff\xfe", None),
    ],
)
def test_a_config_file_that_cannot_be_read(checkpoint: Path, tmp_path: Path, content: bytes | None, end: str) -> None:
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    argv = ["vllm", "serve", str(checkpoint), "--config", str(path)]
    assert rewritten(argv) == argv, "without METok it is vLLM's to say"
    with pytest.raises(ValueError, match=f"^--config {path}: ") as error:
        rewritten([*argv, "--plugin", "metok"])
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(end or ".")


def test_a_config_file_with_other_plugins_too(config_file: Callable[..., str]) -> None:
    path = config_file(model="MODEL", plugin=["metok", "other"])
    with pytest.raises(ValueError, match=r"'plugin' takes metok alone, not \['metok', 'other'\]\."):
        rewritten(["vllm", "serve", "--config", path])


def test_settings_in_a_config_file_that_does_not_ask(config_file: Callable[..., str]) -> None:
    path = config_file(model="MODEL", additional_config={"metok": {"events": 3}})
    with pytest.raises(ValueError, match="has settings for METok, which is off: add --plugin metok"):
        rewritten(["vllm", "serve", "--config", path])


# --- the chat template ---


@pytest.mark.parametrize("given", ["--additional-config", "", "--config"])
def test_metok_is_told_the_chat_template(
    serve: Callable[..., Namespace], config_file: Callable[..., str], tmp_path: Path, given: str
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    arguments = ["MODEL", "--plugin", "metok", "--chat-template", str(template)]
    told: dict[str, Any] = {"metok": {"chat_template": str(template)}}
    if given == "--additional-config":
        arguments += [given, '{"else": 1, "metok": {"events": 3}}']
        told = {"else": 1, "metok": {"events": 3, "chat_template": str(template)}}
    elif given == "--config":
        arguments = ["--config", config_file(**{"model": "MODEL", "plugin": "metok", "chat-template": str(template)})]
    options = serve(*arguments)
    assert options.additional_config == told
    assert options.chat_template == str(template)
    batch = serve(*BATCH, "--model", "MODEL", "--plugin=metok", "--chat-template", str(template), command="run-batch")
    assert batch.additional_config == {"metok": {"chat_template": str(template)}}


def test_a_chat_template_of_the_users_own_setting_stays(serve: Callable[..., Namespace]) -> None:
    own = '{"metok": {"chat_template": "{{ messages }}"}}'
    options = serve("MODEL", "--plugin", "metok", "--chat-template", "{{ 1 }}", "--additional-config", own)
    assert options.additional_config == json.loads(own)


def test_no_such_chat_template(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^--chat-template: ") as error:
        rewritten(["vllm", "serve", str(checkpoint), "--plugin", "metok", "--chat-template", "/no/such.jinja"])
    assert "/no/such.jinja" in str(error.value)


def test_templates_of_requests_are_warned_of(serve: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args, **_: said.append(text % args))
    serve("MODEL", "--plugin", "metok")
    assert not [text for text in said if "METok" in text]
    serve("MODEL", "--plugin", "metok", "--trust-request-chat-template")
    (warning,) = [text for text in said if "METok" in text]
    assert "--trust-request-chat-template" in warning
    assert "'query'" in warning


# --- what METok cannot serve ---

CANNOT = (
    r"^METok cannot serve {} \({}\); it can serve: LlavaOnevisionForConditionalGeneration, LlavaQwenForCausalLM, "
    r"Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration, Qwen3VLForConditionalGeneration, "
    r"Qwen3VLMoeForConditionalGeneration, Qwen3_5ForConditionalGeneration, Qwen3_5MoeForConditionalGeneration, "
    r"InternVLForConditionalGeneration, InternVLChatModel\.$"
)


@pytest.mark.parametrize("place", ["positional", "--model", "--config"])
def test_an_unsupported_model(text_checkpoint: Path, config_file: Callable[..., str], place: str) -> None:
    model = str(text_checkpoint)
    arguments = {
        "positional": ["--port", "8001", model],
        "--model": ["--model", model],
        "--config": ["--config", config_file(model=model)],
    }[place]
    with pytest.raises(ValueError, match=CANNOT.format(model, "Qwen2ForCausalLM")):
        rewritten(["vllm", "serve", *arguments, "--plugin", "metok"])


def test_a_config_without_architectures(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=CANNOT.format(tmp_path, "no architecture")):
        rewritten(["vllm", "serve", str(tmp_path), "--plugin", "metok"])


def test_a_checkpoint_that_names_metok_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [METOK]}))
    assert _parsed(rewritten(["vllm", "serve", str(tmp_path), "--plugin", "metok"])).hf_overrides == {
        "architectures": [METOK]
    }


@pytest.mark.parametrize("fault", ["no such folder", "no config", "broken config", "no such name"])
def test_a_model_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    model = str(tmp_path)
    if fault == "broken config":
        (tmp_path / "config.json").write_text("{")
    elif fault == "no such folder":
        model = str(tmp_path / "missing")
    elif fault == "no such name":
        model = "nobody/nothing"
    with pytest.raises(ValueError, match=f"^METok cannot read the config of {model}: ") as error:
        rewritten(["vllm", "serve", model, "--plugin", "metok"])
    assert "\n" not in str(error.value)


def test_the_config_that_vllm_would_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_config_dict(model: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append((model, revision))
        return {"architectures": [METOK]}, {}

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", get_config_dict)
    rewritten(["vllm", "serve", "a/model", "--revision", "v2", "--plugin", "metok"])
    rewritten(["vllm", "serve", "a/model", "--plugin", "metok", "--hf-config-path", str(checkpoint)])
    assert asked == [("a/model", "v2"), (str(checkpoint), None)]


def test_what_vllm_refuses_itself(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        rewritten(["vllm", "serve", str(checkpoint), "--plugin", "metok", "--no-such-option"])
    assert stop.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_help_is_still_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        rewritten(["vllm", "serve", "--plugin", "metok", "--help"])
    assert stop.value.code == 0
    assert "vllm serve" in capsys.readouterr().out


# --- in place ---


def test_sys_argv_is_rewritten_in_place(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["vllm", "serve", str(checkpoint), "--plugin", "metok"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv(CONNECTOR_VARIABLE, "http")  # an operator's choice holds, and no other test sees METok's
    apply_plugin_option()
    assert sys.argv is argv, "vLLM and the processes that it starts read the same list"
    assert argv[:3] == ["vllm", "serve", str(checkpoint)]
    once = list(argv)
    apply_plugin_option()
    assert argv == once, "a second process that loads the plugin must not rewrite again"


def test_the_server_does_not_start_with_an_unsupported_model(
    text_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", str(text_checkpoint), "--plugin", "metok"])
    with pytest.raises(SystemExit) as stop:
        apply_plugin_option()
    message = str(stop.value)
    assert message.startswith("vllm: error: METok cannot serve ")
    assert "LlavaOnevisionForConditionalGeneration" in message


LONELY = '{"metok": {"events": 3}}'


@pytest.mark.parametrize(
    "settings",
    [["--additional-config", LONELY], [f"--additional_config={LONELY}"], ["--additional-config.metok", "{}"]],
)
def test_settings_without_the_option_are_refused(checkpoint: Path, settings: list[str]) -> None:
    argv = ["vllm", "serve", str(checkpoint), *settings]
    with pytest.raises(ValueError, match="has settings for METok, which is off: add --plugin metok"):
        rewritten(argv)
    assert rewritten([*argv, "--plugin", "metok"]) != argv
    by_hand = [*argv, "--hf-overrides", json.dumps({"architectures": [METOK]})]
    assert rewritten(by_hand) == by_hand


@pytest.mark.parametrize("asked", [False, True])
def test_a_vllm_that_metok_does_not_fit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr(plugin, "_register_lazily", unlike)
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args: said.append(text % args))
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", str(checkpoint), *(["--plugin", "metok"] if asked else [])])
    monkeypatch.setenv(CONNECTOR_VARIABLE, "http")
    if asked:
        with pytest.raises(SystemExit, match="METok cannot be loaded into this vLLM: no such name"):
            plugin.register()
    else:
        plugin.register()
        assert said == ["METok cannot be loaded into this vLLM and is off: no such name"]


def unlike() -> None:
    raise ImportError("no such name")


def _parsed(argv: list[str]) -> Namespace:
    """What vLLM reads in a command line."""
    program = program_of(argv)
    assert program is not None
    options: Namespace = program.parser().parse_args(argv[program.first :])
    return options
