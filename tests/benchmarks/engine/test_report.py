"""Statistics, ratios, spans and plots of `python -m benchmarks.engine`, from canned figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.paths import RESULTS
from benchmarks.engine import cli, report, timing, workload
from benchmarks.engine.models import write_model
from benchmarks.engine.variants import variants
from benchmarks.engine.worker import capacity
from metok_vllm.worker.timing import PartTimes
from tests.benchmarks.models import llava

Raw = Callable[..., dict[str, Any]]


def test_quantiles_are_numpys() -> None:
    values = np.random.default_rng(0).random(17).tolist()
    expected = 1e3 * np.quantile(values, [0.2, 0.5, 0.8])
    assert list(report.quantiles(values, 1e3).values()) == pytest.approx(expected)
    assert report.quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}
    with pytest.raises(ValueError, match="no values"):
        report.quantiles([])


def test_a_summary_is_in_milliseconds(raw: Raw) -> None:
    summary = report.summarise(raw(scoring=1.0), 28)
    assert summary["levels"][0]["ttft_ms"]["p50"] == pytest.approx(350)
    assert summary["levels"][0]["inter_token_ms"]["p80"] == pytest.approx(10)
    assert summary["levels"][0]["decode_step_ms"]["p50"] == pytest.approx(8)
    assert summary["levels"][0]["decode_steps"] == 3
    assert summary["breakdown"]["prefill_ms"]["total"] == pytest.approx(51)
    assert summary["breakdown"]["language_model_prefill_ms"] == pytest.approx(4 + 1 + 30 + 1)
    assert summary["breakdown"]["scoring_share"] == pytest.approx(1 / 36)


def test_the_first_request_stands_beside_the_warm_ones(raw: Raw) -> None:
    figures = raw()
    summary = report.summarise(figures, 28)
    assert summary["first_request"] == {
        "ttft_ms": pytest.approx(2100),
        "longest_gap_ms": pytest.approx(500),
        "ttft_over_warm": pytest.approx(6),
    }
    assert max(figures["levels"][0]["ttft_s"]) < 2.1, "it is among the warm ones"
    figures["levels"] = figures["levels"][1:]  # two at a time: nothing to compare one request with
    assert report.summarise(figures, 28)["first_request"]["ttft_over_warm"] is None


def test_a_level_without_a_step_that_only_decodes_has_no_decode_step(raw: Raw) -> None:
    figures = raw()
    figures["levels"][1]["decode_steps_s"] = []
    summary = report.summarise(figures, 28)
    assert summary["levels"][1]["decode_step_ms"] is None
    levels = report.ratios({"stock": summary, "metok-paper": report.summarise(raw(0.5), 28)})["metok-paper"]["levels"]
    assert [level["decode_step"] for level in levels] == [pytest.approx(2), None]


def test_a_request_is_counted_from_its_file_on(raw: Raw) -> None:
    """Decoding, processing, tower, language model: apart, and their sum."""
    summaries = {"stock": report.summarise(raw(), 28), "metok-paper": report.summarise(raw(0.5), 28)}
    for entry in summaries.values():
        entry["file_decode_ms"] = {"median": 100.0}
        entry["request_ms"] = report.request_ms(entry)
    assert summaries["stock"]["request_ms"] == pytest.approx({
        "file_decode": 100, "processing": 50, "tower": 10, "stage1": 2, "language_model": 35, "outside_model": 3,
        "without_file_decode": 100, "total": 200,
    })  # fmt: skip
    assert report.ratios(summaries)["metok-paper"]["file_to_first_token"] == pytest.approx(200 / 175)
    summaries["stock"]["file_decode_ms"] = {"median": None, "reason": "not measured: PyAV is not installed"}
    summaries["stock"]["request_ms"] = report.request_ms(summaries["stock"])
    assert summaries["stock"]["request_ms"]["total"] is None
    assert summaries["stock"]["request_ms"]["without_file_decode"] == pytest.approx(100)
    assert report.ratios(summaries)["metok-paper"]["file_to_first_token"] is None


def test_ratios_above_one_are_better(raw: Raw) -> None:
    results = {
        "stock": report.summarise(raw(), 28),
        "metok-paper": report.summarise(raw(0.25), 28),
        "broken": {"error": "x"},
    }
    ratios = report.ratios(results)
    assert list(ratios) == ["metok-paper"]
    assert ratios["metok-paper"]["kv_capacity"] == pytest.approx(4)
    assert ratios["metok-paper"]["language_model_prefill"] == pytest.approx(4)
    for level in ratios["metok-paper"]["levels"]:
        keys = ("ttft", "inter_token", "decode_step", "requests_per_s", "cpu_time")
        assert [level[key] for key in keys] == pytest.approx([4] * 5)
        # 350 and 87.5 ms, and as long to process the frames on either side: 50 ms.
        assert level["ttft_with_processing"] == pytest.approx(400 / 137.5)
    assert report.ratios({"stock": {"error": "x"}, "metok-paper": results["metok-paper"]}) == {}


def test_nested_spans_share_the_time_out() -> None:
    now = iter(range(100))
    synchronised = []
    spans = timing.Spans(lambda: synchronised.append(None), clock=lambda: float(next(now)))
    with spans.span("outside_model"):  # 0
        with spans.span("rest_of_model"):  # 1
            spans.around(lambda: None, "deep_layers")()  # 2, 3
        # 4
        with pytest.raises(ZeroDivisionError), spans.span("scoring"):  # 5
            raise ZeroDivisionError  # 6
    # 7
    taken = spans.take()
    assert {part: ms for part, ms in taken.items() if ms} == {
        "outside_model": 3e3,
        "rest_of_model": 2e3,
        "deep_layers": 1e3,
        "scoring": 1e3,
    }
    assert len(synchronised) == 8
    assert not any(spans.take().values())


class Outline(torch.nn.Module):
    """A model of the right outline: stock's, or METok's where it has a `decoder_stack`."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.multi_modal_projector = torch.nn.Identity(), torch.nn.Identity()
        self.language_model = torch.nn.Module()
        self.language_model.model = torch.nn.Module()
        self.language_model.model.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))

    def embed_multimodal(self, x: torch.Tensor) -> Any:
        return self.multi_modal_projector(self.vision_tower(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.language_model.model.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Stack:
    """`DecoderStack`, as much of it as matters here; its module needs vLLM."""

    prune_layers: tuple[int, int, int]
    times: PartTimes


def compiled(model: Any) -> Any:
    """Its decoder as vLLM's decorator leaves it: the class has a `__call__` that calls no layer's hook."""

    class Compiled(torch.nn.Module):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    decoder = Compiled()
    decoder.layers = model.language_model.model.layers
    model.language_model.model = decoder
    return model


def test_a_compiled_decoder_is_timed_in_one_piece(spans: timing.Spans) -> None:
    class Whole(Outline):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.language_model.model(x)

    model = compiled(Whole())
    timing.attach(spans, model, first_prune_layer=1, compiled=True)
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))
    assert {part: ms for part, ms in spans.take().items() if ms} == {"compiled_layers": 1e3, "rest_of_model": 2e3}


