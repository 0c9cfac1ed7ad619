"""METok's metrics on the real server's /metrics: exact, bounded in time,
and absent where METok was not asked for.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from metok_vllm.contract.counters import TIMED_PARTS, TOKEN_COUNTS
from metok_vllm.contract.refusals import REASONS
from metok_vllm.serve.figures import KEPT_SECONDS, PATIENCE_SECONDS
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import OPTIONS, ask, measured_after_now
from tests.support.server.clips import mp4
from tests.support.server.live import Server, serving

Samples = dict[str, float]


def read_metrics(text: str) -> Samples:
    """Every sample by its name and labels, ``name{a=b}``; fails where a family comes twice."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a metric comes twice"
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def scrape(server: Server) -> Samples:
    """What /metrics says of the time from now on."""

    def read() -> tuple[Samples, float]:
        status, body = server.get("/metrics")
        assert status == 200
        samples = read_metrics(body.decode())
        return samples, samples["metok_figures_age_seconds"]

    return measured_after_now(read)


def metok(samples: Samples) -> Samples:
    """METok's, but for those of decoding, which `test_hostile_load.py` looks at."""
    return {
        name: value
        for name, value in samples.items()
        if name.startswith("metok_") and not name.startswith("metok_video_")
    }


def risen(before: Samples, after: Samples) -> Samples:
    """Totals that have risen in between, and by how much."""
    return {
        name: value - before.get(name, 0)
        for name, value in metok(after).items()
        if value != before.get(name, 0) and name.split("{")[0].endswith(("_total", "_count", "_sum"))
    }


def test_totals_are_the_sums_of_the_reports(server: Server) -> None:
    before = scrape(server)
    asked: list[tuple[bytes | None, Any]] = [
        (mp4(scene_video(60, 9)), {"report": True}),
        (mp4(scene_video(61, 30)), {"report": True, "decode_retention": 1, "events": 7, "final_keep": 0.5}),
        (mp4(scene_video(62, 3, 1)), {"report": True, "decode_retention": 0}),
        (mp4(scene_video(63, 12)), "off"),
        (None, None),
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(server, *one, max_tokens=2), asked))
    reports = [json.loads(server.get(f"/v1/metok/reports/{answer.id}")[1]) for answer in answers[:3]]
    rise = risen(before, scrape(server))

    assert rise["metok_pruned_requests_total"] == 3
    assert rise["metok_pruned_videos_total"] == 3
    for stage in TOKEN_COUNTS:
        assert rise[f"metok_visual_tokens_total{{stage={stage}}}"] == sum(r["visual_tokens"][stage] for r in reports)
    kv = {kind: sum(report["kv_bytes"][kind] for report in reports) for kind in ("stock", "metok")}
    assert rise["metok_kv_stock_bytes_total"] == kv["stock"]
    assert rise["metok_kv_held_bytes_total"] == kv["metok"]
    assert rise["metok_kv_saved_bytes_total"] == kv["stock"] - kv["metok"] > 0
    assert rise["metok_events_per_video_count"] == 3
    assert rise["metok_events_per_video_sum"] == sum(report["videos"][0]["events"] for report in reports) == 15
    prompts = [len(answer.prompt_token_ids) for answer in answers]
    assert rise["metok_prompt_tokens_total{requests=pruned}"] == sum(prompts[:3])
    assert rise["metok_prompt_tokens_total{requests=other}"] == sum(prompts[3:])
    assert not [name for name in rise if name.startswith("metok_refused")]


def test_a_second_look_at_the_same_text_hits_the_prefix_cache(server: Server) -> None:
    question = "One text, long enough to fill more than one block of the cache. " * 4
    ask(server, None, question=question, max_tokens=1)
    before = scrape(server)
    ask(server, None, question=question, max_tokens=1)
    rise = risen(before, scrape(server))
    assert rise["metok_prefix_cache_hit_tokens_total{requests=other}"] % 32 == 0
    assert "metok_prefix_cache_hit_tokens_total{requests=pruned}" not in rise


REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("setting", {"no such key": 1}, {}),
    ("setting", {"token_budget": 1}, {}),
    ("setting", {"aligner": "dual-tower"}, {}),
    ("prompt_logprobs", None, {"extra": {"prompt_logprobs": 1}}),
]


@pytest.mark.parametrize(("reason", "settings", "options"), REFUSED, ids=[str(one[1:]) for one in REFUSED])
def test_a_refused_request_is_counted_once_by_its_reason(
    server: Server, reason: str, settings: Any, options: dict[str, Any]
) -> None:
    before = scrape(server)
    with pytest.raises(openai.BadRequestError):
        ask(server, mp4(scene_video(64, 8)), settings, **options)
    assert risen(before, scrape(server)) == {f"metok_refused_requests_total{{reason={reason}}}": 1}


