"""Start the real `vllm serve` with METok on the loopback interface,
wait until it answers, and always stop it.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.model_choice import DemoModel

HOST = "127.0.0.1"
START_TIMEOUT = 600.0  # seconds; loading a large checkpoint takes minutes
STOP_TIMEOUT = 30.0  # seconds that the server has for stopping by itself
GRACE = 1.0  # seconds that its helpers have after that
LOG_TAIL = 15  # lines shown when it dies

_ERROR_LINE = re.compile(r"(?:^|[\s(])(?:[\w.]*(?:Error|Exit)|error|Value error)[:,] (?P<message>.+)")
_NO_NEWS = "Engine core initialization failed"  # vLLM's pointer to the error that it logged before


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def serve_command(model: DemoModel, port: int, frames: int) -> list[str]:
    """The command line that serves `model` with METok, for videos of up to `frames` frames."""
    vllm = Path(sys.executable).with_name("vllm")
    command = [str(vllm)] if vllm.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command += ["serve", model.checkpoint, "--plugin", "metok", "--trust-request-mm-kwargs"]
    # The demo sends its video along; the server is to fetch nothing.
    command += ["--host", HOST, "--port", str(port), "--allowed-media-domains", "none.invalid"]
    if not _cuda():
        command += ["--enforce-eager", "--block-size", "32"]
    tokens = model.step_tokens(frames)
    if tokens is not None:
        command += ["--max-num-batched-tokens", str(tokens)]
    return [*command, *model.flags]


def serve_environment(model: DemoModel) -> dict[str, str]:
    """The environment it runs in: this process's, and what a machine without a GPU needs."""
    environment = {**os.environ, "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0"}
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if model.local:
        environment.setdefault("HF_HUB_OFFLINE", "1")
    if not _cuda():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(model.kv_gib))
        environment.setdefault("TRITON_INTERPRET", "1")
    return environment


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def running_server(
    command: Sequence[str],
    environment: dict[str, str],
    port: int,
    log: Path,
    timeout: float = START_TIMEOUT,
) -> Iterator[None]:
    """Run the server `command` as long as the body runs; enter the body once ``GET /health`` gives 200.

    Args:
        command: listens on `HOST`:`port`.
        environment: of the process.
        port: where to ask for its health.
        log: file that its output goes to.
        timeout: seconds until it must be healthy.

    Raises:
        DemoError: it died or was not healthy in time; the error's details are the end of the log.
    """
    with log.open("wb") as output, signals_as_interrupt():
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            _wait_until_healthy(process, port, log, timeout)
            yield
        finally:
            _stop(process)


def why_it_died(log: Path) -> str:
    """The reason that the log of a dead server gives, or an empty string."""
    messages = [match["message"].strip() for line in _lines(log) if (match := _ERROR_LINE.search(line))]
    telling = [message for message in messages if _NO_NEWS not in message]
    return telling[-1] if telling else ""


def log_tail(log: Path, lines: int = LOG_TAIL) -> str:
    """The last lines of a log."""
    return "\n".join(_lines(log)[-lines:])


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not _healthy(port):
        status = process.poll()
        if status is not None:
            reason = why_it_died(log) or f"it ended with status {status}"
            raise DemoError(f"The server did not start: {reason.rstrip('.')} (log: {log}).", details=log_tail(log))
        if time.monotonic() > deadline:
            raise DemoError(f"The server was not ready within {timeout:g} s (log: {log}).", details=log_tail(log))
        time.sleep(0.3)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and whatever it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
    # What outlives the server itself: usually helpers that end within a moment.
    deadline = time.monotonic() + GRACE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
            process.poll()
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it ends its server. Main thread only."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
