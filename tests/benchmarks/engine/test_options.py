"""The command line, the variants and the model folders of `python -m benchmarks.engine`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import cli, models, variants
from tests.benchmarks.models import llava


def test_small_sets_what_is_not_set_by_hand() -> None:
    options = cli.arguments(["--small", "--frames", "16", "--concurrency", "8,1"])
    assert (options.model, options.frames, options.max_tokens) == ("tiny", 16, 8)
    assert options.concurrency == [1, 8]
    options = cli.arguments([])
    assert (options.model, options.frames, options.concurrency) == ("7b", 64, [1, 2, 4, 8, 16, 32])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--frames", "0"],
        ["--concurrency", "0,2"],
        ["--max-tokens", "1"],
        ["--engine-option", "{"],
        ["--engine-option", "[1]"],
        ["--speed"],
    ],
)
def test_impossible_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.arguments(wrong)
    assert error.value.code == 2


def test_an_unknown_variant_or_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown variant fast"):
        variants.variants(llava(7), 32, ["stock", "fast"])
    with pytest.raises(ValueError, match="--model must be"):
        models.write_model("9b", tmp_path)


@pytest.mark.parametrize(("frames", "grid"), [(32, 7), (64, 27), (8, 27), (1, 7), (128, 24)])
def test_fewer_frames_take_nearest_to_as_many_tokens(frames: int, grid: int) -> None:
    model = llava(grid)
    stock, fewer, paper, balanced = variants.variants(model, frames)
    assert stock.frames == paper.frames == balanced.frames == frames
    assert (stock.metok, fewer.metok, paper.metok, balanced.metok) == (
        None,
        None,
        {"preset": "paper"},
        {"preset": "balanced"},
    )
    target = model.expected(frames).encoded
    off = abs(model.stock_tokens(fewer.frames) - target)
    for other in range(1, frames + 1):
        assert off <= abs(model.stock_tokens(other) - target)


def test_tokens_of_the_published_shape() -> None:
    """64 frames of 27 x 27 patches: 14 x 14, 7 x 7 and 4 x 4 tokens a frame;
    18 + 33 + 13 frames; 5 separators.
    """
    assert llava().stock_tokens(64) == 64 * 196 + 1
    sizes = [13, 13, 13, 13, 12]
    n1, n2, n3 = 18, sum(sizes[:3]) - 18 + 12, 13 - 6 + 12 - 6
    assert llava().expected(64).encoded == n1 * 196 + n2 * 49 + n3 * 16 + 5


def test_every_variant_gets_the_same_engine(tmp_path: Path) -> None:
    model = llava(path=tmp_path)
    more = ["--attention-backend", "TRITON_ATTN", "--engine-option", '{"seed": 7, "compilation_config": {"mode": 0}}']
    options = cli.arguments(["--model", "7b", *more])
    made = cli.engine_options(options, model, cuda=True)
    prompt = 64 * 196 + 1 + 200
    # Stock's whole prompt fits one step, and with its new tokens the model's length.
    assert made["max_num_batched_tokens"] >= prompt
    assert made["max_model_len"] >= prompt + 64
    assert made["load_format"] == "dummy"
    assert made["attention_backend"] == "TRITON_ATTN"
    assert made["seed"] == 7
    assert made["compilation_config"] == {"mode": 0}
    assert made["enforce_eager"] is False
    real = llava(7, "x", tmp_path, dummy=False)
    on_cpu = cli.engine_options(options, real, cuda=False)
    assert "load_format" not in on_cpu
    assert on_cpu["enforce_eager"] is True
    options = cli.arguments(["--engine-option", '{"enforce_eager": false}'])
    assert cli.engine_options(options, real, cuda=False)["enforce_eager"] is False  # what is asked for counts


def test_a_published_shape_on_disk(tmp_path: Path) -> None:
    model = models.write_model("0.5b", tmp_path)
    assert (model.layers, model.grid, model.frame, model.dummy) == (24, (27, 27), (384, 384), True)
    config: dict[str, Any] = json.loads((model.path / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 896
    assert config["vision_config"]["num_hidden_layers"] == 26
    assert config["video_token_index"] < config["text_config"]["vocab_size"]
    assert not list(model.path.rglob("*.safetensors"))
    from transformers import AutoConfig, AutoProcessor

    read = AutoConfig.from_pretrained(model.path)
    assert (read.text_config.num_hidden_layers, len(read.text_config.layer_types)) == (24, 24)
    assert read.text_config.tie_word_embeddings
    assert AutoProcessor.from_pretrained(model.path).num_image_tokens == 27 * 27
    # Not written again, and a folder is a model too.
    (model.path / "config.json").touch()
    stamp = (model.path / "config.json").stat().st_mtime_ns
    assert models.write_model("0.5b", tmp_path) == model
    assert (model.path / "config.json").stat().st_mtime_ns == stamp
    assert models.write_model(str(model.path), tmp_path).dummy


def test_variants_run_in_the_order_given() -> None:
    named = variants.variants(llava(7), 32, ["metok-paper", "stock", "metok-paper"])
    assert [variant.name for variant in named] == ["metok-paper", "stock"]


@pytest.mark.parametrize(("flags", "eager", "parts"), [
    ([], False, ["serve", "breakdown"]),
    (["--eager"], True, ["serve", "breakdown"]),
    (["--no-breakdown"], False, ["serve"]),
])  # fmt: skip
def test_one_process_measures_a_variant(
    flags: list[str], eager: bool, parts: list[str], raw: Callable[..., dict[str, Any]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In vLLM's default mode, too: the breakdown comes from the engine that was measured."""
    started: list[dict[str, Any]] = []

    def run_job(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        started.append(job)
        figures = raw()
        return figures if "breakdown" in job["parts"] else {k: v for k, v in figures.items() if k != "breakdown"}

    monkeypatch.setattr(cli, "run_job", run_job)
    model = llava(path=tmp_path)
    stock = variants.variants(model, 64, ["stock"])[0]
    measured = cli.measure(stock, cli.arguments(["--work", str(tmp_path), *flags]), model, True)
    assert ("breakdown" in measured) == ("breakdown" in parts)
    assert [(job["parts"], job["engine"]["enforce_eager"]) for job in started] == [(parts, eager)]
