"""Real engines beside each other: tokens and KV blocks of stock, EVS, VidCom2, fewer frames and METok, one
tiny Qwen3-VL and one tiny Qwen2.5-VL.

Every number is worked out here from the frames, the tokenizer and the papers' rules alone.
"""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.models import qwen3_vl

from benchmarks.engine import cli, worker
from benchmarks.engine.families import LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL
from metok_vllm.models.registry import family_of, named
from tests.support.interpreter import quick

PAIRS, PER_PAIR, NEW = 8, 4 * 7, 3
# Events of 2, 2, 2, 1 and 1 pairs. Of the first three, the key events, the six best pairs stay whole: all.
# The others' best pairs are all they have, too, pooled by 2.
STAGE_1 = 6 * PER_PAIR + 2 * (2 * 4)
# A key event of 56 tokens keeps 76 % of them twice, rounded up; another one of 8 keeps 38 % once. L1, L2 and
# L3 are 1, 3 and 5 of 8 layers.
MEAN = (1 * STAGE_1 + 2 * (3 * 43 + 2 * 4) + 2 * (3 * 33)) / 8


FEWER = 7  # pairs: 196 tokens, nearest to those of stage 1

VARIANTS = {
    "qwen3-vl-tiny": "stock,evs-mean,evs-stage1,vidcom2-mean,vidcom2-stage1,metok-paper,metok-balanced",
    "qwen2.5-vl-tiny": "stock,fewer-frames,evs-mean,evs-stage1,metok-paper,metok-balanced",
}


@pytest.fixture(scope="module", params=VARIANTS)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program writes. Its workers run in this process: each saves the time to import vLLM."""
    folder, name = tmp_path_factory.mktemp("counts"), request.param
    arguments = [
        *("--small", "--model", name, "--counts", "--frames", str(2 * PAIRS), "--text-tokens", "30"),
        *("--max-tokens", str(NEW), "--videos", "1", "--work", str(folder), "--out", str(folder / "x.json")),
        *("--variants", VARIANTS[name]),
    ]

    def run_here(job: dict[str, Any], *_: Any) -> dict[str, Any]:
        gc.freeze()  # as in `tests/support/harness.py`
        return worker.measure(job)

    with pytest.MonkeyPatch.context() as patch, quick():
        patch.setattr(cli, "run_job", run_here)
        # As in `tests/engine/conftest.py`.
        patch.setattr(qwen3_vl, "triton_pos_embed_interpolate", qwen3_vl.pos_embed_interpolate_native)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main(arguments) == 0
    found: dict[str, Any] = json.loads((folder / "x.json").read_text())
    found["folder"] = folder / name
    return found


def text_tokens(folder: Path) -> int:
    """The turn without its video, and with Qwen3-VL around each pair when it is, where it begins and ends."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turn = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|vision_end|>"  # around the whole video, too: vLLM replaces what is between them
        "What happens after the band leaves the stage, and who is there?<|im_end|>\n<|im_start|>assistant\n"
    )
    if folder.name.startswith("qwen2"):
        return len(tokenizer(turn).input_ids)
    # 2 frames a second out of 24: the middle frames of twelve each, and of a pair the time half way.
    times = [(12 * pair + 6 + 12 * pair + 18) / 2 / 24 for pair in range(0, 2 * PAIRS, 2)]
    labels = [len(tokenizer(f"<{seconds:.1f} seconds>").input_ids) + 2 for seconds in times]
    return len(tokenizer(turn).input_ids) + sum(labels)


def blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


