"""What METok did to each request: one log line, totals,
and a record of the latest for the status page and for reports.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank

from metok_vllm.compression.accounting import ModelShape, VisualTokens, account
from metok_vllm.contract.request_ids import client_id, key, shown
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.video_plan import VideoPlan
from metok_vllm.log import metok_logger
from metok_vllm.worker.counters import PruningCounters
from metok_vllm.worker.requests import PrunedRequest, VideoTags
from metok_vllm.worker.timing import PartTimes

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = metok_logger(__name__)

KEPT_REPORTS = 256
"""Reports of the latest requests that asked for one; older ones are forgotten."""

KEPT_RECENT = 50
"""Requests that the status page shows."""

KEPT_REPORT_BYTES = 64 << 20
"""Most bytes of those reports together, as `Record.answer_bytes` reckons them; the latest is always there."""

KEPT_RECENT_BYTES = 8 << 20
"""The same of the requests that the status page shows: so large its JSON may become."""

REMEMBERED = 4096
"""So many of the latest requests are remembered,
so that a prompt computed again after a preemption is not counted twice.
"""


def model_shape(model_config: ModelConfig) -> ModelShape:
    """The language model's sizes for the accounting of docs/method.md section 5."""
    text = model_config.hf_text_config
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=model_config.get_head_size(),
    )


class Timeline:
    """What became of every frame of one video.

    Reading it waits for the device, so that is left to who asks.
    """

    def __init__(self, plan: VideoPlan, tags: VideoTags) -> None:
        self.plan = plan
        self._on_device: torch.Tensor | None = per_frame(tags, plan.frames)
        self._columns: dict[str, list[int]] = {}

    def columns(self) -> dict[str, list[int]]:
        """``event``, ``key`` (1 in a key event), ``stride`` and ``tokens``, each with an entry a frame."""
        if self._on_device is not None:
            event, is_key, tier, tokens = self._on_device.tolist()
            strides = [self.plan.strides[t] for t in tier]
            self._columns = {"event": event, "key": is_key, "stride": strides, "tokens": tokens}
            self._on_device = None
        return self._columns

    def summary(self) -> dict[str, int]:
        return {"frames": self.plan.frames, "events": self.plan.events, "stock_tokens": self.plan.stock_tokens}


def per_frame(tags: VideoTags, frames: int) -> torch.Tensor:
    """Event, key event, tier and number of tokens of every frame:
    int32 [4, frames], without waiting for the device.
    """
    # A client may give one uuid to two videos of as many tokens: the encoder's output is then the first's.
    frame = tags.frame.clamp(max=frames - 1)
    columns = torch.stack([tags.event, tags.is_key.to(torch.int64), tags.tier])
    table = columns.new_zeros(4, frames)
    # All tokens of a frame, its event's separator too, carry the same, so it does not matter which is
    # written last.
    table[:3].scatter_(1, frame.expand(3, -1), columns)
    table[3].index_add_(0, frame, torch.ones_like(frame))
    return table.to(torch.int32)


class Record:
    """One pruned request."""

    def __init__(self, summary: dict[str, Any], videos: Sequence[Timeline], question: Sequence[int] | None) -> None:
        self.summary = summary
        self.videos = videos
        self.question = question  # ids of its tokens; None where the operator does not let it be shown

    @property
    def answer_bytes(self) -> int:
        """About what it takes as JSON, and no less than it takes here."""
        frames = sum(video.plan.frames for video in self.videos)
        return _BYTES_AT_LEAST + _BYTES_A_FRAME * frames + _BYTES_A_TOKEN * len(self.question or ())

    def report(self) -> dict[str, Any]:
        """For the client that asked for it: per video one entry a frame."""
        videos = []
        for video in self.videos:
            columns = video.columns()
            frames = [
                {"event": event, "key_event": bool(key), "stride": stride, "tokens": tokens}
                for event, key, stride, tokens in zip(
                    columns["event"], columns["key"], columns["stride"], columns["tokens"], strict=True
                )
            ]
            videos.append({**video.summary(), "per_frame": frames})
        return {**self.summary, "videos": videos}

    def status(self) -> dict[str, Any]:
        """For the status page: per video one list a column."""
        videos = [{**video.summary(), "strides": list(video.plan.strides), **video.columns()} for video in self.videos]
        shown = {} if self.question is None else {"question_ids": list(self.question)}
        return {**self.summary, "videos": videos, **shown}


_BYTES_AT_LEAST = 2048
_BYTES_A_FRAME = 64
_BYTES_A_TOKEN = 32


