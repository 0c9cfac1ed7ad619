"""A Llama inside LLaVA-OneVision: METok prunes whatever decoder the family's stock class builds,
and equals the oracle.

The checkpoint is the second witness's (`benchmarks/witness/checkpoint.py`) around a small random Llama: its
tower reads word embeddings out of pixels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaOnevisionForConditionalGeneration

from benchmarks.witness.checkpoint import paint, write
from metok_vllm.demo.checkpoint import make_tokenizer
from tests.support.guards.launches import deep_launches
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample

SIDE, FRAMES = 3, 24


def llama() -> Any:
    """Grouped queries, sharp enough that tokens and survivors differ."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write(llama(), make_tokenizer(), tmp_path_factory.mktemp("llama"), SIDE)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    with engine(Sample(folder, model.eval(), AutoProcessor.from_pretrained(folder))) as started:
        yield started


def words(running: Engine) -> torch.Tensor:
    return running.sample.model.get_input_embeddings().weight.detach()


def captions(running: Engine, seed: int) -> np.ndarray:
    """Six scenes of random words, four frames each."""
    table = words(running)
    ids = torch.randint(0, 500, (6, SIDE * SIDE), generator=torch.Generator().manual_seed(seed))
    return paint(table[ids.repeat_interleave(FRAMES // 6, dim=0)], table, SIDE).numpy()


def test_what_was_painted_is_read(running: Engine) -> None:
    model, table = running.sample.model, words(running)
    rows = table[torch.randint(0, 500, (5, SIDE * SIDE), generator=torch.Generator().manual_seed(1))]
    pixels = running.sample.pixels(paint(rows, table, SIDE).numpy())
    with torch.no_grad():
        read = model.model.get_video_features(pixels[None]).pooler_output[0][: 5 * SIDE * SIDE]
    # Two bytes a number: half a step of the larger of the two ranges.
    assert (read.view_as(rows) - rows).abs().max() <= 1.1 * table.abs().max() / 2**16 + 4e-6
    fewer = running.sample.pixels(paint(rows[:, :4], table, SIDE).numpy())
    with torch.no_grad():
        read = model.model.get_video_features(fewer[None]).pooler_output[0][: 5 * SIDE * SIDE].view_as(rows)
    assert (read[:, 4:].abs() < 1e-4).all()


BALANCED = {"decode_retention": 1, "quota": "video"}


def test_a_batch_equals_the_oracle(running: Engine) -> None:
    settings: list[Any] = ["off", {}, {"decode_retention": 0.5}, {"preset": "balanced"}, {"events": 2, "key_events": 1}]
    cases = [Case((captions(running, number),), metok=metok, max_tokens=12) for number, metok in enumerate(settings)]
    expected = [running.oracle(replace(c, metok=BALANCED) if n == 3 else c) for n, c in enumerate(cases)]
    for ours, theirs in zip(expected, running.run(cases), strict=True):
        assert ours.score_margin > 1e-5, "choose another seed"
        assert_same(ours, theirs, 1e-3)
    survivors = [video.after_l2 for result in expected[1:] for video in result.videos or ()]
    assert all(after and len(after) < FRAMES * SIDE * SIDE / 2 for after in survivors)
    running.check_drained()


def test_the_folder_is_a_stock_checkpoint(running: Engine) -> None:
    folder = Path(running.sample.path)
    assert (folder / "model.safetensors").is_file()
    text = running.sample.model.config.text_config
    assert (text.model_type, text.architectures) == ("llama", ["LlamaForCausalLM"])


def test_a_pruned_step_launches_fused_operators(running: Engine) -> None:
    """As with Qwen2, see `test_eager_layers.py`: ten launches a layer, and two that only the CPU has."""
    with deep_launches() as found:
        running.run([Case((captions(running, 9),), max_tokens=4)])
    assert len(found) == 3
    for layers in found:
        assert layers.launches["_C::fused_add_rms_norm"] == 2
        assert layers.launches["_C::rotary_embedding"] == 1
        assert layers.total == 12, layers