def test_dense_variants_hold_all_their_tokens_in_every_layer(result: dict[str, Any]) -> None:
    text = text_tokens(result["folder"])
    visual = {
        "stock": PAIRS * PER_PAIR,
        "fewer-frames": FEWER * PER_PAIR,
        "evs-mean": round(MEAN),
        "evs-stage1": STAGE_1,
        "vidcom2-mean": round(MEAN),
        "vidcom2-stage1": STAGE_1,
    }
    seen = [name for name in result["variants"] if not name.startswith("metok")]
    assert len(seen) >= 4
    for name in seen:
        count, entry = visual[name], result["variants"][name]
        tokens, whole = entry["tokens"], FEWER if name == "fewer-frames" else PAIRS
        assert tokens["visual_tokens"] == {"stock": whole * PER_PAIR, "encoded": count}, name
        assert (tokens["prompt_tokens"], tokens["text_tokens"]) == (text + count, text), name
        assert tokens["mean_over_layers"] == count
        (group,) = entry["kv"]["groups"]
        # The last new token is never computed.
        assert group["blocks_of_a_request"] == blocks(text + count + NEW - 1, group["block_size"]), name
        assert (group["layers"], group["block_size"]) == (8, 32)
        assert entry["kv"]["blocks_of_a_request"] == group["blocks_of_a_request"]
        if "pruning" in entry:
            assert entry["pruning"]["tokens"] == visual[name]


def test_metok_holds_visual_tokens_in_the_shallow_layers_alone(result: dict[str, Any]) -> None:
    text, entry = text_tokens(result["folder"]), result["variants"]["metok-paper"]
    tokens, visual = entry["tokens"], entry["tokens"]["visual_tokens"]
    assert (tokens["prompt_tokens"], tokens["text_tokens"]) == (text + STAGE_1, text)
    assert (visual["stock"], visual["encoded"], visual["retained"]) == (PAIRS * PER_PAIR, STAGE_1, 0)
    assert tokens["prune_layers"] == [1, 3, 5]
    held = {1: text + STAGE_1, 4: text, 3: text}  # by the number of layers: before L1, to L3, from there on
    assert sorted(group["layers"] for group in entry["kv"]["groups"]) == sorted(held)
    for group in entry["kv"]["groups"]:
        assert group["blocks_of_a_request"] == blocks(held[group["layers"]] + NEW - 1, group["block_size"])


def test_what_balanced_retains_is_held_up_to_l3(result: dict[str, Any]) -> None:
    text, entry = text_tokens(result["folder"]), result["variants"]["metok-balanced"]
    visual = entry["tokens"]["visual_tokens"]
    assert 0 < visual["retained"] == visual["after_l2"] < visual["encoded"] == STAGE_1
    by_layers = {group["layers"]: group for group in entry["kv"]["groups"]}
    for layers, held in {1: text + STAGE_1, 3: text}.items():
        assert by_layers[layers]["blocks_of_a_request"] == blocks(held + NEW - 1, by_layers[layers]["block_size"])
    # From L1 to L3, for the most that the question may leave.
    group = by_layers[4]
    least, most = (blocks(text + count + NEW - 1, group["block_size"]) for count in (visual["retained"], STAGE_1))
    assert least <= group["blocks_of_a_request"] < most


def test_a_mean_that_differs_from_the_planned_one_is_said(result: dict[str, Any]) -> None:
    """METok's own mean depends on how long the events of the video are; EVS was given the planned one."""
    tokens = result["variants"]["metok-paper"]["tokens"]
    visual = tokens["visual_tokens"]
    alive = [visual[name] for name in ("encoded", "after_l1", "after_l2", "after_l3")]
    bounds = [0, *tokens["prune_layers"], 8]
    mean = sum(count * (end - begin) for count, (begin, end) in zip(alive, pairwise(bounds), strict=True)) / 8
    assert tokens["mean_over_layers"] == pytest.approx(mean)
    assert result["expected"]["mean_over_layers"] == pytest.approx(MEAN)
    assert abs(mean - MEAN) < 0.25 * MEAN
    notes = [note for note in result["notes"] if note.startswith("metok-paper: ")]
    said = f"metok-paper: {mean:.1f} visual tokens a layer on average"
    assert [note.startswith(said) for note in notes] == ([True] if mean != MEAN else [])


@pytest.mark.parametrize("family", [LLAVA_ONEVISION, QWEN2_5_VL, QWEN3_VL], ids=lambda family: family.title)
def test_families_are_described_as_vllm_and_metok_have_them(family: Any) -> None:
    known = family_of([family.architecture])
    assert known is not None
    metok = named(known.module)
    assert metok.pool_style == family.style
    assert getattr(metok, "supported_video_pruning_methods", ()) == family.pruning
    assert family.model_type in known.model_types
