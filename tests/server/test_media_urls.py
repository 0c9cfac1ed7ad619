"""Media URLs where the server is started as the documentation says: named domains only, and no redirects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server.asking import QUESTION, chat, oracle, result, user
from tests.support.server.clips import mp4
from tests.support.server.live import Server, free_port

ALLOWED, INSIDE = "127.0.0.2", "127.0.0.1"  # both on this machine; `conftest.server` names the first


@dataclass
class Site:
    """A file server and the paths that it was asked for."""

    address: str
    pages: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def url(self, path: str) -> str:
        return f"http://{self.address}:{self.port}{path}"


def start(site: Site) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            status, headers, content = site.pages.get(self.path, (404, {}, b"not here"))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer((site.address, 0), Handler)
    site.port = httpd.server_port
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    return httpd


VIDEO = mp4(scene_video(60, 16))


@pytest.fixture(scope="module")
def sites() -> Iterator[tuple[Site, Site]]:
    """A server that requests may name, and one inside the network that they may not."""
    inside = Site(INSIDE, {"/secret.mp4": (200, {}, VIDEO)})
    allowed = Site(ALLOWED)
    servers = [start(inside), start(allowed)]
    allowed.pages = {
        "/clip.mp4": (200, {"Content-Type": "text/plain"}, VIDEO),  # what the header says is nobody's business
        "/moved.mp4": (302, {"Location": inside.url("/secret.mp4")}, b""),
        "/moved-with-a-video.mp4": (307, {"Location": inside.url("/secret.mp4")}, b"<html>moved</html>"),
        "/busy.mp4": (503, {}, b"later"),
        "/cut.mp4": (200, {"Content-Length": str(len(VIDEO) + 100)}, VIDEO),
        "/page.html": (200, {}, b"<html>Sign in</html>"),
        "/nothing.mp4": (200, {}, b""),
    }
    yield allowed, inside
    for httpd in servers:
        httpd.shutdown()
        httpd.server_close()


def fetch(server: Server, url: str) -> httpx.Response:
    body = {"model": "tiny", "messages": [user(QUESTION, url)], "max_tokens": 1}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def test_a_video_of_an_allowed_domain_is_answered(server: Server, sample: Sample, sites: tuple[Site, Site]) -> None:
    allowed, _ = sites
    assert_same(oracle(sample, VIDEO), result(chat(server, [user(QUESTION, allowed.url("/clip.mp4"))])), 1e-3)
    assert "/clip.mp4" in allowed.asked


@pytest.mark.parametrize(
    "host",
    [
        INSIDE,
        "localhost",
        "[::1]",
        "0.0.0.0",
        "2130706433",
        "127.1",
        f"{ALLOWED}@{INSIDE}",
        f"{ALLOWED}.",
        "[::ffff:127.0.0.2]",
    ],
)
def test_an_address_inside_the_network_is_refused(server: Server, sites: tuple[Site, Site], host: str) -> None:
    """Whatever way of writing it; the last two are the allowed server under a name that was not allowed."""
    response = fetch(server, f"http://{host}:{sites[1].port}/secret.mp4")
    assert response.status_code == 400, response.text
    assert "allowed domains" in response.json()["error"]["message"]
    assert sites[1].asked == []


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest/meta-data", "https://169.254.169.254/", "file:///etc/passwd", "FILE:///etc/passwd",
     "file://localhost/etc/passwd", "ftp://127.0.0.2/clip.mp4", "/etc/passwd", "gopher://127.0.0.2:1/", "data:,", "http:///x"],
)  # fmt: skip
def test_other_ways_to_the_inside_are_refused(server: Server, url: str) -> None:
    response = fetch(server, url)
    assert response.status_code == 400, response.text
    assert "Traceback" not in response.text
    assert "root:" not in response.text


@pytest.mark.parametrize("path", ["/moved.mp4", "/moved-with-a-video.mp4"])
def test_a_redirect_to_the_inside_is_not_followed(server: Server, sites: tuple[Site, Site], path: str) -> None:
    allowed, inside = sites
    response = fetch(server, allowed.url(path))
    assert response.status_code in (400, 422), response.text
    assert path in allowed.asked
    assert inside.asked == []


@pytest.mark.parametrize("path", ["/busy.mp4", "/cut.mp4", "/missing.mp4", "/page.html", "/nothing.mp4"])
def test_what_another_server_fails_at_is_not_our_500(server: Server, sites: tuple[Site, Site], path: str) -> None:
    response = fetch(server, sites[0].url(path))
    assert response.status_code in (400, 422), response.text
    assert path in sites[0].asked


def test_a_server_that_is_not_there_tells_nothing_of_the_network(server: Server) -> None:
    response = fetch(server, f"http://{ALLOWED}:{free_port()}/clip.mp4")
    assert response.status_code == 422
    assert response.json()["error"]["message"] == (
        "Failed to fetch media from URL: its server cannot be reached, or does not give the file."
    )
