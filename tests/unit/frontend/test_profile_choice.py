"""Which profile rules a server, which model it is for, and what is said where none rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.contract.profile import NAME, write_profile
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.frontend import profile_choice
from metok_vllm.frontend.fingerprint import PIECE, fingerprint
from metok_vllm.frontend.profile_choice import choose_profile, warn_uncalibrated
from tests.support.profiles import a_profile

Make = Callable[..., Any]
FOUND: dict[str, Any] = {
    "prune_layers": [1, 2, 4], "keep_ratio": 0.25, "quota": "video", "decode_retention": 0.5, "strides": [2, 2, 4],
}  # fmt: skip


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to put files into."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {"info": [], "warning": []}
    for level, kept in lines.items():
        monkeypatch.setattr(
            f"logging.Logger.{level}",
            lambda self, text, *args, kept=kept, **_: kept.append(text % args if args else text),
        )
    return lines


def profile_of(model: Path, path: Path, **settings: Any) -> Path:
    write_profile(path, a_profile(fingerprint(model), **(settings or FOUND)))
    return path


def start(make_config: Make, model: Path, **settings: Any) -> Any:
    """The server's choices."""
    config = make_config(model=str(model), additional_config={"metok": settings})
    return server_choices(config.model_config.hf_config)


def test_a_profile_rules_and_says_how_well(make_config: Make, model: Path, tmp_path: Path, said: Any) -> None:
    path = profile_of(model, tmp_path / "p.json")
    choices = start(make_config, model, profile=str(path))
    assert choices.prune_layers == (1, 2, 4)
    assert {key: choices.settings.model_dump(mode="json")[key] for key in FOUND} == FOUND
    assert choices.profile["agreement"] == pytest.approx(31 / 32)
    assert any(line.startswith(f"METok: profile {path}: 96.9 % of the answers") for line in said["info"])
    assert not [line for line in said["warning"] if "calibrated" in line]


def test_one_in_the_models_folder_is_found_and_can_be_ignored(make_config: Make, model: Path) -> None:
    profile_of(model, model / NAME)
    assert start(make_config, model).settings.keep_ratio == 0.25
    ignored = start(make_config, model, profile="none")
    assert (ignored.settings.keep_ratio, ignored.profile) == (0.76, None)


def test_the_users_single_keys_win(make_config: Make, model: Path, tmp_path: Path) -> None:
    path = profile_of(model, tmp_path / "p.json")
    choices = start(make_config, model, profile=str(path), keep_ratio=0.5, events=3, strides=[2, 4, 8], key_frames=6)
    assert (choices.settings.keep_ratio, choices.settings.events, choices.settings.strides) == (0.5, 3, (2, 4, 8))
    assert choices.settings.decode_retention == 0.5
    assert choices.profile["overridden"] == ["events", "keep_ratio", "strides"], (
        "key_frames is what it was measured with"
    )


def test_what_a_profile_does_not_state_was_measured_as_its_default(
    make_config: Make, model: Path, tmp_path: Path
) -> None:
    path = profile_of(model, tmp_path / "p.json")
    choices = start(make_config, model, profile=str(path), key_frames=0, aligner="none", token_budget=64)
    assert choices.profile["overridden"] == ["aligner", "key_frames", "token_budget"]
    assert start(make_config, model, profile=str(path), videos_at_once=2).profile["overridden"] == []
    found = {"prune_layers": FOUND["prune_layers"], "aligner": "dual-tower"}
    assert profile_choice._overridden({"aligner_model": "tower"}, found) == ()
    assert profile_choice._overridden({"aligner_model": "tower"}, FOUND) == ("aligner_model",)


def test_a_preset_decides_what_it_is_about(make_config: Make, model: Path, tmp_path: Path) -> None:
    path = profile_of(model, tmp_path / "p.json", **{**FOUND, "quota": "event"})
    choices = start(make_config, model, profile=str(path), preset="balanced")
    assert (choices.settings.decode_retention, choices.settings.quota) == (1.0, "video")
    assert choices.settings.keep_ratio == 0.25
    paper = start(make_config, model, profile=str(path), preset="paper")
    assert (paper.settings.decode_retention, paper.settings.quota) == (0.0, "event")


def test_where_kv_is_kept_goes_by_the_users_rule(make_config: Make, model: Path, tmp_path: Path) -> None:
    path = profile_of(model, tmp_path / "p.json")
    choices = start(make_config, model, profile=str(path), kv_layers=[0, 2])
    assert (choices.window, choices.settings.decode_retention) == ((0, 2), 0)
    assert choices.profile["overridden"] == ["decode_retention", "kv_layers"]
    without = {key: value for key, value in FOUND.items() if key != "decode_retention"}
    path = profile_of(model, tmp_path / "q.json", kv_layers=[0, 2], **without)
    assert start(make_config, model, profile=str(path)).window == (0, 2)
    choices = start(make_config, model, profile=str(path), decode_retention=0.25)
    assert (choices.window, choices.settings.decode_retention) == (None, 0.25)
    for preset, share in (("balanced", 1), ("paper", 0)):
        choices = start(make_config, model, profile=str(path), preset=preset)
        assert (choices.window, choices.settings.decode_retention) == (None, share)
        assert choices.profile["overridden"] == ["kv_layers", "quota"]


