"""Which code a figure comes from: the checkout, else what was said to whoever has none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.common.provenance import commit, versions


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METOK_COMMIT", raising=False)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "One")
    return tmp_path


def test_a_checkout_is_asked_before_a_file(checkout: Path) -> None:
    short = git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "COMMIT").write_text("7654321")
    assert commit(checkout) == short  # a file that git does not know makes nothing dirty
    (checkout / "file").write_text("2")
    assert commit(checkout) == f"{short}-dirty"


def test_what_is_stated_comes_before_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder that was sent to a GPU machine lay there beside a .git of an earlier commit (2026-11-28).
    monkeypatch.setenv("METOK_COMMIT", "1234567")
    assert commit(checkout) == "1234567"


def test_a_tarball_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("7654321\n")
    assert commit(tmp_path) == "7654321"
    monkeypatch.setenv("METOK_COMMIT", "1234567")
    assert commit(tmp_path) == "1234567"
    monkeypatch.setenv("METOK_COMMIT", "")
    assert commit(tmp_path) == "7654321"


def test_a_tarball_inside_another_repository_is_not_that_repository(checkout: Path) -> None:
    (checkout / "sent").mkdir()
    assert commit(checkout / "sent") == "unknown"


def test_where_git_is_missing_or_refuses_the_statement_counts(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "COMMIT").write_text("7654321")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        assert commit(checkout) == "7654321"
    (checkout / ".git" / "HEAD").unlink()  # to git, no repository any more
    assert commit(checkout) == "7654321"


def test_versions_are_of_what_is_imported() -> None:
    import numpy
    import torch

    found = versions()
    assert (found["numpy"], found["torch"]) == (numpy.__version__, torch.__version__)
