"""The `metok` command: what it says to its user,
and the demo end to end against a server that is not vLLM.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metok_vllm import cli
from metok_vllm.cli import main
from metok_vllm.demo import model_choice
from metok_vllm.demo.model_choice import CLIP, choose_model
from metok_vllm.demo.server import free_port
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings
from metok_vllm.models.registry import SUPPORTED
from tests.support.demo.reports import real_report
from tests.support.demo.stub_server import Stub, serving
from tests.support.oracle.samples import Sample


@pytest.fixture
def report(sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch) -> Any:
    frames = decode_video(CLIP.read_bytes(), VideoSettings(num_frames=8)).frames
    return real_report(sample(), frames, monkeypatch)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with, where it must refuse."""
    assert main(["demo", *arguments]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("metok: error: ")
    assert lines[0].endswith((".", "?"))
    return lines[0].removeprefix("metok: error: ")


def test_the_demo_asks_twice_and_shows_what_was_done(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving(Stub(report=report)) as stub:
        status = main(
            ["demo", "--url", stub.url, "--frames", "8", "--question", " Who wakes? ", "--out", str(tmp_path / "a/b")]
        )
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    on, off = stub.asked
    assert on["mm_processor_kwargs"] == {"metok": {"report": True}}
    assert off["mm_processor_kwargs"] == {"metok": "off"}
    for request in (on, off):
        assert request["model"] == "tiny"
        assert request["temperature"] == 0
        assert request["media_io_kwargs"] == {"video": {"num_frames": 8, "sampling": "uniform"}}
        video, text = request["messages"][0]["content"]
        assert base64.b64decode(video["video_url"]["url"].split(",")[1]) == CLIP.read_bytes()
        assert text["text"] == "Who wakes?"
    for words in ("A [bold]rabbit[/] wakes.", "Who knows?", "900", "400", "55.6 %", "timeline.png"):
        assert words in out, words
    results = json.loads((tmp_path / "a/b/report.json").read_text())
    (only,) = results["questions"]
    assert only["metok"]["report"] == report
    assert only["off"]["prompt_tokens"] == 900
    assert (tmp_path / "a/b/timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_of_questions_is_asked_and_judged(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "sheet.jsonl"
    rows = [
        {"video": CLIP.name, "question": "Who wakes?", "answer": "A [bold]rabbit[/] wakes."},
        {"video": CLIP.name, "question": "?", "prompt": "Who?\nA. me\nB. you", "options": ["me", "you"], "answer": "B"},
        {"video": "other.mp4", "question": "Not about this video."},
    ]
    sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(Stub(report=report)) as stub:
        own = ["--frames", "8", "--out", str(tmp_path / "out")]
        status = main(["demo", "--url", stub.url, "--video", str(CLIP), "--questions", str(sheet), *own])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    asked = [request["messages"][0]["content"][1]["text"] for request in stub.asked]
    assert asked == ["Who wakes?", "Who wakes?", "Who?\nA. me\nB. you", "Who?\nA. me\nB. you"]
    assert "Right: 1 of 2 with METok, 0 of 2 without." in out
    assert out.count("(wrong)") == 3
    assert [q["right"] for q in json.loads((tmp_path / "out/report.json").read_text())["questions"]] == [
        "A [bold]rabbit[/] wakes.",
        "B",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no question."),
        ("[1]", "Line 1 of {} is no question: Input should be an object."),
        ('{"video": "a.mp4"}', "Line 1 of {} asks nothing."),
        ('{"video": 3, "question": "Who?"}', "is no question: video: Input should be a valid string."),
        ('{"video": "a.mp4", "question": "Who?", "options": ["me"]}', 'has options: state "prompt"'),
        ('{"video": "a.mp4", "question": "Who?"}', "Cannot read the video"),
    ],
)
def test_unusable_questions_are_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sheet = tmp_path / "sheet.jsonl"
    sheet.write_text(text)
    own = ("--out", str(tmp_path / "out"))
    assert said.format(sheet) in refused(capsys, "--url", "http://127.0.0.1:1", "--questions", str(sheet), *own)
    missing = tmp_path / "none.jsonl"
    assert refused(capsys, "--url", "http://127.0.0.1:1", "--questions", str(missing), *own) == (
        f"Cannot read the questions {missing}: No such file or directory."
    )


def test_a_server_of_another_kind_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ("--frames", "2", "--out", str(tmp_path))
    with serving(Stub()) as stub:
        assert "no METok report" in refused(capsys, "--url", stub.url + "/v1/", *out)
    untrusted = {"error": {"message": "Per-request mm_processor_kwargs are disabled\nby default.", "code": 400}}
    with serving(Stub(refuse=(400, untrusted))) as stub:
        said = refused(capsys, "--url", stub.url, *out)
    assert said.endswith("(HTTP 400): Per-request mm_processor_kwargs are disabled by default.")
    with serving(Stub(refuse=(200, b"<html>hello</html>"))) as stub:
        assert "--plugin metok" in refused(capsys, "--url", stub.url, *out)
    with serving(Stub(report=[1])) as stub:
        assert "no METok report" in refused(capsys, "--url", stub.url, *out)
    with serving(Stub(report={"videos": []})) as stub:
        assert "not one that this version understands" in refused(capsys, "--url", stub.url, *out)
    with serving(Stub(models=[])) as stub:
        assert "serves no model" in refused(capsys, "--url", stub.url, *out)
    assert "No server answers at" in refused(capsys, "--url", f"http://127.0.0.1:{free_port()}", *out)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://[::1", "http://host:99999"])
def test_an_impossible_address_is_refused(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "must look like http://localhost:8000" in refused(
        capsys, "--url", url, "--frames", "2", "--out", str(tmp_path)
    )


def test_an_unusable_video_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "notes.mp4"
    text.write_text("not a video")
    missing = tmp_path / "none.mp4"
    assert refused(capsys, "--video", str(missing)) == f"Cannot read the video {missing}: No such file or directory."
    assert refused(capsys, "--video", str(tmp_path)) == f"Cannot read the video {tmp_path}: Is a directory."
    assert refused(capsys, "--video", str(text)).startswith(f"Cannot use {text} as a video: ")
    assert refused(capsys, "--question", "  ") == "The question is empty."


def test_an_unusable_model_or_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "file"
    file.touch()
    out = ("--frames", "2", "--out", str(tmp_path / "out"))
    assert "has no config.json" in refused(capsys, "--model", str(tmp_path), *out)
    assert "is a file" in refused(capsys, "--model", str(file), *out)
    assert refused(capsys, "--model", str(tmp_path / "none"), *out).startswith("There is no model folder")
    assert "Cannot write" in refused(capsys, "--frames", "2", "--out", str(file / "out"))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serve"],
        ["demo", "--frames", "0"],
        ["demo", "--frames", "1025"],
        ["demo", "--frames", "many"],
        ["demo", "--url", "http://a", "--model", "b"],
        ["demo", "--question", "Who?", "--questions", "file"],
        ["demo", "--colour"],
        ["models", "all"],
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_models_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert SUPPORTED
    assert all(supported.stock in out for supported in SUPPORTED)


def test_a_trained_model_that_comes_along_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_choice, "TRAINED", tmp_path / "model")
    stand_in = choose_model(None, tmp_path)
    assert "RANDOM" in stand_in.note
    assert (Path(stand_in.checkpoint) / "model.safetensors").is_file()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    trained = choose_model(None, tmp_path)
    assert trained.checkpoint == str(tmp_path / "model")
    assert "toy world" in trained.note
    assert trained.flags != stand_in.flags
    assert choose_model("org/some-model_7b.v1", tmp_path).note == ""


def test_without_matplotlib_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Serving does not need it, so it may not be there."""
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert refused(capsys) == "The demo draws with matplotlib: pip install matplotlib."
