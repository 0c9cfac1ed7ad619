"""METok's HTTP side on an app without an engine: what is asked of the engines, and what is answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest

from metok_vllm.contract.admission import check_requests
from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.contract.request_ids import key
from metok_vllm.media import in_force
from metok_vllm.media.children import forks
from metok_vllm.media.children.outcomes import RUNNING
from metok_vllm.media.children.pool import Busy
from metok_vllm.media.in_force import decode_pool
from metok_vllm.media.settings import VideoSettings
from metok_vllm.scheduler.chunking import DeferralBudget
from metok_vllm.scheduler.counters import SchedulerCounters
from metok_vllm.serve import metrics, routes
from metok_vllm.serve.closing import GRACE_S
from metok_vllm.serve.routes import MetokRoutes, path_of
from metok_vllm.worker.counters import PruningCounters
from metok_vllm.worker.timing import PartTimes
from tests.support.choices import attach_settings
from tests.support.profiles import a_profile

RECENT = [{"request_id": "b", "time": 2.0, "videos": [], "question_ids": [3, 4]}, {"request_id": "a", "time": 1.0}]


class FakeCore:
    """One engine of one worker."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        counters = PruningCounters()
        self.answers: dict[str, Any] = {
            "metok_stats": {
                **counters.snapshot(), "deferred_bytes": 0, "seconds": PartTimes().snapshot(), "unmeasured": 0,
            },
            "metok_recent": RECENT,
            "metok_state": {"groups": []},
        }  # fmt: skip

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        if method == "scheduler":
            self.asked.append(method)
            return [SchedulerCounters().snapshot([], DeferralBudget(1, limit=10), {})]
        self.asked.append(args[0])
        if args[0] == "metok_report":
            found = [name for name in ("known", "some/id") if args[2] == (key(name),)]
            return [[{"request_id": found[0], "videos": []} if found else None]]
        return [[self.answers[args[0]]]]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    registry = CollectorRegistry()
    monkeypatch.setattr(metrics, "REGISTRY", registry)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    app = FastAPI()
    app.add_api_route("/metrics", lambda: Response(generate_latest(registry)))
    app.add_api_route("/v1/chat/completions", lambda: {"asked": True}, methods=["POST"])
    app.add_middleware(MetokRoutes)
    hf_config = SimpleNamespace()
    attach_settings(hf_config, 28, events=7)
    app.state.engine_client = SimpleNamespace(
        engine_core=FakeCore(),
        renderer=SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(decode=lambda ids: f"text of {ids}")),
    )
    monkeypatch.setattr(in_force, "_in_force", in_force._InForce())
    app.state.vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=hf_config,
            hf_text_config=SimpleNamespace(num_hidden_layers=28),
            architecture="METokModel",
            get_multimodal_config=lambda: SimpleNamespace(media_io_kwargs={"video": {"timeout_s": 7}}),
        )
    )
    app.state.server = SimpleNamespace(config=uvicorn.Config(app))
    app.state.openai_serving_models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="<b>tiny</b>")])
    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as running:
        yield running


def test_a_scrape_asks_the_engines_first(app: FastAPI, client: TestClient) -> None:
    text = client.get("/metrics").text
    assert "metok_pruned_requests_total 0.0" in text
    assert sorted(app.state.engine_client.engine_core.asked) == ["metok_stats", "scheduler"]
    client.get("/metrics")
    assert len(app.state.engine_client.engine_core.asked) == 2, "a young answer is not asked for again"


def test_the_status_says_which_profile_rules_and_not_where_it_lies(app: FastAPI, client: TestClient) -> None:
    summary = a_profile().summary("/home/somebody/found.json", ("events",))
    app.state.vllm_config.model_config.hf_config.metok_server["profile"] = summary
    shown = client.get("/v1/metok/status").json()["server"]["profile"]
    assert shown["told"].startswith("profile found.json: 96.9 % of the answers to 32 unseen questions agreed")
    assert shown["agreement"] == pytest.approx(31 / 32)
    assert shown["overridden"] == ["events"]
    assert "somebody" not in str(shown)
    assert "server.profile.told" in client.get("/metok").text


