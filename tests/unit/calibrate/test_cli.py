"""`metok calibrate` and `metok probe`: what they say to a user's mistake, without a trace."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.calibrate import run
from metok_vllm.calibrate.settings import Setting
from metok_vllm.cli import main
from metok_vllm.demo.model_choice import TRAINED


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (line,) = err.strip().splitlines()
    return line.removeprefix("metok: error: ")


@pytest.mark.parametrize("command", ["calibrate", "probe"])
def test_without_videos_it_refuses(capsys: pytest.CaptureFixture[str], command: str, tmp_path: Path) -> None:
    said = refused(capsys, command, str(TRAINED), "--out", str(tmp_path / "p.json"))
    assert said == "Name the videos to measure on: --videos FOLDER, or --questions FILE that names some."


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "probe", str(tmp_path), "--videos", str(tmp_path)).startswith(
        f"METok cannot tell which model is in {tmp_path}: "
    )


def test_a_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refused(capsys, "calibrate", str(TRAINED), "--videos", str(tmp_path), "--out", str(tmp_path))
    assert said == f"Cannot write {tmp_path}: it is a folder."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "1.5"], "must be above 0 and at most 1, not '1.5'"),
        (["--target", "all"], "must be above 0 and at most 1, not 'all'"),
        (["--samples", "0"], "must be a whole number from 1, not '0'"),
        (["--engine-option", "[1]"], "must be a JSON object, not '[1]'"),
        (["--engine-option", "{"], "must be a JSON object, not '{'"),
        (["--metok", "none"], "must be a JSON object, not 'none'"),
    ],
)
def test_wrong_options(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "m", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "ending"), [("found.png", ".png"), ("found.work", ".work")])
def test_a_name_that_something_else_has(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, ending: str
) -> None:
    said = refused(capsys, "calibrate", str(TRAINED), "--videos", str(tmp_path), "--out", str(tmp_path / name))
    assert said == (
        f"Cannot write {tmp_path / name}: a name that ends with {ending} is that of what else is written. End it with "
        ".json."
    )


@pytest.mark.parametrize("out", ["", "."])
@pytest.mark.parametrize("command", ["calibrate", "probe"])
def test_no_name_at_all(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, out: str) -> None:
    said = refused(capsys, command, str(TRAINED), "--videos", str(tmp_path), "--out", out)
    assert said == "Cannot write .: it is a folder."


@pytest.mark.parametrize(
    ("flag", "stated", "said"),
    [
        ("--metok", {"keep_ratio": 0.5}, "--metok cannot state keep_ratio, which is searched; it takes aligner, "),
        ("--metok", {"preset": "paper"}, "--metok cannot state preset, which is searched; it takes aligner, "),
        ("--metok", {"kv_layers": [0, 2]}, "--metok cannot state kv_layers, which is searched; it takes aligner, "),
        ("--metok", {"shadow_rate": 0.5}, "--metok cannot state shadow_rate; it takes aligner, "),
        ("--metok", {"aligner": "best"}, "METok (--metok): 'aligner' got 'best': "),
        ("--metok", {"aligners": "none"}, "METok (--metok): unknown setting 'aligners'; "),
        (
            "--engine-option",
            {"additional_config": {"metok": {}}},
            "--engine-option cannot state additional_config: METok's settings go to --metok.",
        ),
        ("--engine-option", {"hf_overrides": {}}, "--engine-option cannot state hf_overrides, which METok sets."),
    ],
)
@pytest.mark.parametrize("command", ["calibrate", "probe"])
def test_what_cannot_be_stated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, flag: str, stated: dict[str, Any], said: str
) -> None:
    where = ("--videos", str(tmp_path), "--out", str(tmp_path / "p.json"))
    assert refused(capsys, command, str(TRAINED), *where, flag, json.dumps(stated)).startswith(said)


def test_a_model_that_cannot_be_pruned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3_5ForConditionalGeneration"]}))
    said = refused(capsys, "calibrate", str(tmp_path), "--videos", str(tmp_path), "--out", str(tmp_path / "p.json"))
    assert said.startswith("There is nothing to calibrate: ")
    assert said.endswith(", so this model is served with the setting stages 1, which prunes no layer.")


def test_the_server_is_started_as_it_was_measured() -> None:
    engine = {
        "dtype": "float32", "media_io_kwargs": {"video": {"num_frames": 64}}, "enforce_eager": True,
        "enable_prefix_caching": False, "tensor_parallel_size": 2, "seed": None, "cudagraph_capture_sizes": [1, 2],
    }  # fmt: skip
    options = run.Options(model="my models/7b", out=Path("found.json"), engine=engine, metok={"aligner_model": "tower"})
    assert shlex.split(run.serve_command(options)) == [
        *("vllm", "serve", "my models/7b", "--plugin", "metok", "--dtype", "float32"),
        *("--media-io-kwargs", '{"video": {"num_frames": 64}}', "--enforce-eager", "--no-enable-prefix-caching"),
        *("--tensor-parallel-size", "2", "--cudagraph-capture-sizes", "1", "2"),
        *("--additional-config", '{"metok": {"aligner_model": "tower", "profile": "found.json"}}'),
    ]
    assert run._settings(options, Setting((1, 2, 3), (2, 4, 8)))["aligner"] == "dual-tower"


def test_engine_options_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run, "run_calibrate", lambda options: seen.append(options) or 0)
    flags = ["--tensor-parallel-size", "2", "--dtype", "half", "--max-model-len", "99", "--num-frames", "8"]
    flags += ["--metok", '{"key_frames": 3}']
    assert main(["calibrate", "m", *flags, "--engine-option", '{"dtype": "float32", "seed": 1}']) == 0
    assert seen[0].engine == {
        "tensor_parallel_size": 2, "dtype": "float32", "max_model_len": 99, "seed": 1,
        "media_io_kwargs": {"video": {"num_frames": 8}},
    }  # fmt: skip
    assert seen[0].metok == {"key_frames": 3}


def test_an_interrupt_ends_without_a_trace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_probe", interrupted)
    assert main(["probe", "m"]) == 130
    assert capsys.readouterr().err == "metok: interrupted; the same command goes on where it was.\n"
