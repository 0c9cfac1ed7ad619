"""METok's Prometheus metrics on vLLM's own `/metrics`. `docs/metrics.md` lists them.

With one API server process vLLM serves prometheus_client's global registry: METok's collector is registered
there. With several (`--api-server-count`) vLLM makes a registry that no one else can reach, which merges what
the processes have written to files. `/metrics` is answered here then, by the same merge with METok's metrics
behind it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from metok_vllm.contract.counters import EVENT_BOUNDS, SECOND_BOUNDS
from metok_vllm.contract.refusals import FRONT_END, REFUSED, REFUSED_HELP, refused_counter
from metok_vllm.serve.figures import Latest

PATH = "/metrics"


class MetokCollector(Collector):
    """What the engines said last, and what this process has refused."""

    def __init__(self, figures: Latest[dict[str, Any]]) -> None:
        self.figures = figures
        refused_counter()

    def describe(self) -> Iterable[Metric]:
        """None: prometheus_client would otherwise collect at registration, when there is no engine to ask."""
        return []

    def collect(self) -> Iterator[Metric]:
        front_end = list(FRONT_END.collect())
        yield from (metric for metric in front_end if metric.name != REFUSED)
        yield from self.families(refused_in(front_end))

    def families(self, refused: Mapping[str, float]) -> Iterator[Metric]:
        """All metrics; `refused` is what the front end has refused, by reason."""
        figures = self.figures.value
        in_engine = {} if figures is None else figures["scheduler"]["refused"]
        reasons = {reason: count + in_engine.get(reason, 0) for reason, count in refused.items()}
        yield counter(REFUSED, REFUSED_HELP, "reason", reasons)
        yield gauge(
            "metok_figures_age_seconds", "Seconds since the engines gave the other figures here.", self.figures.age
        )
        if figures is not None:
            yield from worker_families(figures["worker"])
            yield from scheduler_families(figures["scheduler"])


class MergedCollector(Collector):
    """vLLM's metrics of several API server processes, and METok's."""

    def __init__(self, vllm: Collector, metok: MetokCollector) -> None:
        self.vllm = vllm
        self.metok = metok

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        metrics = list(self.vllm.collect())
        yield from (metric for metric in metrics if metric.name != REFUSED)
        yield from self.metok.families(refused_in(metrics))


def serve_metrics(figures: Latest[dict[str, Any]]) -> Any | None:
    """Put METok's metrics on `/metrics`.

    Returns:
        None where vLLM's own route serves them from now on; else the ASGI app that has to answer in its
        place.
    """
    metok = MetokCollector(figures)
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        REGISTRY.register(metok)
        return None
    registry = CollectorRegistry()
    # prometheus_client does not annotate this constructor; without a registry it registers itself nowhere.
    vllm: Any = MultiProcessCollector(None)  # type: ignore[no-untyped-call]
    registry.register(MergedCollector(vllm, metok))
    return make_asgi_app(registry=registry)


def refused_in(metrics: Iterable[Metric]) -> dict[str, float]:
    """Reason to count, of the front end's counter of refused requests."""
    return {
        sample.labels["reason"]: sample.value
        for metric in metrics
        if metric.name == REFUSED
        for sample in metric.samples
        if sample.name == f"{REFUSED}_total"
    }


def worker_families(worker: Mapping[str, Any]) -> Iterator[Metric]:
    """Metrics from `MetokWorkerExtension.metok_stats`, summed over the engines."""
    kv = worker["kv_bytes"]
    yield counter(
        "metok_pruned_requests", "Requests with a pruned video whose prompt was pruned.", value=worker["requests"]
    )
    yield counter("metok_pruned_videos", "Videos in those requests.", value=worker["videos"])
    yield counter(
        "metok_recomputed_prompts",
        "Pruned prompts that were computed once more after a preemption; no other total counts them again.",
        value=worker["recomputed"],
    )
    yield counter("metok_visual_tokens", "Visual tokens in and kept, by stage.", "stage", worker["visual_tokens"])
    yield counter(
        "metok_kv_stock_bytes", "KV cache bytes that their prompts would take in stock vLLM.", value=kv["stock"]
    )
    yield counter("metok_kv_held_bytes", "KV cache bytes that their prompts take.", value=kv["metok"])
    yield counter("metok_kv_saved_bytes", "KV cache bytes saved: stock less held.", value=kv["stock"] - kv["metok"])
    yield histogram(
        "metok_events_per_video", "Events of each pruned video.", EVENT_BOUNDS, None, {"": worker["events"]}
    )
    yield histogram(
        "metok_stage_seconds", "Time of each stage on the device.", SECOND_BOUNDS, "stage", worker["seconds"]
    )
    yield counter("metok_unmeasured_stages", "Stages left out of metok_stage_seconds.", value=worker["unmeasured"])
    yield gauge(
        "metok_deferral_buffer_bytes", "Bytes that deferred prompts hold on the first rank.", worker["deferred_bytes"]
    )


def scheduler_families(scheduler: Mapping[str, Any]) -> Iterator[Metric]:
    """Metrics from `SchedulerCounters.snapshot`, summed over the engines."""
    deferral = scheduler["deferral"]
    yield gauge("metok_deferral_reserved_bytes", "Bytes reserved for the prompts being deferred.", deferral["reserved"])
    yield gauge("metok_deferral_limit_bytes", "Most bytes that deferred prompts may take together.", deferral["limit"])
    yield gauge("metok_deferred_prompts", "Prompts being deferred.", deferral["requests"])
    yield gauge("metok_live_requests", "Requests with a pruned video, queued or running.", scheduler["pruned_requests"])
    blocks = GaugeMetricFamily(
        "metok_kv_blocks", "KV cache blocks of live requests, by what they hold.", labels=["holds"]
    )
    for kind, count in scheduler["blocks"].items():
        blocks.add_metric([kind], count)
    yield blocks
    yield counter(
        "metok_prompt_tokens", "Prompt tokens of requests that began to run.", "requests", scheduler["prompt_tokens"]
    )
    yield counter(
        "metok_prefix_cache_hit_tokens",
        "Those of them that the prefix cache gave.",
        "requests",
        scheduler["cache_hit_tokens"],
    )


def counter(
    name: str, text: str, label: str | None = None, by_label: Mapping[str, float] | None = None, value: float = 0
) -> Metric:
    """A counter with one label and its values, or with none and one value."""
    family = CounterMetricFamily(name, text, labels=[label] if label else None)
    for key, count in (by_label or {"": value}).items():
        family.add_metric([key] if label else [], count)
    return family


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def histogram(
    name: str, text: str, bounds: Sequence[float], label: str | None, by_label: Mapping[str, Mapping[str, Any]]
) -> Metric:
    """A histogram from `Histogram.snapshot`s."""
    family = HistogramMetricFamily(name, text, labels=[label] if label else None)
    limits = [*map(str, bounds), "+Inf"]
    for key, snapshot in by_label.items():
        buckets = list(zip(limits, accumulate(snapshot["counts"]), strict=True))
        family.add_metric([key] if label else [], buckets, snapshot["sum"])
    return family
