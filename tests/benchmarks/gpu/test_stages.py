"""What is called on a machine with a GPU is there and takes its arguments;
what is broken there is gone without; what is left is done in a second call.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.paths import ROOT
from benchmarks.engine import cli as engine_cli
from benchmarks.engine.families import QWEN2_5_VL, QWEN3_VL
from benchmarks.engine.variants import variants
from benchmarks.gpu import cli
from benchmarks.gpu.fallback import NO_FLASH_ATTENTION, SAFE
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.stages import SMALL, stages
from benchmarks.kernels import cases
from benchmarks.kernels import cli as kernels_cli
from tests.benchmarks.gpu.conftest import Calls
from tests.benchmarks.models import llava, qwen
from tests.support.server import warm

States = Callable[[], dict[str, str]]
OF_PRUNED_MODELS = [
    *("qwen2.5-stock", "qwen2.5-evs", "qwen2.5-paper", "qwen2.5-more", "qwen2.5-fewer"),
    *("qwen3-stock", "qwen3-evs", "qwen3-paper", "qwen3-vidcom2", "qwen3-more", "qwen3-fewer"),
]
ENGINES = [
    *("engine-tiny", "default-stock", "default-paper", "quiet", *OF_PRUNED_MODELS, "eager", "default-more"),
    *("eager-more", "0.5b"),
]
BESIDE_PRUNING = {
    "qwen2.5-vl-7b": ["stock", "evs-mean", "metok-paper", "evs-stage1,metok-balanced", "fewer-frames"],
    "qwen3-vl-8b": [
        "stock", "evs-mean", "metok-paper", "vidcom2-mean,vidcom2-stage1", "evs-stage1,metok-balanced", "fewer-frames",
    ],
}  # fmt: skip


def engines(made: list[list[str]]) -> list[Any]:
    """The command lines of the engine benchmark among the calls, as it reads them itself."""
    return [engine_cli.arguments(call[2:]) for call in made if call[:2] == ["-m", "benchmarks.engine"]]


def test_every_stage_calls_what_is_there(calls: Calls, states: States) -> None:
    code, made = calls()
    assert code == 0
    names = [stage.name for stage in stages(Folder(Path("x")), False, "7b")]
    assert len(made) == len(names)
    assert states() == dict.fromkeys(names, "ok")
    models = {"qwen2.5-vl-7b": qwen(QWEN2_5_VL), "qwen3-vl-8b": qwen(QWEN3_VL)}
    found = engines(made)
    for call in found:
        known = {variant.name for variant in variants(models.get(call.model, llava()), call.frames)}
        assert call.no_plots
        assert set(call.variants or known) <= known
    assert [(call.model, call.eager, call.variants, call.out.name) for call in found] == [
        ("tiny", True, ["metok-paper"], "engine-tiny-check.json"),
        ("7b", False, ["stock"], "engine-7b.json"),
        ("7b", False, ["metok-paper"], "engine-7b.json"),
        ("tiny", False, ["stock", "metok-paper"], "engine-quiet.json"),
        *(
            (model, False, together.split(","), f"engine-{model}.json")
            for model, stages_ in BESIDE_PRUNING.items()
            for together in stages_
        ),
        ("7b", True, ["stock", "metok-paper"], "engine-7b-eager.json"),
        ("7b", False, ["metok-balanced", "fewer-frames"], "engine-7b.json"),
        ("7b", True, ["metok-balanced", "fewer-frames"], "engine-7b-eager.json"),
        ("0.5b", True, ["stock", "metok-paper"], "engine-0.5b-eager.json"),
    ]
    at_size = [call for call in found if call.model == "7b"]
    assert all(call.merge and not call.no_breakdown for call in at_size)
    assert {(call.frames, call.text_tokens, *call.concurrency) for call in at_size} == {(64, 200, 1, 32)}
    beside = [call for call in found if call.model in BESIDE_PRUNING]
    assert all(call.merge and not call.no_breakdown and not call.counts for call in beside)
    assert {(call.frames, call.text_tokens, *call.concurrency) for call in beside} == {(128, 200, 1, 8, 32)}
    for model, described in models.items():  # one file a model holds all its variants
        run = {name for call in beside if call.model == model for name in call.variants}
        assert run == {variant.name for variant in variants(described, 128)}
    measured = [kernels_cli.arguments(call[2:]) for call in made if call[:2] == ["-m", "benchmarks.kernels"]]
    assert [(call.out.name, call.no_compile) for call in measured] == [
        ("kernels-gpu.csv", True),
        ("kernels-gpu-compile.csv", False),
    ]
    programs = [call[0] for call in made if call[0] != "-m"]
    assert programs
    assert all((ROOT / program).is_file() for program in programs)


def test_its_tests_are_those_that_need_a_gpu(calls: Calls, tmp_path: Path) -> None:
    _, made = calls("kernel-tests", "engine-oracle", "qwen-oracle")
    tests = [call for call in made if call[:2] == ["-m", "pytest"]]
    assert len(tests) == 3
    pytest_script, log = Path(sys.executable).with_name("pytest"), tmp_path / "found"
    for call in tests:
        (path,) = (word for word in call if word.startswith("tests/"))
        asked = (*call[2:], "--rootdir", str(ROOT), "--collect-only", "--strict-markers")
        assert warm.start(pytest_script, *asked, env=dict(os.environ), log=log).wait(120) == 0
        found = log.read_text()
        names = {line.split("::")[0] for line in found.splitlines() if "::" in line}
        if path.endswith(".py"):
            assert found.count("::") == 1, found
        else:  # a module a kernel, what compiles all of them at start, and no other: those are marked no_gpu
            operations = dict.fromkeys(case.op for case in cases.cases(True, torch.device("cpu")))
            assert names == {f"{path}/test_{name}.py" for name in (*operations, "warm_up")}


def test_a_model_of_ones_own_is_measured_in_its_place(calls: Calls, tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    with pytest.raises(SystemExit) as refused:
        calls("--model", str(folder))
    assert refused.value.code == 2
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    _, made = calls("--model", str(folder))
    assert {call.model for call in engines(made)} == {"tiny", str(folder)}
    assert {call.out.name for call in engines(made) if call.model != "tiny"} == {
        "engine-my-model.json", "engine-my-model-eager.json",
    }  # fmt: skip


def test_the_smallest_form_needs_no_gpu(calls: Calls, states: States) -> None:
    _, made = calls("--small")
    assert list(states()) != []
    assert set(states()) == set(SMALL)
    assert {call.model for call in engines(made)} == {"tiny"}
    _, named = calls("--small", *ENGINES)
    assert {call.model for call in engines(named)} == {"tiny", "qwen2.5-vl-tiny", "qwen3-vl-tiny"}
    assert {call.frames for call in engines(named) if "qwen" in call.model} == {8}
    assert len(named) == len(ENGINES)


def test_an_engine_that_fails_is_tried_without_what_may_be_broken(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, made = calls(broken="engine")
    first, again, *later = engines(made)
    (quiet,) = (call for call in later if call.out.name == "engine-quiet.json")
    later.remove(quiet)
    assert first.engine_option == {}
    assert first.out == again.out
    assert again.engine_option == SAFE
    assert quiet.engine_option == {**SAFE, "jit_monitor_mode": "error"}
    assert [call.engine_option for call in later] == [SAFE] * (6 + len(OF_PRUNED_MODELS))
    assert code == 0
    assert "engines from here on" in capsys.readouterr().out
    assert "Engines ran with" not in (tmp_path / "out" / "report.md").read_text()  # no machine.json: nothing is said
    assert json.loads((tmp_path / "out" / "engine-option.json").read_text()) == SAFE


def test_an_engine_that_fails_either_way_is_not_held_back_for_good(calls: Calls) -> None:
    code, made = calls(broken="always")
    assert code == 1
    options = [call.engine_option for call in engines(made)]
    assert options == [*({}, SAFE, {}, {}, {"jit_monitor_mode": "error"}, *[{}] * len(OF_PRUNED_MODELS), *[{}] * 4)]


def test_without_flash_attention_no_engine_takes_it(calls: Calls, states: States) -> None:
    code, made = calls(broken="FlashAttention")
    assert code == 1
    assert states()["smoke-lib"] == "failed (1)"
    options = [call.engine_option for call in engines(made)]
    assert options[0] == NO_FLASH_ATTENTION
    assert all(NO_FLASH_ATTENTION.items() <= option.items() for option in options)


def test_a_model_that_runs_only_with_less_takes_the_rest_with_it(calls: Calls, states: States) -> None:
    _, made = calls(broken="llm")
    assert sum(call[-1] == "llm" for call in made) == 2
    assert states()["smoke-llm"] == "ok"  # the second time
    assert engines(made)[0].engine_option == SAFE


def test_a_second_call_goes_on_and_named_stages_run_again(calls: Calls) -> None:
    calls("machine", "kernels", broken="")
    _, made = calls()
    assert not any("benchmarks.kernels" in call and "--no-compile" in call for call in made)
    assert len(engines(made)) == len(ENGINES)
    assert calls()[1] == []
    _, made = calls("smoke-llm")
    assert [call[1] for call in made] == ["llm"]
    _, made = calls("kernels", broken="machine")
    assert len(made) == 1  # the machine was asked before


def test_a_machine_of_no_use_ends_it_at_once(calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, made = calls(broken="machine")
    assert code == 2
    assert len(made) == 1
    assert "there is no GPU here" in capsys.readouterr().out
    assert len(calls("kernels", broken="machine")[1]) == 1  # asked again, however one begins
    assert "there is no GPU here" in (tmp_path / "out" / "report.md").read_text()


def test_where_stock_does_not_run_no_engine_is_started(
    calls: Calls, states: States, capsys: pytest.CaptureFixture[str]
) -> None:
    # On 2026-11-28 a package was missing: every engine ended with the same error, eight times.
    code, made = calls(broken="vllm")
    assert code == 1
    assert sum(call[-1] == "llm" for call in made) == 2
    assert engines(made) == []
    assert "kernel-tests" in states()
    assert "skipped: vLLM does not run here without METok either" in capsys.readouterr().out
    assert engines(calls(broken="vllm")[1]) == []  # nor in a second call
    assert len(engines(calls("default-stock", broken="vllm")[1])) == 1  # unless one insists
    calls("smoke-llm")
    assert len(engines(calls()[1])) == len(ENGINES) - 1


def test_no_time_is_said_and_the_most_valuable_goes_first(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls("machine")
    _, made = calls("--seconds", "60")
    printed = capsys.readouterr().out
    assert re.search(r"default-more .* skipped: needs 248 s, [56]\d s are left", printed)
    assert "not begun: default-stock default-paper quiet" in printed
    (tiny,) = engines(made)
    assert 30 < tiny.timeout <= 41  # four fifths of what is left


def test_a_stage_has_its_own_limit_and_more_where_nobody_hurries(calls: Calls) -> None:
    calls("machine")
    assert engines(calls("--seconds", "400", "engine-tiny")[1])[0].timeout == 0.8 * 120
    whole = {call.out.name: call.timeout for call in engines(calls("eager")[1])}
    assert whole["engine-7b-eager.json"] == 0.8 * 4 * 400


def test_an_unknown_stage_is_refused(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert calls("kernls") == (2, [])
    assert "no stage kernls; there are: machine smoke-lib" in capsys.readouterr().out
    assert cli.main(["--list"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["machine", "smoke-lib"]


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (["PYTHON=python9"], "python9 -m benchmarks.gpu"),
        (["PYTHON=p", "MODEL=my model", "STAGES=kernels eager"], "p -m benchmarks.gpu --model my model kernels eager"),
        (["SMALL=1"], ".venv/bin/python -m benchmarks.gpu --small"),
    ],
)  # fmt: skip
def test_make_calls_it(given: list[str], called: str) -> None:
    # `make test` runs this test, and one make inside another says where it is.
    command = ["make", "-n", "--no-print-directory", "gpu-report", *given]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = said.stdout.replace("\\\n", "").replace('"', "").splitlines()
    assert " ".join(lines[-1].split()) == called
    # Only the smallest form takes the environment that make sets up: it is one for a CPU.
    assert any("setup.sh" in line for line in lines) == ("SMALL=1" in given)