def refused(make_config: Make, model: Path, **settings: Any) -> str:
    with pytest.raises(ValueError, match="METok: ") as error:
        start(make_config, model, **settings)
    (sentence,) = [line for line in str(error.value).splitlines() if "METok: " in line]
    return sentence[sentence.index("METok: ") :]


@pytest.mark.parametrize(
    ("file", "why"), [("config.json", "its config.json is another"), ("weights", "its weights are others")]
)
def test_a_profile_of_another_model_is_refused(
    make_config: Make, model: Path, tmp_path: Path, file: str, why: str
) -> None:
    path = profile_of(model, tmp_path / "p.json")
    if file == "config.json":
        (model / file).write_text((model / file).read_text() + "\n")
    else:  # a sister of the same shapes, with other numbers
        whole = model / "model.safetensors"
        data = bytearray(whole.read_bytes())
        data[-1] ^= 1
        whole.write_bytes(data)
    sentence = refused(make_config, model, profile=str(path))
    assert sentence.startswith(
        f"METok: the profile {path} was measured on some/model, and {model} is another model ({why}): make one with "
        "metok calibrate, or start with another 'profile' or \"none\"."
    )


def test_an_unreadable_one_is_refused_at_start(make_config: Make, model: Path, tmp_path: Path) -> None:
    assert refused(make_config, model, profile=str(tmp_path / "gone.json")).startswith(
        f"METok: the profile {tmp_path}/gone.json cannot be read: No such file or directory."
    )
    (model / NAME).write_text("{}")
    assert "has the format None" in refused(make_config, model)


def test_layers_that_the_model_has_not_are_refused(make_config: Make, model: Path, tmp_path: Path) -> None:
    path = profile_of(model, tmp_path / "p.json", prune_layers=[1, 2, 9])
    with pytest.raises(ValueError, match="prune_layers must be three increasing numbers"):
        start(make_config, model, profile=str(path))


def test_a_model_that_nobody_has_calibrated_gets_one_warning(make_config: Make, model: Path, said: Any) -> None:
    start(make_config, model)
    (line,) = [line for line in said["warning"] if "calibrated" in line]
    assert line.endswith(f"To find its own: metok calibrate {model} --videos FOLDER")


@pytest.mark.parametrize("layers", [[1, 2, 3], "cheap"])
def test_who_states_layers_gets_none(make_config: Make, model: Path, said: Any, layers: Any) -> None:
    start(make_config, model, prune_layers=layers)
    assert not [line for line in said["warning"] if "calibrated" in line]


@pytest.mark.parametrize(
    ("family", "layers", "hidden", "warned"),
    [
        ("LlavaOnevisionForConditionalGeneration", 28, 3584, False),
        ("LlavaQwenForCausalLM", 28, 3584, False),
        ("LlavaOnevisionForConditionalGeneration", 24, 896, True),
        ("LlavaOnevisionForConditionalGeneration", 28, 1536, True),
        ("Qwen2_5_VLForConditionalGeneration", 28, 3584, True),
    ],
)
def test_the_papers_models_get_none(said: Any, family: str, layers: int, hidden: int, warned: bool) -> None:
    warn_uncalibrated("m", (family,), layers, hidden)
    assert bool(said["warning"]) == warned


def test_a_hub_names_profile_lies_in_its_snapshot(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile_of(model, model / NAME)
    monkeypatch.setattr(profile_choice, "model_folder", lambda name, revision: model)
    chosen = choose_profile({}, "some/model", None)
    assert chosen is not None
    assert chosen.path == model / NAME


def test_a_name_without_a_config_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str, revision: str | None) -> Path:
        raise ValueError("there is no config.json")

    monkeypatch.setattr(profile_choice, "model_folder", nothing)
    assert choose_profile({}, "some/model", None) is None


def test_without_the_weights_the_config_alone_is_compared_and_it_is_said(
    model: Path, tmp_path: Path, said: Any
) -> None:
    path = profile_of(model, tmp_path / "p.json")
    (model / "model.safetensors").unlink()
    assert fingerprint(model).weights_sha256 is None
    assert choose_profile({"profile": str(path)}, str(model), None) is not None
    assert any("config.json alone" in line for line in said["warning"])


# --- the fingerprint ---


def safetensors(path: Path, data: bytes, header: bytes = b'{"a": 1}') -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_a_mark_tells_files_headers_and_data_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = bytes(8 * PIECE)
    marks = set()
    for header in (b'{"a": 1}', b'{"b": 1}'):
        for place in (None, 0, 4 * PIECE, 8 * PIECE - 1):
            changed = bytearray(data)
            if place is not None:
                changed[place] = 1
            safetensors(tmp_path / "model.safetensors", bytes(changed), header)
            marks.add(fingerprint(tmp_path).weights_sha256)
    assert len(marks) == 8
    safetensors(tmp_path / "model.safetensors", data)
    assert fingerprint(tmp_path) == fingerprint(tmp_path)


def test_of_several_files_each_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "b", "y": "a", "z": "a"}}))
    safetensors(tmp_path / "a", b"12")
    assert fingerprint(tmp_path).weights_sha256 is None, "one of two is not there"
    safetensors(tmp_path / "b", b"12")
    before = fingerprint(tmp_path)
    safetensors(tmp_path / "b", b"13")
    assert before.weights_sha256 != fingerprint(tmp_path).weights_sha256


def test_a_file_that_is_no_checkpoints_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="METok cannot tell which model is in"):
        fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        fingerprint(tmp_path)
