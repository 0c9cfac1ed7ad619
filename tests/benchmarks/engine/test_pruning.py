"""Models beside vLLM's own pruning: tokens, rates, variants, folders, and what a result says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import cli, conditions, models, report, workload
from benchmarks.engine.families import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL, Family
from benchmarks.engine.pruning import nearest
from benchmarks.engine.variants import not_in_the_run, variants
from tests.benchmarks.models import llava, qwen

Raw = Callable[..., dict[str, Any]]
OF_QWEN = ["stock", "fewer-frames", "evs-mean", "evs-stage1"]
METOK = ["metok-paper", "metok-balanced"]


@pytest.mark.parametrize("family", [QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.title)
def test_tokens_of_64_pairs(family: Family) -> None:
    """9 x 16 tokens a pair; 5 x 8 and 3 x 4 in the coarser tiers; 18 + 33 + 13 pairs; no separators."""
    model = qwen(family)
    assert model.stock_tokens(128) == 64 * 144
    assert model.stock_tokens(127) == 64 * 144  # the last one is a pair with itself
    found = model.expected(128)
    assert found.encoded == 18 * 144 + 33 * 40 + 13 * 12
    # Key events have 13 pairs each, 6 of them whole, and keep 76 % twice; the others, 13 and 12 pairs, keep
    # half of that once. Rounded up: 1144 tokens, 870, 662; 324 and 312 tokens, 124 and 119.
    assert (found.after_l1, found.after_l2, found.after_l3) == (3 * 870 + 124 + 119, 3 * 662, 0)
    # L1, L2 and L3 are 3, 10 and 19 of 28.
    mean = (3 * 4068 + 7 * (3 * 870 + 124 + 119) + 9 * 3 * 662) / 28
    assert model.expected_mean(128) == pytest.approx(mean)
    assert {variant.label for variant in variants(model, 128, ["evs-mean", "evs-stage1"])} == {
        f"EVS, {round(mean)} tokens",
        "EVS, 4068 tokens",
    }
    (fewer,) = variants(model, 128, ["fewer-frames"])
    assert fewer.frames == 56  # 28 pairs take 4032 tokens, 29 take 4176


@pytest.mark.parametrize("method", ["evs", "vidcom2"])
@pytest.mark.parametrize(("per_step", "steps"), [(144, 64), (28, 8), (1, 5), (299, 384)])
def test_vllm_leaves_what_is_wanted(method: str, per_step: int, steps: int) -> None:
    """Any number of tokens between the fewest that the method leaves and all, by vLLM's own count."""
    total, least = per_step * steps, {"evs": per_step, "vidcom2": steps}[method]
    for wanted in range(1, total, max(1, total // 3000)):
        found = nearest(method, wanted, per_step, steps)
        assert found.tokens == max(wanted, least), wanted
        assert 0 < found.rate < 1
        assert abs(total * (1 - found.rate) - wanted) < 1
        assert found.options == {"video_pruning_method": method, "video_pruning_rate": found.rate}
    assert nearest(method, total - 2.4, per_step, steps).tokens == max(total - 2, least)


@pytest.mark.parametrize("wanted", [224, 230, 0.2])
def test_a_rate_that_vllm_cannot_have_is_refused(wanted: float) -> None:
    with pytest.raises(ValueError, match=f"EVS cannot leave {wanted:g} tokens of a video of 224"):
        nearest("evs", wanted, 28, 8)


def test_a_family_has_the_variants_that_vllm_has_for_it() -> None:
    assert [variant.name for variant in variants(qwen(QWEN2_5_VL), 128)] == [*OF_QWEN, *METOK]
    named = [*OF_QWEN, "vidcom2-mean", "vidcom2-stage1", *METOK]
    of_qwen3 = variants(qwen(QWEN3_VL), 128)
    assert [variant.name for variant in of_qwen3] == named
    # What is pruned by vLLM is served without METok, and the other way round.
    assert [variant.pruning and variant.pruning.method for variant in of_qwen3] == [
        *(None, None, "evs", "evs", "vidcom2", "vidcom2", None, None)
    ]
    assert [variant.metok for variant in of_qwen3] == [*[None] * 6, {"preset": "paper"}, {"preset": "balanced"}]
    assert len({variant.frames for variant in of_qwen3 if variant.name != "fewer-frames"}) == 1
    for model, wrong, there in (
        (qwen(QWEN2_5_VL), "vidcom2-mean", ", ".join([*OF_QWEN, *METOK])),
        (llava(), "evs-mean", "stock, fewer-frames, metok-paper, metok-balanced"),
    ):
        with pytest.raises(ValueError, match=f"^unknown variant {wrong}; for {model.family.title} there are {there}$"):
            variants(model, 128, ["stock", wrong])
    assert [name.split()[0] for name in not_in_the_run(LLAVA_ONEVISION)] == ["EVS", "VidCom2"]
    assert [name.split()[0] for name in not_in_the_run(QWEN2_5_VL)] == ["VidCom2"]
    assert not_in_the_run(QWEN3_VL) == {}


def test_a_video_that_metok_leaves_whole_is_too_short() -> None:
    assert len(variants(qwen(QWEN3_VL), 8)) == 8
    with pytest.raises(ValueError, match="of 6 frames is too short to compare with METok"):
        variants(qwen(QWEN3_VL), 6)  # three pairs are three events, and all of them are key events
    assert variants(qwen(QWEN3_VL), 6, ["stock", "metok-paper"])


@pytest.mark.parametrize(
    ("name", "parameters", "layers", "pixels"),
    [("qwen2.5-vl-7b", 8_292_166_656, 28, 252 * 448), ("qwen3-vl-8b", 8_767_123_696, 36, 128 * 288 * 512)],
)
def test_a_published_shape_on_disk(name: str, parameters: int, layers: int, pixels: int, tmp_path: Path) -> None:
    """Exactly as many parameters as the published checkpoint has; its frames are not scaled."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    model = models.write_model(name, tmp_path)
    assert (model.layers, model.grid, model.dummy) == (layers, (9, 16), True)
    assert not list(model.path.rglob("*.safetensors"))
    config = AutoConfig.from_pretrained(model.path)
    with torch.device("meta"):
        whole: Any = AutoModelForImageTextToText.from_config(config)
    assert sum(tensor.numel() for tensor in whole.parameters()) == parameters
    assert config.text_config.head_dim == 128 if name == "qwen3-vl-8b" else config.text_config.hidden_size == 28 * 128
    assert 2 * sum(config.text_config.rope_parameters["mrope_section"]) == 128
    size = AutoProcessor.from_pretrained(model.path).video_processor.size
    assert size["shortest_edge"] <= pixels <= size["longest_edge"]
    assert conditions.weights(model) == "random"
    # A folder of a checkpoint is a model too.
    again = models.write_model(str(model.path), tmp_path)
    assert (again.grid, again.frame, again.family) == (model.grid, model.frame, model.family)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match=r"models of LLaVA-OneVision, Qwen2\.5-VL, Qwen3-VL, not 'qwen2_vl'"):
        models.write_model(str(tmp_path), tmp_path)


def test_frames_are_when_they_are_shown() -> None:
    """64 seconds at 2 frames a second, and the same with every fourth of them."""
    whole, fewer = workload.times(128, 128), workload.times(32, 128)
    assert (
        (whole["duration"], whole["total_num_frames"]) == (fewer["duration"], fewer["total_num_frames"]) == (64, 1536)
    )
    assert whole["frames_indices"] == list(range(6, 1536, 12))
    assert fewer["frames_indices"] == list(range(24, 1536, 48))
    assert whole["do_sample_frames"] is False


def test_a_wide_frame_has_the_pictures_of_a_square_one() -> None:
    wide = workload.video(1, 4, 36, 84)
    assert wide.shape == (4, 36, 84, 3)
    assert (wide[:, ::6, ::14] == workload.video(1, 4, 84, 84)[:, ::14, ::14]).all()


def tokens(encoded: int, stock: int = 9216, **kept: int) -> dict[str, Any]:
    """A worker's counts of a request; with `kept`, METok's."""
    counts = {"prompt_tokens": encoded + 200, "text_tokens": 200, "visual_tokens": {"stock": stock, "encoded": encoded}}
    if kept:
        counts["visual_tokens"] |= {"retained": 0, "after_l3": 0, **kept}
        counts["prune_layers"] = [3, 10, 19]
    return counts


def measured(raw: Raw, after_l1: int = 2853, kept_by_evs: int = 1787) -> dict[str, Any]:
    """The entries of a run at 128 frames, with the counts that are planned for or others."""
    counts = {
        "stock": tokens(9216), "fewer-frames": tokens(4032, 4032), "evs-mean": tokens(kept_by_evs),
        "evs-stage1": tokens(4068), "metok-paper": tokens(4068, after_l1=after_l1, after_l2=1986),
    }  # fmt: skip
    entries = {}
    for index, variant in enumerate(variants(qwen(QWEN2_5_VL), 128, list(counts))):
        figures = {**raw(1 / (1 + index)), "tokens": counts[variant.name]}
        entries[variant.name] = {"metok": variant.metok, **report.summarise(figures, 28)}
        if variant.pruning is not None:
            entries[variant.name]["pruning"] = vars(variant.pruning)
    return entries


def test_metok_is_compared_with_each_pruning(raw: Raw) -> None:
    entries = measured(raw)
    means = {name: entry["tokens"]["mean_over_layers"] for name, entry in entries.items()}
    assert means == {
        "stock": 9216, "fewer-frames": 4032, "evs-mean": 1787, "evs-stage1": 4068,
        "metok-paper": pytest.approx((3 * 4068 + 7 * 2853 + 9 * 1986) / 28),
    }  # fmt: skip
    ratios = report.ratios_to_pruning(entries)
    assert {base: list(others) for base, others in ratios.items()} == {
        "evs-mean": ["metok-paper"], "evs-stage1": ["metok-paper"],
    }  # fmt: skip
    assert ratios["evs-mean"]["metok-paper"]["kv_capacity"] == pytest.approx(5 / 3)
    assert ratios["evs-stage1"]["metok-paper"]["levels"][1]["ttft"] == pytest.approx(5 / 4)
    del entries["evs-mean"]["levels"]  # it failed
    assert list(report.ratios_to_pruning(entries)) == ["evs-stage1"]


def test_counts_that_were_not_planned_are_said(raw: Raw) -> None:
    planned = conditions.expected(qwen(QWEN2_5_VL), 128)["expected"]
    assert report.notes(measured(raw), planned) == []
    (said,) = report.notes(measured(raw, after_l1=2900), planned)
    assert said.startswith("metok-paper: 1799.2 visual tokens a layer on average")
    assert "chosen by 1787.5" in said
    (said,) = report.notes(measured(raw, kept_by_evs=1786), planned)
    assert said == "evs-mean: 1786 visual tokens enter the language model, and not 1787"
    entries = measured(raw)
    entries["evs-mean"]["pruning"] = vars(nearest("evs", 100, 144, 64))
    entries["evs-mean"]["tokens"]["visual_tokens"]["encoded"] = 144
    (said,) = report.notes(entries, planned)
    assert said == "evs-mean: 100.0 tokens were wanted, and this method leaves 144 or more"
    entries = {**measured(raw), "stock": {"metok": None, "error": "out of memory"}}
    entries["metok-paper"]["tokens"]["visual_tokens"]["encoded"] = 4000
    assert "metok-paper: 4000 visual tokens enter the language model, and not 4068" in report.notes(entries, planned)
    assert conditions.expected(llava(), 64) == {}


def test_a_result_names_its_family_and_is_drawn(raw: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program, its engines replaced by canned figures; all variants are in the pictures."""
    jobs: list[dict[str, Any]] = []

    def run_job(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        jobs.append(job)
        return {**raw(), "tokens": tokens(448, 448)}

    monkeypatch.setattr(cli, "run_job", run_job)
    monkeypatch.setattr(cli, "file_decode", lambda *_: {"median": 100.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "engine-qwen3-vl-tiny.json"
    assert cli.main(["--small", "--model", "qwen3-vl-tiny", "--work", str(tmp_path), "--out", str(out)]) == 0
    assert out.with_name("engine-qwen3-vl-tiny-request.png").exists()
    result = json.loads(out.read_text())
    assert (result["workload"]["family"], result["workload"]["weights"]) == ("Qwen3-VL", "random")
    assert report.headline(result).startswith("Qwen3-VL qwen3-vl-tiny, 32 frames")
    assert set(result["ratios_to_pruning"]) == {"evs-mean", "evs-stage1", "vidcom2-mean", "vidcom2-stage1"}
    assert len(result["notes"]) > 0
    assert result["variants"]["evs-mean"]["pruning"]["tokens"] == 140
    assert len({json.dumps(job["engine"]) for job in jobs}) == 1
    given = {job["name"]: (job["metok"], job["pruning"].get("video_pruning_method")) for job in jobs}
    assert given == {
        "stock": (None, None), "fewer-frames": (None, None), "evs-mean": (None, "evs"), "evs-stage1": (None, "evs"),
        "vidcom2-mean": (None, "vidcom2"), "vidcom2-stage1": (None, "vidcom2"),
        "metok-paper": ({"preset": "paper"}, None), "metok-balanced": ({"preset": "balanced"}, None),
    }  # fmt: skip
    assert {job["whole_frames"] for job in jobs} == {32}