def test_a_step_is_timed_outside_the_model_too(spans: timing.Spans) -> None:
    """A replayed graph is the model; scheduler, preparation and sampling are not."""
    graphs = SimpleNamespace(run_fullgraph=lambda: None, run_pw_graph=lambda model: model())
    scheduler = SimpleNamespace(schedule=lambda: None, update_from_output=lambda: None)
    runner = SimpleNamespace(sample_tokens=lambda: None, cudagraph_manager=graphs)
    runner.execute_model = lambda: (graphs.run_fullgraph(), graphs.run_pw_graph(lambda: None))
    timing.attach_step(spans, scheduler, runner)
    with spans.span("outside_model"):
        scheduler.schedule()
        runner.execute_model()
        runner.sample_tokens()
        scheduler.update_from_output()
    assert {part: ms for part, ms in spans.take().items() if ms} == {
        "scheduling": 2e3,
        "preparation": 3e3,
        "compiled_layers": 1e3,
        "rest_of_model": 1e3,
        "sampling": 1e3,
        "outside_model": 5e3,
    }


class PrunedOutline(Outline):
    """Opens METok's parts, as `worker/step.py` does."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder_stack = Stack((1, 2, 3), PartTimes())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.language_model.model.layers):
            with self.decoder_stack.times.part("deep" if index else "shallow"):
                x = layer(x)
            if index == 0:
                with self.decoder_stack.times.part("scoring"):
                    x = x + 1
        return x


@pytest.fixture
def spans() -> timing.Spans:
    """On a clock that goes on by a second each time it is read."""
    ticks = iter(range(1000))
    return timing.Spans(lambda: None, clock=lambda: float(next(ticks)))


def test_hooks_find_the_parts_of_a_model(spans: timing.Spans) -> None:
    """Every part is timed, under its name, cut at the first pruning layer."""
    model = Outline()
    timing.attach(spans, model, first_prune_layer=1)
    model.embed_multimodal(torch.zeros(1))
    assert {part: ms for part, ms in spans.take().items() if ms} == {"tower": 2e3, "stage1": 3e3}
    model(torch.zeros(1))
    assert {part: ms for part, ms in spans.take().items() if ms} == {
        "shallow_layers": 1e3,
        "deep_layers": 3e3,
        "rest_of_model": 5e3,
    }


def test_metoks_own_part_is_timed_and_its_own_times_go_on(spans: timing.Spans) -> None:
    model = PrunedOutline()
    own = model.decoder_stack.times
    timing.attach(spans, model, first_prune_layer=1)
    assert torch.equal(model(torch.zeros(1)), torch.ones(1))
    # A layer's own span lies inside METok's: three ticks a layer.
    assert {part: ms for part, ms in spans.take().items() if ms} == {
        "shallow_layers": 3e3,
        "scoring": 1e3,
        "deep_layers": 9e3,
        "rest_of_model": 6e3,
    }
    assert model.decoder_stack.prune_layers == (1, 2, 3)
    counted = {part: sum(figures["counts"]) for part, figures in own.snapshot().items()}
    assert counted == {"tower": 0, "stage1": 0, "shallow": 1, "scoring": 1, "deep": 3}


def test_a_pruned_step_is_timed_without_its_layers_hooks(spans: timing.Spans) -> None:
    """As in the default mode, in which METok's pruned step still runs its layers one by one."""
    model = compiled(PrunedOutline())
    timing.attach(spans, model, first_prune_layer=1, compiled=True)
    model(torch.zeros(1))
    assert {part: ms for part, ms in spans.take().items() if ms} == {
        "shallow_layers": 1e3,
        "scoring": 1e3,
        "deep_layers": 3e3,
        "rest_of_model": 6e3,
    }