def test_the_status(client: TestClient) -> None:
    answer = client.get("/v1/metok/status")
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    assert status["server"] | {"settings": None, "version": None} == {
        "models": ["<b>tiny</b>"], "architecture": "METokModel", "layers": 28, "pruned_before_layers": [3, 10, 19],
        "settings": None, "version": None, "profile": None,
    }  # fmt: skip
    assert status["server"]["settings"]["events"] == 7
    assert status["requests"] == [
        {"request_id": "b", "time": 2.0, "videos": [], "question": "text of [3, 4]"},
        {"request_id": "a", "time": 1.0},
    ]
    assert status["engine_figures"]["engines"] == 1
    assert 0 <= status["requests_age_seconds"] < 60


def test_an_engine_that_fails_leaves_the_status_without_figures(app: FastAPI, client: TestClient) -> None:
    app.state.engine_client.engine_core.answers.clear()
    status = client.get("/v1/metok/status").json()
    assert status["engine_figures"] is None
    assert status["engine_figures_age_seconds"] is None
    assert status["requests"] == []
    assert client.get("/metrics").status_code == 200


def test_reports_and_state_of_all_engines(client: TestClient) -> None:
    assert client.get("/v1/metok/state").json() == {"workers": [{"groups": []}]}
    assert client.get("/v1/metok/reports/known").json() == {"request_id": "known", "videos": []}
    for other in ("unknown", "know", "known-12345678"):
        assert client.get(f"/v1/metok/reports/{other}").status_code == 404


def test_the_page_is_one_file_whose_parts_its_policy_allows(client: TestClient) -> None:
    answer = client.get("/metok")
    assert answer.status_code == 200
    assert answer.text.count("<script>") == answer.text.count("<style>") == 1
    assert "default-src 'none'" in answer.headers["content-security-policy"]


# --- decoding of videos ---


def test_the_pool_lives_as_long_as_the_server_and_knows_the_operators_limits(app: FastAPI) -> None:
    with TestClient(app):
        pool = in_force.decode_pool()
        assert pool.forks._process is not None
        assert pool.forks._process.poll() is None
        assert (in_force.chosen_loader(), in_force._in_force.server.timeout_s) == ("metok", 7)
        spawner = pool.forks._process
    assert spawner.poll() is not None
    with pytest.raises(Busy, match="shutting down"):
        pool.decode(b"a video", VideoSettings())


def test_its_figures_are_as_fresh_as_the_scrape(client: TestClient) -> None:
    pool = in_force.decode_pool()
    place = pool.places.ask(1)
    room = pool.hold(12345, 1)
    text = client.get("/metrics").text
    assert "metok_video_decodes_running 1.0" in text
    assert "metok_video_memory_bytes 12345.0" in text
    assert 'metok_video_decodes_total{outcome="late"}' in text
    pool.places.give_back(place)
    pool.memory.give_back(room)
    assert "metok_video_decodes_running 0.0" in client.get("/metrics").text


