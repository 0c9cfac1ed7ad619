"""What the page says of a machine's figures, and what it says where there are none."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import report as engine_report
from benchmarks.engine.families import QWEN3_VL
from benchmarks.engine.variants import variants
from benchmarks.gpu import goals, report
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.goals import GOALS, Results
from benchmarks.gpu.stages import stages
from benchmarks.kernels.cli import COLUMNS
from tests.benchmarks.models import llava, qwen

Raw = Callable[..., dict[str, Any]]
Write = Callable[..., str]

MACHINE = {
    "commit": "1234abc", "nvidia_smi": "NVIDIA H200, 143771 MiB", "versions": {"vllm": "0.32.0", "torch": "2.11.0"},
    "hardware": {"device": "NVIDIA H200", "cuda": "13.0", "cpu": "a CPU", "cores": 16},
}  # fmt: skip


def engine(raw: Raw, factors: dict[str, float], concurrencies: tuple[int, ...] = (1, 32)) -> dict[str, Any]:
    """A result of the engine benchmark; everything of a variant takes `factors` times as long as stock's."""
    entries: dict[str, Any] = {}
    for variant in variants(llava(), 64):
        if variant.name in factors:
            figures = raw(factors[variant.name], scoring=0.7 * (variant.metok is not None))
            figures["tokens"], figures["start_s"] = {"prompt_tokens": 12_745, "text_tokens": 200}, 33.0
            for level, concurrency in zip(figures["levels"], concurrencies, strict=True):
                level["concurrency"] = concurrency
            entry = {
                "label": variant.label,
                "file_decode_ms": {"median": 100.0},
                **engine_report.summarise(figures, 28),
            }
            entries[variant.name] = {**entry, "request_ms": engine_report.request_ms(entry)}
    return {
        "claim": "7b, made-up weights", "commit": "1234abc", "versions": MACHINE["versions"],
        "hardware": {"device": "NVIDIA H200", "load_average": 0.0, "cores": 16},
        "workload": {
            "model": "7b", "weights": "random", "frames": 64, "frame_size": [384, 384], "text_tokens": 200,
            "max_tokens": 64, "engine": {"enforce_eager": False},
        },
        "variants": entries, "ratios_to_stock": engine_report.ratios(entries),
    }  # fmt: skip


def kernel_rows(path: Path, shares: dict[str, list[float]], implementation: str = "metok") -> None:
    """A row a case; each is compared with a copy that would take 100 us."""
    blank = dict.fromkeys(COLUMNS, "")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for op, listed in shares.items():
            for index, share in enumerate(listed):
                row = {"op": op, "shape": f"case {index}", "mode": "gpu", "implementation": implementation}
                writer.writerow({**blank, **row, "p50_us": f"{100 / share:.2f}", "share_of_copy": f"{share:.3f}"})


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "out")
    made.make()
    return made


@pytest.fixture
def write(folder: Folder) -> Write:
    def written(plots: bool = False) -> str:
        return report.write(folder, list(stages(folder, False, "7b")), "7b", plots).read_text()

    return written


def line(page: str, start: str) -> list[str]:
    """The cells of the one row that begins so."""
    (found,) = re.findall(rf"^\| {re.escape(start)} \|.*$", page, re.MULTILINE)
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_where_nothing_ran_every_goal_is_not_measured(write: Write) -> None:
    page = write()
    rows = goals.rows(Results({}, {}, []), gpu=True)
    assert len(rows) == len(GOALS) == 8
    assert {row[2] for row in rows} == {"not measured"}
    assert {row[3] for row in rows} == {""}
    assert page.count("| not run |") == len(list(stages(Folder(Path("x")), False, "7b")))
    assert "The machine was not asked" in page


