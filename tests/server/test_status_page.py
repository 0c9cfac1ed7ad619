"""The status page and its JSON: right figures, no prompt text,
nothing from outside, and hostile names stay text.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from metok_vllm.contract.settings import MetokSettings
from tests.server.test_metrics import read_metrics
from tests.support.oracle.samples import scene_video
from tests.support.server.asking import QUESTION, ask, measured_after_now
from tests.support.server.browser import NO_BROWSER, Browser, browsing, find_browser
from tests.support.server.clips import data_url, mp4
from tests.support.server.double import HOSTILE, KEY
from tests.support.server.live import Server


def get(server: Server, path: str, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(server.url + path, headers=headers, timeout=60)


def fresh_status(server: Server, key: str | None = None) -> Any:
    def read() -> tuple[Any, float]:
        answer = get(server, "/v1/metok/status", key)
        assert answer.status_code == 200, answer.text
        age = answer.json()["engine_figures_age_seconds"]
        return answer.json(), math.inf if age is None else age

    return measured_after_now(read)


def ask_as(server: Server, request_id: str, key: str | None = None, model: str = "tiny", frames: int = 20) -> Any:
    """One request about a video, under an id that the client chooses."""
    content = [
        {"type": "video_url", "video_url": {"url": data_url(mp4(scene_video(70, frames)))}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 3, "temperature": 0}
    headers = {"X-Request-Id": request_id, **({"Authorization": f"Bearer {key}"} if key else {})}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- without a browser ---


def test_the_page_holds_no_data_and_nothing_from_outside(server: Server) -> None:
    answer = get(server, "/metok")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy["style-src"])
    assert policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert set(re.findall(r"https?://[^\"'\s]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+\s(src|style|on\w+)=", answer.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    assert "tiny" not in answer.text


def test_the_json_agrees_with_the_report(server: Server) -> None:
    answer = ask(server, mp4(scene_video(71, 26)), {"report": True, "events": 4}, max_tokens=2)
    report = json.loads(server.get(f"/v1/metok/reports/{answer.id}")[1])
    status = fresh_status(server)
    shown = next(one for one in status["requests"] if one["request_id"].startswith(answer.id))
    for key in ("prompt_tokens", "text_tokens", "visual_tokens", "kv_bytes", "prune_layers", "time"):
        assert shown[key] == report[key]
    (video,), (reported,) = shown["videos"], report["videos"]
    assert len(set(video["event"])) == 4
    assert sum(video["tokens"]) == report["visual_tokens"]["encoded"]
    columns = zip(video["event"], video["key"], video["stride"], video["tokens"], strict=True)
    assert [
        {"event": event, "key_event": bool(key), "stride": stride, "tokens": tokens}
        for event, key, stride, tokens in columns
    ] == reported["per_frame"]
    assert status["server"]["models"] == ["tiny"]
    assert set(status["server"]["settings"]) == set(MetokSettings.model_fields)
    assert status["server"]["settings"]["decode_retention"] == 0.5
    assert status["engine_figures"]["worker"]["requests"] >= 1
    assert status["engine_figures"]["scheduler"]["deferral"]["requests"] == 0


def test_no_text_of_a_prompt_is_shown(server: Server) -> None:
    ask(server, mp4(scene_video(72, 10)), max_tokens=2)
    status = fresh_status(server)
    assert status["requests"]
    assert all("question" not in one and "question_ids" not in one for one in status["requests"])
    assert "band leaves the stage" not in json.dumps(status)


def test_only_the_latest_requests_are_shown_newest_first(server: Server) -> None:
    for _ in range(3):
        ask_as(server, "again", frames=6)
    times = [one["time"] for one in fresh_status(server)["requests"]]
    assert 3 <= len(times) <= 50
    assert times == sorted(times, reverse=True)


# --- in a browser ---


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    path = find_browser()
    if path is None:
        pytest.skip(NO_BROWSER)
    with browsing(path, tmp_path / "profile") as running:
        yield running


def assert_harmless(browser: Browser, server: Server) -> None:
    """Nothing was loaded from elsewhere, no script failed, nothing was blocked, no name became markup."""
    own = [url for url in browser.requested if url != "about:blank"]
    assert own
    assert all(url.startswith(f"{server.url}/") for url in own), own
    assert browser.run("document.title") == "METok status"
    assert browser.run("document.querySelectorAll('img').length") == 0


def test_the_page_shows_requests_and_hostile_ids_as_text(server: Server, browser: Browser) -> None:
    request_id = ask_as(server, HOSTILE)["id"]
    assert HOSTILE in request_id
    (shown, *_) = fresh_status(server)["requests"]
    browser.open(f"{server.url}/metok")
    browser.until("!document.getElementById('content').hidden")
    assert browser.run("document.querySelector('article h3').textContent").startswith(request_id)
    (video,) = shown["videos"]
    bars = "document.querySelectorAll('article:first-of-type svg [class^=tier]')"
    assert browser.run(f"{bars}.length") == video["frames"] == 20
    heights = browser.run(f"[...{bars}].map((bar) => Number(bar.getAttribute('height')))")
    assert heights == pytest.approx([100 * count / max(video["tokens"]) for count in video["tokens"]])
    rows = browser.run(
        "[...document.querySelectorAll('article:first-of-type tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert [int(row[0]) for row in rows] == sorted(set(video["event"]))
    assert sum(int(row[4].replace(",", "")) for row in rows) == shown["visual_tokens"]["encoded"]
    assert [row[1] == "yes" for row in rows] == [
        bool(video["key"][video["event"].index(event)]) for event in sorted(set(video["event"]))
    ]
    assert browser.run("document.querySelector('article svg').getAttribute('aria-label')").startswith(
        "Video 1: 20 frames"
    )
    assert browser.run("getComputedStyle(document.body).maxWidth") == "1152px", "the page's style was not applied"
    assert_harmless(browser, server)
    assert browser.complaints == []


def test_the_page_follows_the_readers_colours(server: Server, browser: Browser) -> None:
    ask_as(server, "match", frames=32)
    fresh_status(server)
    browser.open(f"{server.url}/metok")
    browser.until("!document.getElementById('content').hidden")
    colours = []
    for scheme in ("light", "dark"):
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
    if picture := os.environ.get("METOK_SCREENSHOT"):  # so docs/status.png is made
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        browser.screenshot(Path(picture), 900, 1010)


# --- a server with a key, several API server processes, a hostile name, and questions shown ---


def test_the_data_wants_the_servers_key_and_the_page_does_not(two: Server) -> None:
    for key in (None, "another"):
        assert get(two, "/v1/metok/status", key).status_code == 401
        assert get(two, "/metok", key).status_code == 200
    assert fresh_status(two, KEY)["server"]["models"] == ["tiny", HOSTILE]


def test_the_page_asks_for_the_key_and_shows_hostile_names_as_text(two: Server, browser: Browser) -> None:
    ask_as(two, "keyed", KEY, HOSTILE)
    assert fresh_status(two, KEY)["requests"][0]["question"] == QUESTION
    browser.open(f"{two.url}/metok")
    browser.until("document.getElementById('message').textContent === 'This server wants its API key.'")
    assert browser.run("document.getElementById('content').hidden")
    browser.run(f"document.getElementById('key').value = {json.dumps(KEY)}; document.getElementById('refresh').click()")
    browser.until("!document.getElementById('content').hidden")
    assert browser.run("document.querySelector('#settings td:nth-child(2)').textContent") == f"tiny, {HOSTILE}"
    assert QUESTION in browser.run("document.querySelector('article').textContent")
    assert_harmless(browser, two)
    assert not [complaint for complaint in browser.complaints if "401" not in complaint]


def test_every_api_server_process_gives_the_same_totals(two: Server) -> None:
    """Which process answers is the kernel's choice: new connections are spread over both."""
    for _ in range(2):
        ask_as(two, "spread", KEY, HOSTILE, frames=8)
    bad = {"model": HOSTILE, "messages": [{"role": "user", "content": "?"}], "mm_processor_kwargs": {"metok": {"x": 1}}}
    content = [
        {"type": "video_url", "video_url": {"url": data_url(mp4(scene_video(70, 8)))}},
        {"type": "text", "text": "?"},
    ]
    bad["messages"] = [{"role": "user", "content": content}]
    for _ in range(6):
        refused = httpx.post(
            f"{two.url}/v1/chat/completions", json=bad, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
        assert refused.status_code == 400

    def read() -> tuple[list[dict[str, float]], float]:
        scrapes = [read_metrics(get(two, "/metrics").text) for _ in range(12)]
        return scrapes, max(one["metok_figures_age_seconds"] for one in scrapes)

    scrapes = measured_after_now(read)
    assert {one["metok_refused_requests_total{reason=setting}"] for one in scrapes} == {6}
    assert len({one["metok_pruned_requests_total"] for one in scrapes}) == 1
    assert len({one["metok_visual_tokens_total{stage=encoded}"] for one in scrapes}) == 1
    assert scrapes[0]["metok_pruned_requests_total"] >= 2
    assert any(name.startswith("vllm:") for name in scrapes[0])
