"""The second witness: its own decoder against transformers, its METok against the oracle, and its report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.witness import cli, methods, report, world
from metok_vllm.compression.pooling import pool_frames
from tests.support.oracle.run import Prefill, decode
from tests.support.oracle.settings import OracleSettings
from tests.support.oracle.stage2 import Video

LAYERS, STEPS = 10, 6
BEFORE, AFTER = [5, 9, 3, 14], [7, 2, 11, 6, 1]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random Llama with grouped queries, sharp enough that its tokens and survivors differ."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3)
    return model


def sequence(model: LlamaForCausalLM) -> tuple[Any, Any]:
    """Decoder, and 30 visual rows in four events of unequal length."""
    decoder = methods.Decoder(model)
    lengths = [3, 10, 6, 11]
    event = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    rows = torch.randn(30, 48, generator=torch.Generator().manual_seed(1)) * 0.5
    return decoder, methods.Visual(rows, event, torch.tensor([False, True, False, True]))


@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0])
def test_tokens_and_survivors_are_the_oracles(model, delta):
    decoder, visual = sequence(model)
    with torch.no_grad():
        past = methods.with_rows(decoder, methods.Cache(), decoder.embed(BEFORE))
    layers = methods.selection.prune_layers(LAYERS)
    done = methods.prefill(decoder, past, visual, AFTER, methods.metok_schedule(visual, layers))
    cache = methods.released(done, layers, delta)

    llava = SimpleNamespace(
        model=SimpleNamespace(language_model=model.model),
        lm_head=model.lm_head,
        get_input_embeddings=model.get_input_embeddings,
    )
    with torch.no_grad():
        hidden = torch.cat([decoder.embed(BEFORE), visual.rows, decoder.embed(AFTER)])
        is_text = [True] * len(BEFORE) + [False] * 30 + [True] * len(AFTER)
        state = Prefill(llava, hidden, is_text, OracleSettings(decode_retention=delta))
        begin = len(BEFORE)
        state.videos = [Video(begin, visual.event.tolist(), [1, 3], list(range(begin, begin + 30)))]
        state.run()
        tokens, _ = decode(llava, state, STEPS, None)

    assert state.limits == layers
    for limit, after in zip(layers[:2], state.videos[0].after[:2], strict=True):
        assert 0 < len(after) < 30
        assert done.scores[limit][0].tolist() == after
    assert [sorted(p.tolist()) for p in cache.positions] == [sorted(p) for p in state.kv_positions]
    assert methods.hits(decoder, done, [cache], tokens) == [[True] * STEPS]
    for step in range(1, STEPS):
        wrong = [*tokens[:step], (tokens[step] + 1) % 60]
        assert methods.hits(decoder, done, [cache], wrong) == [[True] * step + [False]]


def test_with_everything_kept_it_is_generate(model):
    """No pruning: the tokens of transformers' `generate`,
    whichever way the prompt is run, batched or alone.
    """
    decoder, visual = sequence(model)
    with torch.no_grad():
        past = methods.with_rows(decoder, methods.Cache(), decoder.embed(BEFORE))
        rows = torch.cat([decoder.embed(BEFORE), visual.rows, decoder.embed(AFTER)])
        out = model.generate(inputs_embeds=rows[None], max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    tokens = out[0].tolist()
    assert len(tokens) == STEPS
    assert len(set(tokens)) > 1
    done = methods.prefill(decoder, past, visual, AFTER, {})
    assert methods.hits(decoder, done, [done.cache, done.cache], tokens) == [[True] * STEPS] * 2
    with torch.no_grad():
        whole = methods.with_rows(decoder, past, visual.rows)
        shorter = methods.with_rows(decoder, past, visual.rows[:12])
    both = methods.plain_hits(decoder, [shorter, whole], AFTER, tokens)
    assert both[1] == [True] * STEPS
    assert both[0] == methods.plain_hits(decoder, [shorter], AFTER, tokens)[0] != both[1]


def test_words_survive_stocks_stride_and_blur_beyond_it():
    rows = torch.randn(32, world.WIDTH, 5)
    pool = pool_frames
    grid = world.tower_grid(rows)
    torch.testing.assert_close(pool(grid, 2, "average"), rows)
    torch.testing.assert_close(pool(grid, 4, "average"), (rows[:, 0::2] + rows[:, 1::2]) / 2)
    fine = methods.stage1(grid, torch.randn(3, 5), methods.FINE)
    torch.testing.assert_close(fine.rows, rows.flatten(0, 1))
    paper = methods.stage1(grid, torch.randn(3, 5), methods.PAPER)
    assert len(paper.rows) == 18 * 8 + 14 * 4  # at 32 frames no frame is of the third class


def test_videos_are_the_same_again_and_others_for_another_seed():
    video = world.make_video(4, 1)
    assert video == world.make_video(4, 1)
    assert video.captions != world.make_video(4, 2).captions
    assert len(video.captions) == world.FRAMES
    assert tuple(q.kind for q in video.questions) == world.KINDS
    for question in video.questions:
        assert question.given + question.answer in {c[: len(question.given + question.answer)] for c in video.captions}
        assert question.answer not in question.text


def test_report(tmp_path: Path):
    """Shares, paired differences and the probe from hand-made answers;
    a cut line of an interrupted run is dropped.
    """
    parts = []
    for video in range(4):
        rows = []
        for kind in world.KINDS:
            good, bad = {"hits": [True, True], "tokens": 8, "kv": 8}, {"hits": [True, False], "tokens": 4.0, "kv": 2.0}
            rows.append(
                {"video": video, "kind": kind, "methods": {"stock": good, "other": good if video == 0 else bad}}
            )
        parts.append({"part": "answers", "video": video, "cpu_s": 1.0, "rows": rows})
        curve = [False] * 20 + [True] * 11
        probe = [
            {"video": video, "kind": k, "everywhere": curve, "decoding": [] if k == "word" else curve}
            for k in world.KINDS
        ]
        parts.append({"part": "probe", "video": video, "cpu_s": 1.0, "rows": probe})
    options = argparse.Namespace(dtype="bfloat16", seed=1, videos=4, out=tmp_path / "w.json")
    report.write(parts, options)
    written = json.loads(options.out.read_text())
    other = written["methods"]["other"]
    assert other["accuracy"]["all"]["accuracy"] == 0.25
    assert other["accuracy"]["all"]["to_stock"]["difference"] == -0.75
    assert other["accuracy"]["long"]["n"] == 4
    assert other["first_token"]["accuracy"] == 1.0
    assert written["probe"]["word"]["decoding"] is None
    assert written["probe"]["open"]["everywhere"][19:21] == [0.0, 1.0]
    assert options.out.with_suffix(".png").stat().st_size > 0

    lines = tmp_path / "rows.jsonl"
    whole = json.dumps(parts[0]) + "\n"
    lines.write_text(whole + json.dumps(parts[1])[:40])
    assert cli.read(lines) == parts[:1]
    assert lines.read_text() == whole


@pytest.mark.parametrize("arguments", [["--videos", "0"], ["--videos", "3", "--probe-videos", "4"], ["--kind", "x"]])
def test_wrong_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.parse(arguments)
    assert "error" in capsys.readouterr().err