def test_goals_that_are_met_and_missed(raw: Raw, folder: Folder, write: Write) -> None:
    """All of METok takes a fifth of stock's time: every goal but KV capacity and the second kernel's."""
    folder.machine.write_text(json.dumps(MACHINE))
    folder.engine("7b").write_text(json.dumps(engine(raw, {"stock": 1.0, "metok-paper": 0.1999})))
    kernel_rows(folder.kernels[0], {"event_similarity": [0.95, 0.81], "tiered_pool": [0.9, 0.79], "gather_rows": [0.1]})
    page = write()
    assert "| Device | NVIDIA H200 |" in page
    assert "vllm 0.32.0, torch 2.11.0" in page
    expected = [
        ("Prefill of the language model", "4.90 times", "**not met**"),  # scoring is METok's alone
        ("First token, without processing of the frames", "5.00 times", "met"),
        ("Decode step, one request", "0.20 times", "met"),
        ("Decode step, 32 requests", "0.20 times", "met"),
        ("Requests in the same KV memory", "5.00 times", "**not met**"),
        ("Kernel `event_similarity`", "81.0%", "met"),
        ("Kernel `tiered_pool`", "79.0%", "**not met**"),
        ("Scoring and selection", "2.0%", "met"),
    ]
    for what, measured, verdict in expected:
        assert line(page, what)[2:4] == [measured, verdict], what


@pytest.mark.parametrize(("factor", "verdict"), [(1.049, "met"), (1.051, "**not met**")])
def test_a_decode_step_may_take_a_twentieth_more(factor: float, verdict: str, raw: Raw) -> None:
    result = engine(raw, {"stock": 1.0, "metok-paper": factor})
    rows = {row[0]: row for row in goals.rows(Results(result, {}, []), gpu=True)}
    assert rows["Decode step, one request"][3] == verdict
    assert rows["Decode step, 32 requests"][3] == "**not met**"


def test_without_a_gpu_nothing_is_judged(raw: Raw) -> None:
    result = engine(raw, {"stock": 1.0, "metok-paper": 0.1})
    verdicts = [row[3] for row in goals.rows(Results(result, {}, []), gpu=False)]
    assert set(verdicts) == {"", "not judged: no GPU"}


def test_goals_are_of_the_default_mode(raw: Raw, folder: Folder, write: Write) -> None:
    folder.engine("7b", "eager").write_text(json.dumps(engine(raw, {"stock": 1.0, "metok-paper": 0.1})))
    page = write()
    assert line(page, "Decode step, one request")[2] == "not measured"
    assert "## vLLM's default mode\n\nNot measured." in page
    assert "| metok-paper | first after start |" in page


def test_a_later_run_of_a_kernel_takes_the_place_of_the_earlier_one(folder: Folder) -> None:
    kernel_rows(folder.kernels[0], {"event_similarity": [0.5], "tiered_pool": [0.6]})
    kernel_rows(folder.kernels[1], {"event_similarity": [0.9]})
    shares = {row["op"]: row["share_of_copy"] for row in Results.of(folder, "7b").kernels}
    assert shares == {"event_similarity": "0.900", "tiered_pool": "0.600"}


