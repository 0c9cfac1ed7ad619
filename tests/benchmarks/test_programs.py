"""Every program starts by its name, as README.md and the Makefile call it."""

from __future__ import annotations

import runpy
import sys

import pytest

from benchmarks.common.paths import ROOT

FOLDERS = sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/__main__.py"))


def test_every_program_has_a_folder() -> None:
    assert FOLDERS == ["accuracy", "engine", "gpu", "kernels", "media", "witness"]


# A module that another test has imported is run anew all the same, which Python warns of.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", [*FOLDERS, "accuracy.kept", "witness.engine", "witness.calibrated"])
def test_a_program_starts_by_its_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{name} ")
