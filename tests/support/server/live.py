"""A real `vllm serve` on a loopback port, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.server import warm

START_SECONDS = 600


def environment() -> dict[str, str]:
    """Of a vLLM process on CPU; not in the test's process, so with vLLM's own multiprocessing."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    # Media URLs as the documentation has them; one attempt, so that a server that is not there costs no
    # waiting.
    return {**env, "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", "VLLM_MEDIA_FETCH_MAX_RETRIES": "1"}


def beside(folder: Path, source: str) -> dict[str, str]:
    """Another general plugin of vLLM's, for the processes that get these variables.

    Args:
        folder: for its files.
        source: of its module, which has a function `register`.
    """
    about = folder / "beside-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: beside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nbeside = beside_plugin:register\n")
    (folder / "beside_plugin.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def vllm() -> str:
    """The `vllm` command beside this interpreter."""
    return str(Path(sys.executable).parent / "vllm")


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    log: Path
    process: subprocess.Popen[bytes] | warm.Program
    key: str | None = None
    """Its API key."""

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=120)

    def get(self, path: str) -> tuple[int, bytes]:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, log: Path, *options: str, as_typed: bool = False) -> Iterator[Server]:
    """Start `vllm serve MODEL OPTIONS`, wait until it is ready,
    and stop it with all its processes at the end.

    `as_typed`: the command itself, which imports vLLM in each of its processes and spawns them.
    """
    port = free_port()
    process: subprocess.Popen[bytes] | warm.Program
    command = [vllm(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *options]
    if as_typed:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )
    else:
        process = warm.start(Path(command[0]), *command[1:], env=environment(), log=log)
    key = options[options.index("--api-key") + 1] if "--api-key" in options else None
    server = Server(f"http://127.0.0.1:{port}", log, process, key)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            try:
                if server.get("/health")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.5)
        yield server
    finally:
        try:
            process.terminate()
            process.wait(timeout=30)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
