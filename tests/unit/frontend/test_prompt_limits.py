"""A video that the server could never take: one sentence before vLLM's own, whose advice helps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from metok_vllm.contract import advice
from metok_vllm.contract.refusals import refused_counter

PROMPT = "<|im_start|>user\n<video>What is it?<|im_end|>\n<|im_start|>assistant\n"
Make = Callable[..., Any]


def process(config: Any, frames: int, metok: Any = None) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    items = processor.info.parse_mm_data({"video": [torch.zeros(frames, 3, 32, 32, dtype=torch.uint8)]})
    return processor(PROMPT, items, hf_processor_mm_kwargs={} if metok is None else {"metok": metok})


def budget(config: Any) -> int:
    """What vLLM reserves for the encoder's outputs."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    return MultiModalBudget(config, MULTIMODAL_REGISTRY).encoder_cache_size


def tokens(processed: Any) -> int:
    (place,) = processed["mm_placeholders"]["video"]
    return int(place.get_num_embeds())


SMALL = {"max_num_batched_tokens": 64, "max_num_seqs": 8}


@pytest.fixture(params=[True, False], ids=["requests state kwargs", "they may not"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setenv(advice.VARIABLE, str(int(request.param)))
    return bool(request.param)


def test_a_video_longer_than_the_encoder_cache(make_config: Make, told: bool) -> None:
    config = make_config(**SMALL)
    limit = budget(config)
    assert tokens(process(config, 32, "off")) == limit, "vLLM profiles with 32 frames"
    before = refused_counter().labels("video")._value.get()
    with pytest.raises(ValueError, match=f"does not fit the encoder cache of {limit}: ") as raised:
        process(config, 33, "off")
    assert refused_counter().labels("video")._value.get() == before + 1
    sentence = str(raised.value)
    assert ("media_io_kwargs" in sentence) == told
    assert "limit-mm-per-prompt" not in sentence
    # The advice: as many tokens a step as it says, and the same request passes; one fewer, and it does not.
    (number,) = map(int, re.findall(r"--max-num-batched-tokens (\d+)", sentence))
    followed = make_config(max_num_batched_tokens=number, max_num_seqs=8)
    assert tokens(process(followed, 33, "off")) == number == budget(followed)
    with pytest.raises(ValueError, match="does not fit"):
        process(make_config(max_num_batched_tokens=number - 1, max_num_seqs=8), 33, "off")


def test_a_pruned_video_is_measured_by_what_stage_1_leaves(make_config: Make) -> None:
    config = make_config(**SMALL)
    assert tokens(process(config, 40)) <= budget(config)
    with pytest.raises(ValueError, match="does not fit the encoder cache"):
        process(config, 40, "off")
    with pytest.raises(ValueError, match=r"^METok: a video of \d+ tokens does not fit"):
        process(config, 400)


def test_what_is_beyond_the_model_is_left_to_vllm(make_config: Make) -> None:
    """More tokens a step would not help there."""
    config = make_config(max_model_len=600, **SMALL)
    with pytest.raises(ValueError, match="does not fit the encoder cache"):
        process(config, 35, "off")
    assert tokens(process(config, 40, "off")) > 600 > budget(config)


def test_a_prompt_that_can_never_be_deferred(make_config: Make, told: bool) -> None:
    few = {"metok": {"max_deferred_bytes": 1000}}
    with pytest.raises(ValueError, match="bytes to defer and max_deferred_bytes is 1000: ") as raised:
        process(make_config(**SMALL, additional_config=few), 32)
    assert ("media_io_kwargs" in str(raised.value)) == told
    (stated,) = re.findall(r"--additional-config '(.+?)'", str(raised.value))
    process(make_config(**SMALL, additional_config=json.loads(stated)), 32)
    less = {"metok": {"max_deferred_bytes": json.loads(stated)["metok"]["max_deferred_bytes"] - 1}}
    with pytest.raises(ValueError, match="bytes to defer"):
        process(make_config(**SMALL, additional_config=less), 32)
