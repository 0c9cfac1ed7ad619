"""`python -m benchmarks.kernels` in the interpreter: it checks everything,
times nothing, and refuses to report on red.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kernels import cases, cli

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of this process are compiled")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sets this variable or takes it away; afterwards it is as it was."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_interpreter_rows_carry_no_times(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    assert cli.main(["--small", "--interpret", "--out", str(out)]) == 0
    first = rows(out)
    assert {row["op"] for row in first} == {
        "event_similarity", "tiered_pool", "text_to_visual_scores", "smooth_by_frame", "select_per_event", "gather_rows",
        "deep_slots",
    }  # fmt: skip
    for row in first:
        assert row["mode"] == "interpreter"
        assert row["torch"] == torch.__version__
        figures = cli.COLUMNS[cli.COLUMNS.index("p20_us") :]
        assert [row[name] for name in figures] == [""] * len(figures)
    two = ["gather_rows", "select_per_event"]
    assert cli.main(["--small", "--interpret", "--only", *two, "--out", str(out)]) == 0
    appended = rows(out)[len(first) :]
    assert sorted(row["op"] for row in appended) == two


@pytest.mark.parametrize("broken", ["run", "plain"])
def test_a_wrong_result_reports_nothing_of_its_operation(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = cases.cases

    def with_an_error(small: bool, device: torch.device) -> Iterator[Any]:
        for case in build(small, device):
            if case.op == "gather_rows":
                yield case  # a case that is right, before one that is not
                right = getattr(case, broken)
                case = replace(case, **{broken: lambda right=right: (right()[0] + 1e-3, *right()[1:])})
            yield case

    monkeypatch.setattr(cases, "cases", with_an_error)
    out = tmp_path / "kernels.csv"
    assert cli.main(["--small", "--interpret", "--out", str(out)]) == 1
    assert {row["op"] for row in rows(out)} == {case.op for case in build(True, torch.device("cpu"))} - {"gather_rows"}
    said = capsys.readouterr().err
    assert "gather_rows is wrong or cannot run" in said
    assert "Greatest absolute difference" in said


def test_an_operation_that_cannot_run_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = cases.cases

    def fails() -> Any:
        raise RuntimeError("no such kernel")

    def with_a_failure(small: bool, device: torch.device) -> Iterator[Any]:
        return (replace(case, run=fails) if case.op == "tiered_pool" else case for case in build(small, device))

    monkeypatch.setattr(cases, "cases", with_a_failure)
    out = tmp_path / "kernels.csv"
    assert cli.main(["--small", "--interpret", "--out", str(out)]) == 1
    assert {row["op"] for row in rows(out)} == {case.op for case in build(True, torch.device("cpu"))} - {"tiered_pool"}
    assert "RuntimeError: no such kernel" in capsys.readouterr().err


def test_rows_are_written_case_by_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the run early keeps what is done, within an operation too."""
    done: list[str] = []

    def interpreted(case: Any) -> list[dict[str, Any]]:
        if len(done) == 1:  # its second case
            raise KeyboardInterrupt
        done.append(case.shape)
        return [{"op": case.op, "shape": case.shape, "implementation": "metok"}]

    monkeypatch.setattr(cli, "interpreted", interpreted)
    out = tmp_path / "kernels.csv"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["--small", "--interpret", "--only", "tiered_pool", "--out", str(out)])
    assert [row["shape"] for row in rows(out)] == done
    assert len(done) == 1


def test_an_unknown_operation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no operation gather; there are event_similarity"):
        cli.main(["--small", "--interpret", "--only", "gather", "gather_rows", "--out", str(tmp_path / "kernels.csv")])


def test_rows_of_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of a row, with a clock that says 100 us for ours and 50 us for plain torch."""
    case = next(case for case in cases.cases(True, torch.device("cpu")) if case.op == "event_similarity")
    case = replace(case, bytes=10**6, flops=10**9)
    monkeypatch.setattr(cli, "time_us", lambda f, *_: (90.0, 100.0, 110.0) if f is case.run else (40.0, 50.0, 60.0))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    measured = cli.measure(case, 1, None, copy=20.0, matmul=100.0)
    assert [row["implementation"] for row in measured] == ["metok", "torch", "torch.compile"]
    assert all(set(row) <= set(cli.COLUMNS) for row in measured)
    mine = measured[0]
    assert (mine["gigabytes_per_s"], mine["share_of_copy"]) == ("10.0", "0.500")
    assert (mine["teraflops_per_s"], mine["share_of_matmul"]) == ("10.000", "0.1000")
    assert cli.summary(case, measured).endswith("plain torch is faster: use it")
    assert "faster" not in cli.summary(case, measured[:1])
    assert cli.measure(case, 1, None, copy=20.0, matmul=100.0, compiled=False) == measured[:2]


def test_no_gpu_is_said_and_nothing_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.csv"
    assert cli.main(["--out", str(out)]) == 2
    assert not out.exists()
    assert "--small --interpret" in capsys.readouterr().err


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "kernels.csv"
    out.write_text("date,op\n")
    with pytest.raises(SystemExit, match="has other columns"):
        cli.append(out, [])
    assert out.read_text() == "date,op\n"