def test_every_figure_of_a_mode_is_on_the_page(raw: Raw, folder: Folder, write: Write) -> None:
    factors = {"metok-balanced": 0.5, "metok-paper": 0.25, "stock": 1.0}  # in the order they ran
    result = engine(raw, factors)
    result["variants"]["fewer-frames"] = {"label": "", "error": "fewer-frames ended with 1; the end of x.log:\nboom"}
    folder.engine("7b").write_text(json.dumps(result))
    page = write(plots=True)
    assert "`fewer-frames` failed: fewer-frames ended with 1" in page
    paper = re.findall(r"^\| metok-paper \|.*$", page, re.MULTILINE)
    assert paper[0].startswith("| metok-paper | first after start | 525.0 |")  # a quarter of 2.1 s
    assert "| metok-paper | 1 | 87.5 | 2.50 | 2.00 | 8.00 |" in paper[1]
    # Ratios by concurrency: first token, with processing, between tokens, decode step, requests/s.
    assert "| metok-paper | 1 | 4.00 | 2.91 | 4.00 | 4.00 | 4.00 |" in paper
    # From the file: decoding, processing, tower, stage 1, language model, outside the model, two sums.
    assert "| metok-paper | 100.0 | 50.0 | 2.5 | 0.5 | 8.9 | 0.8 | 62.7 | 162.7 |" in paper
    assert "| metok-paper | until the first token | 2.50 | 0.50 | 1.00 | 0.17 | 7.50 | 0.00 | 0.25 |" in "\n".join(
        paper
    )
    shown = re.findall(r"^\| ([a-z-]+) \| first after start", page, re.MULTILINE)
    assert shown == ["stock", "metok-paper", "metok-balanced"]
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["results/engine-7b-load.png", "results/engine-7b-request.png"]
    assert all((folder.path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert write() == page  # written anew without drawing, the pictures are still named


def test_what_engines_went_without_is_said(folder: Folder, write: Write) -> None:
    folder.machine.write_text(json.dumps(MACHINE))
    assert "Engines ran with" not in write()
    folder.engine_option.write_text('{"attention_backend": "TRITON_ATTN"}\n')
    assert '| Engines ran with | `{"attention_backend": "TRITON_ATTN"}`: without it they failed |' in write()


def test_kernels_of_a_gpu_stand_beside_the_others(folder: Folder, write: Write) -> None:
    kernel_rows(folder.kernels[0], {"event_similarity": [0.8, 0.5]})
    assert "| event_similarity | case 1 | 200.00 | - | - | 0.500 |" in write()


def test_models_that_vllm_prunes_stand_beside_each_other(raw: Raw, folder: Folder, write: Write) -> None:
    """Their tokens and blocks as the engines had them, and METok against each of vLLM's own prunings."""
    assert "## Beside vLLM's own pruning\n\nNot measured." in write()
    assert "qwen" not in write().split("## Stages")[0]
    entries: dict[str, Any] = {}
    counts = {"stock": 9216, "evs-mean": 1734, "metok-paper": 4068}
    for variant in variants(qwen(QWEN3_VL, layers=36), 128, list(counts)):
        figures = raw({"stock": 1.0, "evs-mean": 0.5, "metok-paper": 0.2}[variant.name])
        visual = {"stock": 9216, "encoded": counts[variant.name]}
        figures["tokens"] = {"prompt_tokens": visual["encoded"] + 1000, "text_tokens": 1000, "visual_tokens": visual}
        figures["kv"]["groups"] = [{"layers": 36, "blocks_of_a_request": visual["encoded"] // 16}]
        entries[variant.name] = {
            "label": variant.label, "metok": variant.metok, "pruning": variant.pruning and vars(variant.pruning),
            **engine_report.summarise(figures, 36),
        }  # fmt: skip
    result = engine(raw, {})
    result["workload"] |= {"model": "qwen3-vl-8b", "family": "Qwen3-VL", "frames": 128}
    result |= {
        "variants": entries,
        "ratios_to_stock": engine_report.ratios(entries),
        "ratios_to_pruning": engine_report.ratios_to_pruning(entries),
        "notes": ["evs-mean: something was not as planned"],
    }
    folder.engine("qwen3-vl-8b").write_text(json.dumps(result))
    page = write(plots=True)
    section = page.split("## Beside vLLM's own pruning: qwen3-vl-8b, 128 frames")[1].split("## Kernels")[0]
    (counted,) = re.findall(r"^\| Of a request .*?\n\n", section, re.MULTILINE | re.DOTALL)
    assert line(counted, "evs-mean")[1:] == ["2734", "1000", "1734", "1734.0", "108 (36 layers)", "8"]
    assert [row.split(" | ")[0] for row in counted.strip().splitlines()[2:]] == [f"| {name}" for name in counts]
    to_evs = section.split("| Times as good as evs-mean | Requests")[1].split("| Times as good as evs-mean | KV")
    assert line(to_evs[0], "metok-paper | 1")[2] == "2.50"
    assert line(to_evs[1].split("\n\n")[0], "metok-paper")[1] == "2.50"
    assert "- evs-mean: something was not as planned." in section
    assert "![engine-qwen3-vl-8b-load](results/engine-qwen3-vl-8b-load.png)" in page
    assert "## Beside vLLM's own pruning: qwen2.5-vl-7b" not in page
