"""Training's own arithmetic against transformers', export, resume, and the parts around them."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from training.draw import draw_video
from training.export import export, export_aligner, load_model
from training.optim import orthogonalise
from training.packing import (
    Coder,
    Encoded,
    collate,
    embed,
    encode,
    mixed_plan,
    pick,
    plan,
    pooled_rows,
    stock_plan,
)
from training.questions import all_questions, questions
from training.tokenizer import load_tokenizer, train_tokenizer
from training.tower import STRIDES, Tower, TowerConfig, pool, warm_start
from training.train_aligner import build, copy_tower, encode_texts
from training.train_lm import LMConfig, Model, Run, evaluate, scores
from training.train_tower import Heads
from training.world import COLOURS, PLACES, SCENES, SHAPES, WORDS, make_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    load_tokenizer(out)
    return out


@pytest.fixture(scope="module")
def coder(folder: Path) -> Coder:
    return Coder(load_tokenizer(folder))


def rounded(module: Any) -> Any:
    """Weights that bf16 holds exactly, so that an exported copy is the same model."""
    for p in module.parameters():
        p.data.copy_(p.data.bfloat16().float())
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    net = Tower(TowerConfig(layers=2))
    warm_start(net, torch.from_numpy(draw_video(make_video(0))))
    return rounded(net)


@pytest.fixture(scope="module")
def model(tower: Tower, coder: Coder) -> Model:
    net = Model(LMConfig(coder.tok.get_vocab_size(), layers=3), tower)
    net.lm.lm_head.weight.data.mul_(20)
    return rounded(net).eval()


def fp32(tower: Tower, seed: int, frames: tuple[int, int] = (8, 12)) -> Encoded:
    v = make_video(seed, frames)
    with torch.no_grad():
        hidden = F.gelu(tower.linear_1(tower.encode(torch.from_numpy(draw_video(v)))))
        rows = torch.cat([pool(hidden, s) for s in STRIDES], 1).flatten(0, 1)
    return Encoded(v, rows, all_questions(v))


def test_words_are_single_tokens_and_any_text_survives(coder: Coder) -> None:
    for word in (*COLOURS, *SHAPES, *SCENES, *WORDS):
        assert len(coder.ids(word)) == 1, word
        assert len(coder.ids(f" {word}")) == 1, word
    assert all(len(coder.ids(f"\nA. {p}")) == 3 for p in PLACES)
    for text in ("Où est l'étoile? 数字 42\n\ttab", "<video>\nWhat?"):
        assert coder.tok.decode(coder.ids(text), skip_special_tokens=False) == text


def test_tokenizer_training_is_deterministic() -> None:
    texts = ["What colour was the star?", "In the sea one could see a red star."] * 5
    assert train_tokenizer(iter(texts), 300).to_str() == train_tokenizer(iter(texts), 300).to_str()


@pytest.mark.parametrize("stride", STRIDES)
def test_pool_is_bilinear_interpolation(stride: int) -> None:
    x = torch.randn(3, 64, 5)
    grid = x.transpose(1, 2).view(3, 5, 8, 8)
    want = F.interpolate(grid, size=(8 // stride, 8 // stride), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool(x, stride), want)


def test_plans_count_tokens() -> None:
    assert len(stock_plan(20)) == 3 + 20 * 16 + 1
    assert len(plan(5, [2, 4, 8, 8, 2], {1, 4})) == 3 + 16 + 4 + 1 + 1 + 16 + 2
    layout = mixed_plan(30, (0.3, 0.4, 0.3), random.Random(0))
    assert layout[-1] == -1
    rows = [r for r in layout if r >= 0]
    assert rows == sorted(set(rows))
    assert {r // 21 for r in rows} == set(range(30)), "a frame got no token"


def test_export_is_the_same_model_in_transformers(
    tower: Tower, model: Model, folder: Path, coder: Coder, tmp_path: Path
) -> None:
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    out = export(tower, model, folder, tmp_path / "hf")
    hf: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(out)
    video = fp32(tower, 5)
    asked = questions(video.video, 3, random.Random(0))
    with torch.no_grad():
        batch = collate(coder, [video], [stock_plan(video.video.frames)], [asked])
        packed = embed(model.lm, model.last, model.newline, coder.header, batch)
        mine = model.lm.lm_head(model.lm.hidden(packed)[0])[0].view(3, -1, model.lm.c.vocab)
        for row, q in zip(mine, asked, strict=True):
            content = [{"type": "video"}, {"type": "text", "text": q.prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            frames = draw_video(video.video)
            inputs = processor(text=text + q.answer, videos=[frames], return_tensors="pt")
            assert (inputs["input_ids"] == hf.config.video_token_id).sum() == video.video.frames * 16 + 1
            n = sum(map(len, coder.pair(q))) - 1
            theirs = hf(**inputs).logits[0, -n:]
            assert theirs.std() > 0.5, "logits too flat to tell models apart"
            torch.testing.assert_close(row[:n], theirs, atol=2e-4, rtol=1e-4)


def test_packing_changes_nothing(tower: Tower, model: Model, coder: Coder) -> None:
    videos = [fp32(tower, s, (f, f)) for s, f in ((1, 6), (2, 11))]
    rng = random.Random(1)
    plans = [stock_plan(6), mixed_plan(11, (0.3, 0.4, 0.3), rng)]
    asked = [pick(v, 4, ("letter", "open", "exists"), rng) for v in videos]

    def logits(chosen: list[int], questions_of: slice) -> list[torch.Tensor]:
        some = [asked[n][questions_of] for n in chosen]
        batch = collate(coder, [videos[n] for n in chosen], [plans[n] for n in chosen], some)
        with torch.no_grad():
            packed = embed(model.lm, model.last, model.newline, coder.header, batch)
            out = model.lm.lm_head(model.lm.hidden(packed)[0])
        return [o[t >= 0] for o, t in zip(out, batch.targets, strict=True)]

    together = logits([0, 1], slice(0, 4))
    for n in (0, 1):
        alone = torch.cat([logits([n], slice(m, m + 1))[0] for m in range(4)])
        torch.testing.assert_close(together[n], alone, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(together[0][:1], together[1][:1], atol=1e-2)


def test_exact_match_needs_every_token(tower: Tower, model: Model, coder: Coder) -> None:
    video = fp32(tower, 3)
    asked = pick(video, 4, ("open",), random.Random(0))
    batch = collate(coder, [video], [stock_plan(video.video.frames)], [asked])
    _, hits, _ = scores(model, coder, batch)
    assert hits == [[False] * 4]
    with torch.no_grad():
        packed = embed(model.lm, model.last, model.newline, coder.header, batch)
        guess = model.lm.lm_head(model.lm.hidden(packed)[0]).argmax(-1)
    at = batch.targets >= 0
    batch.targets[at] = guess[at]
    assert scores(model, coder, batch)[1] == [[True] * 4]
    last = at[0].nonzero()[-1].item()
    batch.targets[0, last] = (batch.targets[0, last] + 1) % 640
    assert scores(model, coder, batch)[1] == [[True] * 3 + [False]]


def test_muon_makes_singular_values_equal() -> None:
    u = orthogonalise(torch.randn(2, 24, 64))
    values = torch.linalg.svdvals(u.float())
    assert 0.6 < values.min() < values.max() < 1.4


def test_a_resumed_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Tower(TowerConfig())
    path = tmp_path / "tower.pt"
    both = torch.nn.ModuleList([net, Heads(net.c.out)])
    torch.save({"model": both.state_dict()}, path)
    args = argparse.Namespace(
        tower=path, out=folder, layers=9, lr=1e-3, pool=64, long=0.5, blind=0.2, tap=1, patience=10**6, clues=0.2
    )
    run = Run(args)
    before = [p.clone() for p in run.master.parameters()]
    first = [run.train_step(1e-3) for _ in range(3)]
    assert all(parts[0] > 0 for parts, _ in first)
    moved = [not torch.equal(a, b) for a, b in zip(before, run.master.parameters(), strict=True)]
    assert sum(moved) > 0.95 * len(moved)
    run.spent = 12.0
    run.save()
    again = Run(args)
    assert (again.step, again.spent, again.pool.next) == (3, 12.0, run.pool.next)
    for a, b in zip(run.master.parameters(), again.master.parameters(), strict=True):
        assert torch.equal(a, b)
    momenta = [o.state_dict()["state"] for o in again.optimisers]
    assert all(momenta)
    reread, state = load_model(folder, run.tower.float())
    assert state["step"] == 3
    assert torch.equal(reread.lm.norm, run.master.lm.norm)
    figures = evaluate(run.model, run.coder, [encode(run.tower.bfloat16(), make_video(9, (20, 24)), crf=23)], 4)
    assert {"open", "letter", "colour"} <= set(figures)


def test_aligner_exports_and_keeps_the_tower(tower: Tower, folder: Path, coder: Coder, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, SiglipModel

    torch.manual_seed(3)
    own = build(coder.tok.get_vocab_size(), tower.c)
    copy_tower(own, tower)
    torch.save({"model": own.state_dict()}, tmp_path / "aligner.pt")
    out = export_aligner(tmp_path / "aligner.pt", tower, folder, tmp_path / "metok_aligner")
    hf: Any = SiglipModel.from_pretrained(out, dtype=torch.float32).eval()
    frames = draw_video(make_video(2, (6, 8)))
    pixels = AutoImageProcessor.from_pretrained(out)(images=list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = hf.vision_model(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(states, tower.encode(torch.from_numpy(frames)), atol=2e-3, rtol=1e-2)
    text = "Where was the red star?"
    ids = AutoTokenizer.from_pretrained(out)(text, padding="max_length", max_length=32)["input_ids"]
    assert ids == encode_texts(coder.tok, [text])[0].tolist()


def test_pooled_rows_are_what_the_projector_would_pool(tower: Tower, model: Model) -> None:
    frames = torch.from_numpy(draw_video(make_video(6, (5, 6))))
    with torch.no_grad():
        late = model.last(pooled_rows(tower, frames).float()).view(len(frames), 21, -1)
        full = model.last(F.gelu(tower.linear_1(tower.encode(frames))))
        early = torch.cat([pool(full, s) for s in STRIDES], dim=1)
    torch.testing.assert_close(late, early, atol=3e-2, rtol=3e-2)
