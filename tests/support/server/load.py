"""Clients that are slow, deaf or gone, and what the processes of a server do meanwhile."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

from metok_vllm.media.children.child import AT_WORK
from tests.server.test_metrics import read_metrics
from tests.support.children import frames_mib, is_called
from tests.support.server.asking import QUESTION, user
from tests.support.server.clips import data_url
from tests.support.server.live import Server

CHAT = "/v1/chat/completions"


def body(video: bytes | str | None, **changes: Any) -> dict[str, Any]:
    """A chat request about a video, by its bytes or its URL, or about none."""
    url = data_url(video) if isinstance(video, bytes) else video
    asked = {"model": "tiny", "messages": [user(QUESTION, url)], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **changes}


class Client:
    """One request over a connection of its own, sent as slowly and read as late as the test likes."""

    def __init__(self, server: Server, key: str | None = None, receive_buffer: int | None = None) -> None:
        """
        Args:
            server: whom to ask.
            key: the API key, if any.
            receive_buffer: bytes that the kernel keeps of an answer before the server has to wait.
        """
        where = urlsplit(server.url)
        self.key = key
        self.connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=120)
        self.connection.sock = socket.socket()
        self.connection.sock.settimeout(120)
        if receive_buffer is not None:
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.connection.sock.connect((where.hostname, where.port))

    def announce(self, length: int) -> Client:
        """Send the head of a request with a JSON body of `length` bytes."""
        self.connection.putrequest("POST", CHAT)
        self.connection.putheader("Content-Type", "application/json")
        self.connection.putheader("Content-Length", str(length))
        if self.key is not None:
            self.connection.putheader("Authorization", f"Bearer {self.key}")
        self.connection.endheaders()
        return self

    def send(self, part: bytes) -> None:
        self.connection.send(part)

    def post(self, body: dict[str, Any]) -> Client:
        """Send a whole request, and do not wait for its answer."""
        data = json.dumps(body).encode()
        self.announce(len(data)).send(data)
        return self

    def answer(self) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Wait for the answer: status, headers, body."""
        response = self.connection.getresponse()
        return response.status, response.headers, response.read()

    def read(self, size: int) -> bytes:
        """The next bytes of what the server sends, as they come."""
        sock: Any = self.connection.sock
        data: bytes = sock.recv(size)
        return data

    def leave(self) -> None:
        """Be gone, without a word."""
        self.connection.close()


@contextmanager
def leaving(clients: list[Client]) -> Iterator[list[Client]]:
    """All of them leave at the end."""
    try:
        yield clients
    finally:
        for client in clients:
            client.leave()


def family(server: Server) -> list[psutil.Process]:
    """All processes of a server."""
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of them that have not ended."""
    return [one for one in processes if _state(one) not in (None, psutil.STATUS_ZOMBIE)]


def _state(process: psutil.Process) -> str | None:
    with suppress(psutil.NoSuchProcess):
        return process.status() if process.is_running() else None
    return None


def lasting(server: Server) -> list[psutil.Process]:
    """Processes that live as long as the server: all but what its spawners fork, named yet or not."""
    everyone = family(server)
    forks = {one.pid for one in everyone if _is_fork(one)}
    return [one for one in everyone if _parent(one) not in {None, *forks}]


def spawners(server: Server) -> list[psutil.Process]:
    """The processes that fork decoders: one for each API server process."""
    return [one for one in lasting(server) if _is_fork(one)]


def decoders(server: Server) -> list[psutil.Process]:
    """Decoders at work."""
    return [one for one in _forks(server) if is_called(one, AT_WORK)]


def _forks(server: Server) -> list[psutil.Process]:
    return alive([one for one in family(server) if _is_fork(one)])


def _is_fork(process: psutil.Process) -> bool:
    """Whether it is a spawner or a child of one; they share a command line."""
    with suppress(psutil.NoSuchProcess):  # what has ended has none
        return "metok_vllm.media.children.spawner" in " ".join(process.cmdline())
    return False


def _parent(process: psutil.Process) -> int | None:
    with suppress(psutil.NoSuchProcess):
        return process.ppid()
    return None


def memory_mib(server: Server) -> float:
    """Memory of a server's processes, what they share counted once (PSS), and of frames being decoded."""
    return sum(map(_shared_fairly, family(server))) / 2**20 + sum(frames_mib(one.pid) for one in decoders(server))


def _shared_fairly(process: psutil.Process) -> float:
    with suppress(psutil.Error):  # it has ended meanwhile
        return float(process.memory_full_info().pss)
    return 0


def decoding(server: Server) -> dict[str, float]:
    """METok's metrics about video files: `running`, `waiting`, `memory`, each outcome, and `refused busy`."""
    metrics = read_metrics(server.get("/metrics")[1].decode())
    figures = {
        name: metrics[f"metok_video_{metric}"]
        for name, metric in (
            ("running", "decodes_running"),
            ("waiting", "decodes_waiting"),
            ("memory", "memory_bytes"),
        )
    }
    outcomes = ("decoded", "refused", "late", "memory", "broken", "cancelled", "busy")
    figures |= {f"was {one}": metrics[f"metok_video_decodes_total{{outcome={one}}}"] for one in outcomes}
    return {**figures, "refused busy": metrics["metok_refused_requests_total{reason=busy}"]}


def idle(server: Server) -> bool:
    """Whether no video is being decoded, waits, or takes memory."""
    figures = decoding(server)
    return not decoders(server) and (figures["running"], figures["waiting"], figures["memory"]) == (0, 0, 0)
