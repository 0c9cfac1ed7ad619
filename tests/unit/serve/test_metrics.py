"""What is counted, how the counts of several engines are added, and how Prometheus sees them.

No engine is started.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from metok_vllm.contract import refusals as metrics_refused
from metok_vllm.contract.counters import (
    EVENT_BOUNDS,
    KV_KINDS,
    TIMED_PARTS,
    TOKEN_COUNTS,
    Histogram,
    summed,
)
from metok_vllm.contract.kv_spec import PLAIN_KINDS
from metok_vllm.media.children.outcomes import publish
from metok_vllm.scheduler.chunking import DeferralBudget
from metok_vllm.scheduler.counters import SchedulerCounters
from metok_vllm.serve.figures import Latest, engine_figures, recent_requests
from metok_vllm.serve.metrics import MetokCollector
from metok_vllm.serve.shadow.record import Record
from metok_vllm.worker.counters import PruningCounters
from metok_vllm.worker.timing import PartTimes

ROOT = Path(__file__).resolve().parents[3]


def tokens(*counts: int) -> dict[str, int]:
    return dict(zip(TOKEN_COUNTS, counts, strict=True))


def kv(stock: int, metok: int) -> dict[str, int]:
    return dict(zip(KV_KINDS, (stock, metok), strict=True))


@given(st.lists(st.floats(0, 40, allow_nan=False)), st.lists(st.sampled_from([0.0, 1.0, 2.5, 10.0, 20.0])))
def test_a_histogram_counts_as_prometheus_does(values: list[float], on_bounds: list[float]) -> None:
    bounds = (1.0, 2.5, 10.0)
    histogram = Histogram(bounds)
    for value in values + on_bounds:
        histogram.observe(value)
    snapshot = histogram.snapshot()
    below = 0
    for bound, count in zip((*bounds, math.inf), snapshot["counts"], strict=True):
        below += count
        assert below == sum(value <= bound for value in values + on_bounds)
    assert snapshot["sum"] == pytest.approx(sum(values + on_bounds))


def test_a_snapshot_does_not_change_with_what_comes_after() -> None:
    counters = PruningCounters()
    before = counters.snapshot()
    counters.add(tokens(9, 8, 7, 6, 5, 3), kv(100, 40), [5, 2])
    after = counters.snapshot()
    assert before["requests"] == 0
    assert sum(before["events"]["counts"]) == 0
    assert after["visual_tokens"] == tokens(9, 8, 7, 6, 5, 3)
    assert (after["requests"], after["videos"], after["kv_bytes"]) == (1, 2, kv(100, 40))
    assert after["events"]["sum"] == 7


def test_snapshots_of_engines_are_added_entry_by_entry() -> None:
    first, second = PruningCounters(), PruningCounters()
    first.add(tokens(9, 8, 7, 6, 5, 3), kv(100, 40), [5])
    second.add(tokens(1, 1, 1, 1, 0, 1), kv(10, 4), [5, 1])
    total = summed([first.snapshot(), second.snapshot(), PruningCounters().snapshot()])
    together = PruningCounters()
    together.add(tokens(9, 8, 7, 6, 5, 3), kv(100, 40), [5])
    together.add(tokens(1, 1, 1, 1, 0, 1), kv(10, 4), [5, 1])
    assert total == together.snapshot()


@pytest.mark.parametrize("snapshots", [[], [{"a": 1}, {"b": 1}], [{"a": [1]}, {"a": [1, 2]}]])
def test_snapshots_of_different_shapes_are_not_added(snapshots: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        summed(snapshots)


# --- the scheduler's ---


def test_prompts_are_counted_once_by_kind() -> None:
    counters = SchedulerCounters()
    requests: Any = {
        "a": SimpleNamespace(num_prompt_tokens=100, num_preemptions=0),
        "b": SimpleNamespace(num_prompt_tokens=10, num_preemptions=0),
        "resumed": SimpleNamespace(num_prompt_tokens=1000, num_preemptions=1),
    }
    new: Any = [
        SimpleNamespace(sampling_params=None, req_id=name, num_computed_tokens=8 * (name == "b")) for name in requests
    ]
    counters.admitted(new, requests, {"a", "resumed"})
    snapshot = counters.snapshot([], DeferralBudget(1, limit=20, held={"x": 5, "y": 6}), {"a": 1})
    assert snapshot["prompt_tokens"] == {"pruned": 100, "other": 10}
    assert snapshot["cache_hit_tokens"] == {"pruned": 0, "other": 8}
    assert snapshot["deferral"] == {"requests": 2, "reserved": 11, "limit": 20}
    assert snapshot["blocks"] == dict.fromkeys(PLAIN_KINDS, 0)


# --- refused requests ---


def refused() -> dict[str, float]:
    counter = metrics_refused.refused_counter()
    return {reason: counter.labels(reason)._value.get() for reason in metrics_refused.REASONS}


def test_only_what_is_refused_is_counted() -> None:
    before = refused()
    with metrics_refused.refusing("setting"):
        pass
    assert refused() == before
    with pytest.raises(ValueError, match="one sentence"), metrics_refused.refusing("setting"):
        raise ValueError("one sentence")
    with pytest.raises(RuntimeError), metrics_refused.refusing("setting"):
        raise RuntimeError("a bug is not a refusal")
    assert str(metrics_refused.refusal("no_text", "another")) == "another"
    assert refused() == {**before, "setting": before["setting"] + 1, "no_text": before["no_text"] + 1}


# --- asking the engines ---


def test_who_has_waited_long_enough_gets_the_answer_before() -> None:
    async def scenario() -> None:
        busy = asyncio.Event()
        asked = 0

        async def ask() -> int:
            nonlocal asked
            asked += 1
            number = asked
            if number == 2:
                await busy.wait()
            if number == 3:
                raise RuntimeError("the engine is gone")
            return number

        latest = Latest(ask, kept=0, patience=0.05)
        assert math.isnan(latest.age)
        assert await latest.refresh() == 1
        assert await latest.refresh() == 1, "the engine is busy: the answer before"
        assert await latest.refresh() == 1
        assert asked == 2, "no question is asked while one is open"
        assert latest.age >= 0.1
        busy.set()
        assert await latest.refresh() == 2
        young = latest.age
        assert await latest.refresh() == 2, "the engine has failed: the answer before"
        assert latest.age > young
        assert await latest.refresh() == 4, "and it is asked again"

    asyncio.run(scenario())


def test_a_young_answer_is_not_asked_for_again() -> None:
    asked = 0

    async def ask() -> int:
        nonlocal asked
        asked += 1
        return asked

    async def scenario() -> None:
        latest = Latest(ask, kept=60, patience=1)
        assert [await latest.refresh() for _ in range(3)] == [1, 1, 1]

    asyncio.run(scenario())


class FakeCore:
    """Two engines of two ranks each, as `AsyncMPClient.call_utility_all_async` answers for them."""

    def __init__(self, stats: list[dict[str, Any]], schedulers: list[dict[str, Any]]) -> None:
        self.stats = stats
        self.schedulers = schedulers

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        if method == "scheduler":
            return self.schedulers
        assert (method, args[1:]) == ("collective_rpc", (None, (), None))
        if args[0] == "metok_recent":
            return [[[{"time": 3}, {"time": 1}], None], [None, [{"time": 2}]]]
        return [[stats, None] for stats in self.stats]


def worker_stats(counters: PruningCounters, deferred: int = 0) -> dict[str, Any]:
    times = PartTimes()
    with times.part("tower"):
        pass
    return {**counters.snapshot(), "deferred_bytes": deferred, "seconds": times.snapshot(), "unmeasured": 0}


def two_engines() -> Any:
    counters = PruningCounters()
    counters.add(tokens(100, 80, 60, 20, 10, 5), kv(1000, 300), [5, 1])
    scheduler = SchedulerCounters()
    scheduler.refused["prompt_logprobs"] = 2
    answers = [scheduler.snapshot([], DeferralBudget(1, limit=50, held={"a": 7}), {"a": 1}) for _ in range(2)]
    return SimpleNamespace(engine_core=FakeCore([worker_stats(counters, 3), worker_stats(counters, 4)], answers))


def test_figures_are_sums_over_engines_and_first_ranks() -> None:
    figures = asyncio.run(engine_figures(two_engines()))
    assert figures["engines"] == 2
    assert figures["worker"]["visual_tokens"] == tokens(200, 160, 120, 40, 20, 10)
    assert figures["worker"]["deferred_bytes"] == 7
    assert figures["scheduler"]["deferral"] == {"requests": 2, "reserved": 14, "limit": 100}
    assert [one["time"] for one in asyncio.run(recent_requests(two_engines()))] == [3, 2, 1]


# --- Prometheus ---


def scrape(collector: MetokCollector) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    registry.register(collector)
    text = generate_latest(registry).decode()
    return {
        (
            sample.name,
            next((v for k, v in sample.labels.items() if k != "le"), "") + sample.labels.get("le", ""),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_figure_reaches_prometheus() -> None:
    figures: Latest[dict[str, Any]] = Latest(lambda: engine_figures(two_engines()))
    asyncio.run(figures.refresh())
    before = refused()
    seen = scrape(MetokCollector(figures))
    assert {k[1]: v for k, v in seen.items() if k[0] == "metok_visual_tokens_total"} == tokens(
        200, 160, 120, 40, 20, 10
    )
    assert seen["metok_kv_stock_bytes_total", ""] == 2000
    assert seen["metok_kv_held_bytes_total", ""] == 600
    assert seen["metok_kv_saved_bytes_total", ""] == 1400
    assert seen["metok_pruned_requests_total", ""] == 2
    assert seen["metok_pruned_videos_total", ""] == 4
    assert seen["metok_events_per_video_count", ""] == 4
    assert seen["metok_events_per_video_sum", ""] == 12
    assert seen["metok_events_per_video_bucket", "1.0"] == 2
    assert seen["metok_events_per_video_bucket", "4.0"] == 2
    assert seen["metok_events_per_video_bucket", "5.0"] == 4
    assert seen["metok_events_per_video_bucket", "+Inf"] == 4
    assert {k[1] for k in seen if k[0] == "metok_stage_seconds_count"} == set(TIMED_PARTS)
    assert seen["metok_stage_seconds_count", "tower"] == 2
    assert seen["metok_deferral_buffer_bytes", ""] == 7
    assert seen["metok_deferral_reserved_bytes", ""] == 14
    assert seen["metok_deferral_limit_bytes", ""] == 100
    assert {k[1] for k in seen if k[0] == "metok_kv_blocks"} == set(PLAIN_KINDS)
    assert seen["metok_refused_requests_total", "prompt_logprobs"] == before["prompt_logprobs"] + 4
    assert seen["metok_refused_requests_total", "setting"] == before["setting"]
    assert 0 <= seen["metok_figures_age_seconds", ""] < 60
    assert all(name.startswith("metok_") for name, _ in seen)
    assert len(EVENT_BOUNDS) + 1 == sum(name == "metok_events_per_video_bucket" for name, _ in seen)


def test_a_scrape_before_any_answer_says_so() -> None:
    async def never() -> dict[str, Any]:
        raise RuntimeError("no engine")

    seen = scrape(MetokCollector(Latest(never)))
    assert math.isnan(seen["metok_figures_age_seconds", ""])
    engines = {name for name, _ in seen if not name.startswith("metok_video_")}
    assert engines == {"metok_figures_age_seconds", "metok_refused_requests_total"}


def test_every_metric_is_documented() -> None:
    figures: Latest[dict[str, Any]] = Latest(lambda: engine_figures(two_engines()))
    asyncio.run(figures.refresh())
    publish(running=0, waiting=0, memory=0)  # as a server's pool of decoders does
    Record()  # as one with `shadow_rate` does
    families = list(MetokCollector(figures).collect())
    page = (ROOT / "docs" / "metrics.md").read_text()
    for family in families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"| `{name}` | {family.type} |" in page, name
    documented = [line for line in page.splitlines() if line.startswith("| `metok_")]
    assert len(documented) == len(families)


SEVERAL_SERVERS = """
import asyncio, os, sys
from prometheus_client import Counter, CollectorRegistry
from metok_vllm.contract import refusals as metrics_refused
from metok_vllm.serve.figures import Latest
from metok_vllm.serve.metrics import serve_metrics

of_vllm = Counter("vllm:something", "Of vLLM.", registry=CollectorRegistry())
of_vllm.inc()
metrics_refused.refused_counter()
metrics_refused.count_refused("setting")
if sys.argv[1] == "scrape":
    app = serve_metrics(Latest(None))
    async def receive(): return {"type": "http.request"}
    async def send(message): sys.stdout.write(message.get("body", b"").decode())
    asyncio.run(app({"type": "http", "headers": [], "query_string": b""}, receive, send))
"""


def test_several_api_servers_are_added_up_and_vllms_metrics_stay(tmp_path: Path) -> None:
    """As with `--api-server-count`: each process writes to files, any one is scraped."""
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for role in ("other", "scrape"):
        done = subprocess.run(
            [sys.executable, "-c", SEVERAL_SERVERS, role],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    samples = {
        (sample.name, sample.labels.get("reason", "")): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
    }
    assert samples["metok_refused_requests_total", "setting"] == 2
    assert samples["metok_refused_requests_total", "no_text"] == 0
    assert samples["vllm:something_total", ""] == 2
    assert done.stdout.count("# TYPE metok_refused_requests_total") == 1
