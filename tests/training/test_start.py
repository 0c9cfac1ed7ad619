"""Training goes on from the shipped model: nothing of it is lost on the way,
and every program takes it from there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import evaluate, export, train_aligner, train_tower
from training.export import load_model
from training.packing import Coder
from training.start import SHIPPED, start
from training.tokenizer import load_tokenizer
from training.train_lm import STAGES, Run, load_tower, word_directions


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    start(SHIPPED, out)
    return out


def lm_arguments(started: Path, out: Path) -> argparse.Namespace:
    return argparse.Namespace(
        tower=started / "tower" / "tower.pt", out=out, layers=12, lr=1e-4, pool=64, long=0.4, blind=0.0, tap=8,
        patience=1500, clues=0.2,
    )  # fmt: skip


def test_an_export_gives_the_shipped_model_again(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    folders = {"tower": started / "tower" / "tower.pt", "lm": started / "lm", "aligner": started / "aligner"}
    flags = [f"--{name}={path}" for name, path in folders.items()]
    monkeypatch.setattr(sys, "argv", ["export", *flags, f"--out={tmp_path}"])
    export.main()
    for part in ("", "metok_aligner"):
        shipped, again = SHIPPED / part, tmp_path / part
        want, got = (load_file(folder / "model.safetensors") for folder in (shipped, again))
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype == torch.bfloat16
            # as integers: equal numbers need not be equal bits
            assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name
        before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (shipped, again))
        assert {k for k in before | after if before.get(k) != after.get(k)} <= {"_name_or_path", "transformers_version"}
        tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (shipped, again)]
        assert tokenizers[0] == tokenizers[1]


def test_the_tokenizer_is_the_shipped_one(started: Path) -> None:
    """Training a tokenizer anew would give other words: its texts have changed since."""
    mine, shipped = load_tokenizer(started / "lm"), load_tokenizer(SHIPPED)
    assert mine.post_processor is None  # as in a run's folder
    assert mine.get_vocab() == shipped.get_vocab()
    for text in ("<|im_start|>user <video>\nWhere was the red star?<|im_end|>", "Où? 42\nA. top left"):
        assert mine.encode(text).ids == shipped.encode(text).ids


def test_it_answers_right(started: Path) -> None:
    args = argparse.Namespace(
        tower=started / "tower" / "tower.pt", lm=started / "lm", split="valid", first=4000, videos=2, per_kind=2,
        stride=2,
    )  # fmt: skip
    hits, log = evaluate.run(args)
    assert {"letter", "count", "where"} <= set(hits)
    assert len(log) > 40
    assert sum(hit for *_, hit in log) >= 0.95 * len(log)


def test_the_language_model_trains_on(started: Path, tmp_path: Path) -> None:
    """From what it knows, not from new weights: the first loss is a trained model's, and the step counts."""
    shutil.copytree(started / "lm", tmp_path / "lm")
    run = Run(lm_arguments(started, tmp_path / "lm"))
    assert (run.step, run.stage) == (0, len(STAGES) - 1)
    run.pool.grow(8, (12, 16), 4)
    before = [p.clone() for p in run.master.parameters()]
    parts, _ = run.train_step(1e-4)
    assert parts[0] < 0.5  # a new one starts at the logarithm of the vocabulary, 6.5
    moved = [not torch.equal(a, b) for a, b in zip(before, run.master.parameters(), strict=True)]
    assert sum(moved) > 0.95 * len(moved)
    run.save()
    again = Run(lm_arguments(started, tmp_path / "lm"))
    assert again.step == 1
    assert all(torch.equal(a, b) for a, b in zip(run.master.parameters(), again.master.parameters(), strict=True))


@pytest.mark.parametrize("program", [train_tower, train_aligner])
def test_the_other_stages_take_it(program: Any, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read it and, with no minutes left, write the same weights again."""
    name = program.__name__.removeprefix("training.train_")
    shutil.copytree(started / name, tmp_path / name)
    flags = [f"--out={tmp_path / name}", "--minutes=1e-9"]
    if program is train_aligner:
        flags += [f"--tower={started / 'tower' / 'tower.pt'}", f"--tokenizer={started / 'lm'}"]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    whole = program.sample
    monkeypatch.setattr(program, "sample", lambda split, first, *_, **__: whole(split, first, 3, 3))
    program.main()
    kept, before = (torch.load(folder / name / f"{name}.pt") for folder in (tmp_path, started))
    assert len(kept["optim"]) == 2
    assert kept["model"].keys() == before["model"].keys()
    assert all(torch.equal(kept["model"][key], value) for key, value in before["model"].items())


def test_the_projector_is_the_one_that_stage_2_left(started: Path) -> None:
    tower = load_tower(started / "tower" / "tower.pt")
    model, _ = load_model(started / "lm", tower)
    assert torch.equal(tower.linear_2.weight, model.last.weight)
    assert torch.equal(tower.linear_2.bias, model.last.bias)


def test_new_words_need_a_read_out_that_was_trained(started: Path) -> None:
    coder = Coder(load_tokenizer(started / "lm"))
    with pytest.raises(ValueError, match="run train_tower first"):
        word_directions(started / "tower" / "tower.pt", coder)


def test_a_run_is_not_overwritten(started: Path, tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "last.pt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"last\.pt"):
        start(SHIPPED, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["last.pt"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    weights = load_file(SHIPPED / "model.safetensors")
    weights["image_newline"] = weights["image_newline"][:1]  # would be broadcast
    weights["lora"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(SHIPPED / "config.json", tmp_path)
    with pytest.raises(ValueError, match="lora, image_newline"):
        start(tmp_path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