def started(app: FastAPI) -> list[Any]:
    """What the app's start sends, where it fails."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(MetokRoutes(app)({"type": "lifespan", "app": app}, receive, send))
    return sent


def test_a_server_that_cannot_decode_does_not_start(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "START", "raise SystemExit(3)")
    sentence = "vllm: error: METok cannot decode videos in a child process here: it does not start."
    assert started(app) == [{"type": "lifespan.startup.failed", "message": sentence}]


def test_a_server_whose_start_fails_otherwise_does_not_run_without_metok(app: FastAPI) -> None:
    """uvicorn takes an error for "has no such start", and serves."""
    del app.state.server
    (message,) = started(app)
    assert message["type"] == "lifespan.startup.failed"
    assert in_force.decode_pool().stopped
    assert not check_requests().serves_metok_alone


@pytest.mark.parametrize("given", [None, "9"])
def test_a_503_says_when_to_try_again_and_nothing_else_does(app: FastAPI, given: str | None) -> None:
    headers = {} if given is None else {"Retry-After": given}
    app.add_api_route("/busy", lambda: Response(status_code=503, headers=headers))
    app.add_api_route("/fine", lambda: Response(status_code=200))
    with TestClient(app) as client:
        assert client.get("/busy").headers["retry-after"] == (given or "2")
        assert "retry-after" not in client.get("/fine").headers


# --- before the key is checked ---


def run_once(app: Any, path: str, root_path: str = "", method: str = "POST") -> tuple[list[Any], int]:
    """What an app sends in answer to a request whose client sends no body, and how often it asked for it."""
    sent: list[Any] = []
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": []}
    asyncio.run(app(scope, receive, send))
    return sent, asked


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/metok", "/v1/metok/status", "/metrics"])
def test_no_body_is_read(path: str) -> None:
    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})

    assert run_once(MetokRoutes(inner), path) == ([{"type": "http.response.start", "status": 401, "headers": []}], 0)


@pytest.mark.parametrize(
    ("root_path", "path", "inside"),
    [
        ("", "/metrics", "/metrics"),
        ("", "/metrics/", "/metrics"),
        ("/proxied", "/proxied/metrics", "/metrics"),
        ("/proxied/", "/proxied/metrics", "/metrics"),
        ("/proxied", "/metrics", "/metrics"),
        ("/m", "/metrics", "/metrics"),
        ("/proxied", "/proxiedmetrics", "/proxiedmetrics"),
        ("/metrics", "/metrics", "/metrics"),
        ("/metrics", "/metrics/metrics", "/metrics"),
    ],
)
def test_paths_under_a_root_path(root_path: str, path: str, inside: str) -> None:
    assert path_of({"path": path, "root_path": root_path}) == inside


def test_only_a_server_of_metok_alone_refuses_the_items_of_other_processors(app: FastAPI) -> None:
    with TestClient(app):
        assert check_requests().serves_metok_alone
    assert not check_requests().serves_metok_alone


def test_ids_in_a_path_are_shortened_and_escaped(client: TestClient) -> None:
    for asked in ("a/b", "x" * 20_000, "INFO%1b%ED%A0%80%E2%80%AE"):
        answer = client.get(f"/v1/metok/reports/{asked}")
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].isprintable()
        assert len(answer.json()["error"]["message"]) < 400
    assert client.get("/v1/metok/reports/some/id").json()["request_id"] == "some/id"


# --- shutdown ---


@pytest.mark.parametrize(("set_before", "then"), [(None, GRACE_S), (60, 60)])
def test_the_server_waits_for_its_clients_no_longer_than_this(app: FastAPI, set_before: int | None, then: int) -> None:
    """uvicorn's own default is to wait for ever."""
    app.state.server.config.timeout_graceful_shutdown = set_before
    with TestClient(app):
        assert app.state.server.config.timeout_graceful_shutdown == then


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_shutdown_cancels_is_told_so(begun: bool) -> None:
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
        task = asyncio.create_task(MetokRoutes(inner)(scope, None, send))
        await asyncio.sleep(0.01)
        task.cancel()
        await task  # raises nothing, so there is nothing to log

    asyncio.run(run())
    if begun:
        assert [message["status"] for message in sent] == [200], "no second answer"
    else:
        assert sent[0]["status"] == 503
        assert b"retry-after" in dict(sent[0]["headers"])
        assert "The server is shutting down." in sent[1]["body"].decode()


def test_the_pools_gauges_are_stated_without_a_scrape(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several API servers, the one that is busy is rarely the one that is asked."""
    monkeypatch.setattr(routes, "PUBLISH_S", 0.01)
    with TestClient(app):
        pool = decode_pool()
        place = pool.places.ask(1)
        for running in (1, 0):
            end = time.monotonic() + 30
            while stated(RUNNING) != running:
                assert time.monotonic() < end, f"the gauge is not {running}"
                time.sleep(0.01)
            pool.places.give_back(place)


def stated(name: str) -> float:
    (value,) = (sample.value for metric in FRONT_END.collect() if metric.name == name for sample in metric.samples)
    return value