def test_a_part_that_is_gone_is_not_timed_as_nothing(spans: timing.Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metok_vllm.contract.counters.TIMED_PARTS", ("shallow", "deep"))
    with pytest.raises(LookupError, match="no part scoring any more"):
        timing.attach(spans, PrunedOutline(), first_prune_layer=1)


def test_the_engine_still_has_what_is_timed(tmp_path: Path) -> None:
    """A real engine with METok: every part of a request takes time, and no part takes all of it.

    In its default mode: eager is a part of that, where a step prunes.
    """
    model = write_model("tiny", tmp_path)
    # Dynamo traces the model as ever; its graph is then run as it is, which saves half a minute of Inductor.
    mode = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    options = cli.arguments(["--small", "--frames", "8", "--max-tokens", "3", "--engine-option", json.dumps(mode)])
    options.text_tokens, options.videos, options.repeats = 30, 1, 1
    (paper,) = variants(model, 8, ["metok-paper"])
    job = {**cli.job_of(paper, options, model, cuda=False), "parts": ["breakdown"]}
    found = report.breakdown(cli.run_job(job, tmp_path, False, 300)["breakdown"])
    assert found["compiled"]
    assert {part for part in timing.PARTS if found["prefill_ms"][part] == 0} == {"compiled_layers"}
    assert 0 < found["scoring_share"] < 1
    # While decoding nothing is encoded and nothing is dropped, and compiled layers are one piece.
    idle = {part for part in timing.PARTS if found["decode_step_ms"][part] == 0}
    assert idle == {"tower", "stage1", "scoring", "shallow_layers", "deep_layers"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("engine-*.json")), ids=lambda path: path.stem)
def test_results_of_the_repository_have_the_parts_that_are_drawn(path: Path) -> None:
    for variant in json.loads(path.read_text())["variants"].values():
        if "breakdown" not in variant:
            continue  # --no-breakdown
        for phase in ("prefill_ms", "decode_step_ms"):
            parts = dict(variant["breakdown"][phase])
            assert parts.pop("total") == pytest.approx(sum(parts.values()))
            assert set(parts) <= set(timing.PARTS)


def test_a_decoder_that_is_compiled_otherwise_is_not_timed_as_nothing(spans: timing.Spans) -> None:
    model = Outline()
    model.language_model.model = torch.nn.Identity()
    with pytest.raises(LookupError, match="no longer compiles Identity"):
        timing.attach(spans, model, first_prune_layer=1, compiled=True)


def test_videos_are_the_same_scenes_at_any_sampling() -> None:
    whole = workload.video(3, 24, 84, 84)
    assert whole.shape == (24, 84, 84, 3)
    assert np.array_equal(whole, workload.video(3, 24, 84, 84))
    assert not np.array_equal(whole, workload.video(4, 24, 84, 84))
    # The middle of each third of 24 frames is a frame of the video sampled at 8.
    assert np.array_equal(workload.video(3, 8, 84, 84), whole[1::3])
    assert len(np.unique(whole.reshape(24, -1), axis=0)) == 24


