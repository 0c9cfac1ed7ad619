"""A report as the engine makes it, without an engine: stage 1 on a real video, then the report's own code."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.request_ids import key
from metok_vllm.contract.settings import RequestSettings
from metok_vllm.contract.spans import VideoSpan, retained_bound
from metok_vllm.contract.video_plan import VideoGrid, VideoPlan, plan_video
from metok_vllm.models.base import MetokModel
from metok_vllm.scheduler.slot_counts import SlotCounts
from metok_vllm.worker import agreement
from metok_vllm.worker import report as engine_report
from metok_vllm.worker.requests import TAG_CHANNELS, PrunedRequest, PruningResult, VideoTags
from metok_vllm.worker.timing import PartTimes
from tests.support.choices import attach_settings
from tests.support.demo.stub_server import REQUEST_ID
from tests.support.oracle import stage1
from tests.support.oracle.samples import Sample

TEXT_TOKENS = 30


class _Model(MetokModel):
    """METok's stage 1 on the transformers model."""

    pool_style = PoolStyle("bilinear")

    def __init__(self, sample: Sample) -> None:
        self.hf = sample.model
        self.decoder_stack: Any = SimpleNamespace(times=PartTimes())

    def video_features(self, fields: Mapping[str, Any], item: int) -> torch.Tensor:
        return stage1.features(self.hf, fields["pixel_values_videos"][item])

    def separator(self) -> torch.Tensor:
        return self.hf.model.image_newline


def real_report(sample: Sample, frames: NDArray[np.uint8], patch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """The report on a video of `frames` [T, H, W, 3],
    events only (aligner "none"), as the endpoint sends it.
    """
    count = len(frames)
    patch.setattr(agreement, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    side = sample.model.config.vision_config.image_size // sample.model.config.vision_config.patch_size
    stock = count * (-(-side // 2)) ** 2 + 1
    stated = RequestSettings(report=True, **settings)
    plan = plan_video(VideoGrid(count, side, side), PoolStyle("bilinear"), stock, stated, "none")
    with torch.no_grad():
        encoded = _Model(sample).embed_video(plan, {"pixel_values_videos": [sample.pixels(frames)]}, 0)
    return _report(sample, plan, VideoTags.unpack(encoded[:, -TAG_CHANNELS:]), patch)


def _report(sample: Sample, plan: VideoPlan, tags: VideoTags, patch: pytest.MonkeyPatch) -> Any:
    span = VideoSpan(10, plan.tokens, plan)
    counts = SlotCounts(TEXT_TOKENS + plan.tokens, (span,))
    nothing = torch.zeros(0, dtype=torch.int64)
    request_id = f"{REQUEST_ID}-0123abcd"
    request = PrunedRequest(request_id, counts.prompt_len, (span,), nothing, nothing, nothing.numpy(), (0,), [tags])
    request.result = PruningResult(plan.tokens, plan.most_after_l1, plan.most_after_l2, retained_bound(counts.spans))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(),
            hf_text_config=sample.model.config.text_config,
            get_head_size=lambda: 32,
            dtype=torch.float32,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    attach_settings(config.model_config.hf_config, sample.model.config.text_config.num_hidden_layers)
    patch.setattr(engine_report, "get_tensor_model_parallel_rank", lambda: 0)
    reports = engine_report.Reports(config)
    reports.add(request)
    return reports.find(key(REQUEST_ID))