def test_a_broken_video_is_counted(server: Server) -> None:
    before = scrape(server)
    with pytest.raises(openai.BadRequestError):
        ask(server, mp4(scene_video(64, 8))[:200])
    assert risen(before, scrape(server)) == {"metok_refused_requests_total{reason=video}": 1}


def test_stages_are_timed_where_a_video_is_pruned_and_nowhere_else(server: Server) -> None:
    def counts(rise: Samples) -> Samples:
        return {stage: rise.get(f"metok_stage_seconds_count{{stage={stage}}}", 0) for stage in TIMED_PARTS}

    before = scrape(server)
    ask(server, None, max_tokens=1)
    ask(server, mp4(scene_video(66, 9)), "off", max_tokens=1)
    between = scrape(server)
    assert not any(count for stage, count in counts(risen(before, between)).items() if stage != "tower")
    for seed in (67, 68):
        ask(server, mp4(scene_video(seed, 9)), max_tokens=4)
    rise = risen(between, scrape(server))
    count = counts(rise)
    assert count["tower"] == count["stage1"] == 2
    assert count["scoring"] == count["deep"] >= 2
    assert count["shallow"] >= 2
    assert all(0 < rise[f"metok_stage_seconds_sum{{stage={stage}}}"] < 60 for stage in TIMED_PARTS)


def test_every_reason_is_there_from_the_start(server: Server) -> None:
    samples = scrape(server)
    assert {f"metok_refused_requests_total{{reason={reason}}}" for reason in REASONS} <= set(samples)


def test_blocks_are_shown_while_they_are_held(server: Server) -> None:
    groups = json.loads(server.get("/v1/metok/state")[1])["workers"][0]["groups"]
    counts = Counter(group["holds"] for group in groups)
    sizes = {group["holds"]: group["block_size"] for group in groups}

    def held(samples: Samples, kind: str) -> float:
        """Slots of one group of this kind; all groups of a kind hold as many."""
        return samples[f"metok_kv_blocks{{holds={kind}}}"] / counts[kind] * sizes[kind]

    idle = scrape(server)
    assert [value for name, value in idle.items() if name.startswith("metok_kv_blocks")] == [0, 0, 0]
    for name in ("metok_live_requests", "metok_deferral_buffer_bytes", "metok_deferral_reserved_bytes"):
        assert idle[name] == 0
    assert idle["metok_deferral_limit_bytes"] > 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, mp4(scene_video(65, 32)), {"decode_retention": 0}, max_tokens=400)
        seen = []
        while not answer.done():
            seen.append(scrape(server))
        answer.result()
    alive = [samples for samples in seen if samples["metok_live_requests"] == 1 and held(samples, "text")]
    assert alive, "no scrape fell into the request's time"
    assert all(held(samples, "text") < held(samples, "every token") for samples in alive)
    assert held(scrape(server), "every token") == 0


def test_a_scrape_does_not_wait_for_an_engine_that_does_not_answer(server: Server) -> None:
    before = scrape(server)
    (engine,) = (
        child for child in psutil.Process(server.process.pid).children(recursive=True) if "EngineCore" in child.name()
        or "EngineCore" in " ".join(child.cmdline())
    )  # fmt: skip
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        time.sleep(KEPT_SECONDS + 0.1)
        for path in ("/metrics", "/metrics", "/v1/metok/status"):
            begun = time.monotonic()
            status, body = server.get(path)
            assert status == 200
            assert time.monotonic() - begun < PATIENCE_SECONDS + 10
            if path == "/metrics":
                samples = read_metrics(body.decode())
                age = samples.pop("metok_figures_age_seconds")
                assert age > PATIENCE_SECONDS
                assert metok(samples) == {k: v for k, v in metok(before).items() if k != "metok_figures_age_seconds"}
            else:
                assert json.loads(body)["engine_figures_age_seconds"] > age
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    scrape(server)  # ends only once the engine answers again


def test_a_stock_server_has_no_metrics_and_no_page_of_metok(sample: Sample, tmp_path: Path) -> None:
    """The plugin is installed, as everywhere in this environment, and not asked for."""
    with serving(sample.path, tmp_path / "log", "--served-model-name", "tiny", *OPTIONS) as stock:
        status, body = stock.get("/metrics")
        assert status == 200
        assert b"vllm:" in body
        assert b"metok" not in body
        for path in ("/metok", "/v1/metok/status", "/v1/metok/state", "/v1/metok/reports/x"):
            assert stock.get(path)[0] == 404
        # Without --trust-request-mm-kwargs vLLM answers for itself, as docs/options.md says.
        with pytest.raises(openai.BadRequestError, match="mm_processor_kwargs"):
            ask(stock, mp4(scene_video(1, 4)), {"events": 3})
