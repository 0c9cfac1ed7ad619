"""What METok did to each request: one log line, and a report for those who ask."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from metok_vllm.compression.accounting import ModelShape, VisualTokens, account
from metok_vllm.compression.selection import prune_layers
from metok_vllm.engine.facts import VideoSpan
from metok_vllm.engine.requests import PrunedRequest, VideoTags
from metok_vllm.engine.server import server_settings
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = metok_logger(__name__)

KEPT_REPORTS = 256
"""Reports of the latest requests that asked for one; older ones are forgotten."""


def model_shape(model_config: ModelConfig) -> ModelShape:
    """The language model's sizes for the accounting of method.md section 5."""
    text = model_config.hf_text_config
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=model_config.get_head_size(),
    )


class Reports:
    """Logs each pruned request and keeps the reports that were asked for. Silent on all ranks but the first."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        self.shape = model_shape(model_config)
        self.layers = prune_layers(self.shape.layers, server_settings(model_config.hf_config).prune_layers)
        dtype = model_config.dtype
        assert isinstance(dtype, torch.dtype)
        cache = vllm_config.cache_config.cache_dtype
        self.kv_element_bytes = 1 if cache.startswith("fp8") else dtype.itemsize
        self.by_id: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def add(self, request: PrunedRequest) -> None:
        """Log one pruned request; keep its report if it asked for one. Its tags must still be there."""
        if get_tensor_model_parallel_rank() != 0:
            return
        summary = self._summary(request)
        tokens, kv = summary["visual_tokens"], summary["kv_bytes"]
        logger.info(
            "METok %s: %d video(s), visual tokens %d -> %d encoded -> %d after L1 -> %d after L2, %d retained; "
            "KV cache %d of %d bytes (%.1f%% saved)",
            request.req_id,
            len(request.spans),
            tokens["stock"],
            tokens["encoded"],
            tokens["after_l1"],
            tokens["after_l2"],
            tokens["retained"],
            kv["metok"],
            kv["stock"],
            100 * (1 - kv["metok"] / kv["stock"]),
        )
        if not any(span.plan.report for span in request.spans):
            return
        summary["videos"] = [
            describe_video(span, tags)
            for span, tags in zip(request.spans, request.tags, strict=True)
            if tags is not None
        ]
        self.by_id[request.req_id] = summary
        self.by_id.move_to_end(request.req_id)
        while len(self.by_id) > KEPT_REPORTS:
            self.by_id.popitem(last=False)

    def _summary(self, request: PrunedRequest) -> dict[str, Any]:
        result = request.result
        assert result is not None
        text = request.prompt_len - request.visual
        visual = VisualTokens(
            stock=sum(span.plan.stock_tokens for span in request.spans),
            encoded=result.encoded,
            after_l1=result.after_l1,
            after_l2=result.after_l2,
            retained=result.retained,
        )
        costs = account(self.shape, self.layers, text, visual, kv_element_bytes=self.kv_element_bytes)
        return {
            "request_id": request.req_id,
            "prompt_tokens": request.prompt_len,
            "text_tokens": text,
            "prune_layers": list(self.layers),
            "visual_tokens": {
                "stock": visual.stock,
                "encoded": visual.encoded,
                "after_l1": visual.after_l1,
                "after_l2": visual.after_l2,
                "retained": visual.retained,
            },
            "kv_bytes": {"stock": costs.kv_bytes_stock.total, "metok": costs.kv_bytes.total},
            "prefill_flops": {"stock": costs.prefill_flops_stock.total, "metok": costs.prefill_flops.total},
        }

    def find(self, request_id: str) -> dict[str, Any] | None:
        """The report of a request, by the id that the client saw: vLLM appends to it inside the engine."""
        for req_id in reversed(self.by_id):
            if req_id == request_id or req_id.startswith(f"{request_id}-"):
                return self.by_id[req_id]
        return None


def describe_video(span: VideoSpan, tags: VideoTags) -> dict[str, Any]:
    """Events, tiers and tokens of every frame of one video, as plain data."""
    plan = span.plan
    event, key, frame, tier = (t.tolist() for t in (tags.event, tags.key, tags.frame, tags.tier))
    frames: list[dict[str, Any]] = [{} for _ in range(plan.frames)]
    for e, k, f, t in zip(event, key, frame, tier, strict=True):
        entry = frames[f]
        entry.setdefault("event", e)
        entry.setdefault("key_event", k)
        entry.setdefault("stride", plan.strides[t])
        entry["tokens"] = entry.get("tokens", 0) + 1
    return {"frames": plan.frames, "events": plan.events, "stock_tokens": plan.stock_tokens, "per_frame": frames}