def canned(raw: Raw) -> dict[str, Any]:
    entries = {}
    for index, variant in enumerate(variants(llava(7), 32)):
        entries[variant.name] = {
            "label": variant.label,
            **report.summarise(raw(1 / (1 + index), scoring=index / 2), 28),
        }
    return {
        "claim": "canned",
        "commit": "0000000",
        "versions": {"vllm": "0"},
        "hardware": {"device": "none"},
        "workload": {"model": "tiny", "frames": 32, "max_tokens": 8},
        "variants": entries,
    }


def test_a_busy_machine_is_named_on_the_plots(raw: Raw) -> None:
    result = canned(raw)
    assert report.footer({**result, "hardware": {"cores": 8, "load_average": 3.9}}) == "canned"
    assert "load average 4.1 on 8 cores" in report.footer({**result, "hardware": {"cores": 8, "load_average": 4.1}})


def test_plots_from_a_result_alone(raw: Raw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = canned(raw)
    path = tmp_path / "engine-x.json"
    path.write_text(json.dumps(result))
    assert cli.main(["--plot", str(path)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [tmp_path / "engine-x-load.png", tmp_path / "engine-x-request.png"]
    for png in printed:
        assert png.read_bytes().startswith(b"\x89PNG")
    nothing = {**result, "variants": {"stock": {"label": "stock", "error": "x"}}}
    with pytest.raises(ValueError, match="no variant"):
        report.plot(nothing, path)


def test_a_run_records_its_conditions(
    raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program, its engines replaced by canned figures;
    one variant fails and the others are kept.
    """
    jobs = []

    def run_job(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        jobs.append(job)
        if job["name"] == "metok-balanced":
            raise RuntimeError("out of memory")
        return raw(0.5 if job["metok"] else 1.0)

    monkeypatch.setattr(cli, "run_job", run_job)
    monkeypatch.setattr(cli, "file_decode", lambda _, frames: {"median": float(frames)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out" / "engine.json"
    assert cli.main(["--small", "--work", str(tmp_path), "--out", str(out)]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert [job["name"] for job in jobs] == ["stock", "fewer-frames", "metok-paper", "metok-balanced"]
    assert len({json.dumps(job["engine"]) for job in jobs}) == 1
    result = json.loads(out.read_text())
    assert result["command"].startswith("python -m benchmarks.engine --small")
    assert "not a speed claim" in result["claim"]
    assert any("EVS" in name for name in result["not_in_the_run"])
    assert {"commit", "date", "hardware", "versions", "excluded", "file_decode_ms"} <= set(result)
    assert result["variants"]["metok-balanced"]["error"] == "out of memory"
    assert result["ratios_to_stock"]["metok-paper"]["kv_capacity"] == pytest.approx(2)
    assert (out.parent / "engine-load.png").exists()
    # Each variant decodes the frames that it takes.
    decoding = {name: entry["file_decode_ms"]["median"] for name, entry in result["variants"].items()}
    assert decoding["stock"] == decoding["metok-paper"] == 32
    assert decoding["fewer-frames"] < 32
    assert result["variants"]["metok-paper"]["request_ms"]["file_decode"] == 32


def test_capacity_counts_one_allocation() -> None:
    """Groups overlay each other in one allocation:
    8 groups of a layer hold no more bytes than one group of 8 layers.
    """
    one_group = SimpleNamespace(num_blocks=8192, kv_cache_tensors=[SimpleNamespace(size=2**30)])
    eight = SimpleNamespace(num_blocks=65536, kv_cache_tensors=[SimpleNamespace(size=2**30)] * 8)
    stock, metok = capacity(one_group, 8192, 18), capacity(eight, 65536, 8 * 18)
    assert stock["block_bytes"] == 8 * metok["block_bytes"] == 131072
    assert stock["bytes_of_a_request"] == metok["bytes_of_a_request"]
    assert stock["requests_that_fit"] == metok["requests_that_fit"] == 455
    assert stock["requests_per_gib"] == metok["requests_per_gib"] == pytest.approx(2**30 / (18 * 131072))


def test_a_failed_process_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder and with a path that do not lead to the benchmark: its process finds it all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    job = {"name": "stock", "parts": ["serve"]}  # lacks everything else
    with pytest.raises(RuntimeError, match=r"stock ended with 1; .*(?s:.*)KeyError"):
        cli.run_job(job, tmp_path, False, 60)
