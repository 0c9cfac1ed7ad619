"""The file of a profile: what it may say, and which words answer what it may not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.contract.profile import SETTABLE, read_profile, told, write_profile
from metok_vllm.contract.settings import SERVER_ONLY, MetokSettings
from tests.support.profiles import a_profile


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    write_profile(path, a_profile())
    assert read_profile(path) == a_profile()
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda stated: stated.__setitem__(key, value)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a later format": (
        change("format", 2),
        "has the format 2, and this version reads 1: make it again with metok calibrate.",
    ),
    "a format that is true": (
        change("format", True),
        "has the format True, and this version reads 1: make it again with metok calibrate.",
    ),
    "no format": (
        lambda stated: stated.pop("format"),
        "has the format None, and this version reads 1: make it again with metok calibrate.",
    ),
    "an unknown key": (change("colour", 1), "is wrong at 'colour': Extra inputs are not permitted."),
    "a missing key": (lambda stated: stated.pop("vllm"), "is wrong at 'vllm': Field required."),
    "a setting of the server's": (
        lambda stated: stated["settings"].update(video_memory_mib=64),
        "is wrong at 'settings': a profile does not state 'video_memory_mib'.",
    ),
    "an impossible setting": (
        lambda stated: stated["settings"].update(keep_ratio=2),
        "is wrong at 'settings': METok (profile): 'keep_ratio' got 2: input should be less than or equal to 1.",
    ),
    "an agreement above all": (
        lambda stated: stated["measured"].update(agreement=1.2),
        "is wrong at 'measured.agreement': Input should be less than or equal to 1.",
    ),
    "a hash that is none": (
        lambda stated: stated["mark"].update(config_sha256="abc"),
        "is wrong at 'mark.config_sha256': String should match pattern '^[0-9a-f]{64}$'.",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    stated = a_profile().model_dump(mode="json")
    spoil, sentence = WRONG[what]
    spoil(stated)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=r"^METok: ") as refused:
        read_profile(path)
    assert str(refused.value) == f"METok: the profile {path} {sentence}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path / "gone.json", "cannot be read: No such file or directory."),
        (tmp_path, "cannot be read: Is a directory."),
    ):
        with pytest.raises(ValueError, match=r"^METok: ") as refused:
            read_profile(path)
        assert str(refused.value) == f"METok: the profile {path} {sentence}"
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "p.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"is no JSON file\.$"):
            read_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("[]")
    with pytest.raises(ValueError, match="has the format None"):
        read_profile(tmp_path / "p.json")


def test_it_may_state_the_methods_settings_alone() -> None:
    others = {"preset", "stages", "aligner_model", *SERVER_ONLY} - {"prune_layers", "kv_layers"}
    assert set(SETTABLE) == set(MetokSettings.model_fields) - others


def test_it_is_told_with_what_is_overridden() -> None:
    said = told(a_profile().summary("p.json", ("events", "keep_ratio")))
    assert said == (
        "profile p.json: 96.9 % of the answers to 32 unseen questions agreed [95 % interval 84.3 to 99.4]; "
        "overridden: events, keep_ratio"
    )
    assert "overridden" not in told(a_profile().summary("p.json", ()))
    generic = a_profile().model_copy(update={"generic_questions": True})
    assert " unseen generic questions agreed" in told(generic.summary("p.json", ()))