class Kept:
    """The latest records by some key: bounded in number and in bytes, the oldest forgotten first."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most = most
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._records: OrderedDict[Hashable, Record] = OrderedDict()

    def put(self, key: Hashable, record: Record) -> None:
        """Keep one more, in the place of one with the same key. The latest is kept whatever its size."""
        self._forget(key)
        self._records[key] = record
        self.held_bytes += record.answer_bytes
        while len(self._records) > 1 and (len(self._records) > self.most or self.held_bytes > self.most_bytes):
            self._forget(next(iter(self._records)))

    def get(self, key: Hashable) -> Record | None:
        return self._records.get(key)

    def latest_first(self) -> list[Record]:
        return list(reversed(self._records.values()))

    def _forget(self, key: Hashable) -> None:
        record = self._records.pop(key, None)
        if record is not None:
            self.held_bytes -= record.answer_bytes


class Reports:
    """Logs and counts each pruned request and remembers the latest. Silent on all ranks but the first."""

    def __init__(self, vllm_config: VllmConfig, times: PartTimes | None = None) -> None:
        model_config = vllm_config.model_config
        choices = server_choices(model_config.hf_config)
        self.layers, self.window = choices.prune_layers, choices.window
        # Where nothing is pruned, models are served too whose sizes the accounting does not know.
        self.shape = None if self.layers is None else model_shape(model_config)
        dtype = model_config.dtype
        assert isinstance(dtype, torch.dtype)
        cache = vllm_config.cache_config.cache_dtype
        self.kv_element_bytes = 1 if cache.startswith("fp8") else dtype.itemsize
        self.keeps_questions = choices.settings.status_shows_questions
        self.times = times or PartTimes()
        self.counters = PruningCounters()
        # Ids are kept as digests or shortened (`contract/request_ids.py`): a client may make them long.
        self._recent = Kept(KEPT_RECENT, KEPT_RECENT_BYTES)
        self._asked_for = Kept(KEPT_REPORTS, KEPT_REPORT_BYTES)
        self._counted: OrderedDict[int, None] = OrderedDict()
        self._added = 0

    def add(self, request: PrunedRequest) -> None:
        """Log, count and remember one pruned request of a client's.

        Its tags must still be there; nothing waits for the device.

        Args:
            request: a request whose prompt has just been pruned.
        """
        if get_tensor_model_parallel_rank() != 0 or request.is_shadow:
            return
        client_sees = client_id(request.req_id)
        summary = self._summary(request, shown(client_sees))
        self._log(summary, len(request.spans))
        self._count(summary, request)
        videos = [
            Timeline(span.plan, tags)
            for span, tags in zip(request.spans, request.tags, strict=True)
            if tags is not None
        ]
        record = Record(summary, videos, request.question if self.keeps_questions else None)
        self._added += 1
        self._recent.put(self._added, record)
        if any(span.plan.report for span in request.spans):
            self._asked_for.put(key(client_sees), record)

    @staticmethod
    def _log(summary: dict[str, Any], videos: int) -> None:
        tokens, kv = summary["visual_tokens"], summary["kv_bytes"]
        window = summary.get("kv_layers")
        kept = f"kept in layers {window[0]} to {window[1] - 1}" if window else f"{tokens['retained']} retained"
        logger.info(
            "METok %s: %d video(s), visual tokens %d -> %d encoded -> %d after L1 -> %d after L2, %s; "
            "KV cache %d of %d bytes (%.1f%% saved)",
            summary["request_id"],
            videos,
            tokens["stock"],
            tokens["encoded"],
            tokens["after_l1"],
            tokens["after_l2"],
            kept,
            kv["metok"],
            kv["stock"],
            100 * (1 - kv["metok"] / kv["stock"]),
        )

    def _count(self, summary: dict[str, Any], request: PrunedRequest) -> None:
        request_hash = hash(request.req_id)
        if request_hash in self._counted:
            self.counters.recomputed += 1
            return
        self._counted[request_hash] = None
        while len(self._counted) > REMEMBERED:
            self._counted.popitem(last=False)
        self.counters.add(summary["visual_tokens"], summary["kv_bytes"], [span.plan.events for span in request.spans])

    def _summary(self, request: PrunedRequest, name: str) -> dict[str, Any]:
        result = request.result
        assert result is not None
        text = request.prompt_len - request.visual_tokens
        visual = VisualTokens(
            stock=sum(span.plan.stock_tokens for span in request.spans),
            encoded=result.encoded,
            after_l1=result.after_l1,
            after_l2=result.after_l2,
            retained=result.retained,
            after_l3=result.after_l3,
        )
        layers = self.layers
        assert layers is not None, "a server of stage 1 alone prunes no request"
        assert self.shape is not None
        costs = account(self.shape, layers, text, visual, kv_element_bytes=self.kv_element_bytes, window=self.window)
        return {
            "request_id": name,
            "time": time.time(),
            "prompt_tokens": request.prompt_len,
            "text_tokens": text,
            "prune_layers": list(layers),
            **({} if self.window is None else {"kv_layers": list(self.window)}),
            "score_rows": request.score_rows,
            "visual_tokens": {
                "stock": visual.stock,
                "encoded": visual.encoded,
                "after_l1": visual.after_l1,
                "after_l2": visual.after_l2,
                "retained": visual.retained,
                "after_l3": visual.after_l3,
            },
            "kv_bytes": {"stock": costs.kv_bytes_stock.total, "metok": costs.kv_bytes.total},
            "prefill_flops": {"stock": costs.prefill_flops_stock.total, "metok": costs.prefill_flops.total},
        }

    def find(self, request_key: str) -> dict[str, Any] | None:
        """The report of a request that asked for one, the latest of those with the same id; None where there
        is none.

        Args:
            request_key: `contract/request_ids.py: key` of the id that the client saw, and of no other.
        """
        record = self._asked_for.get(request_key)
        return None if record is None else record.report()

    def recent(self) -> list[dict[str, Any]]:
        """The latest pruned requests for the status page, latest first."""
        return [record.status() for record in self._recent.latest_first()]
