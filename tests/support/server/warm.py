"""Python programs that start with vLLM already imported.

A server is three processes, and each of them imports vLLM for ten seconds: most of what the start of a small
one takes. Here one process imports it once, runs no thread, and forks for every program. What the program
starts is forked as well, as vLLM does itself where there is a GPU; on a CPU it would spawn.

Not for what is about the start itself: that a command works as a user types it, or what is imported when.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

IMPORTS = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu.model_runner",
)
"""What `vllm serve` and its engine and worker import; no plugin is among it."""


class Program:
    """A running one; as much of `subprocess.Popen` as tests need."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"program {self.pid}", timeout or 0)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(script: Path, *arguments: str, env: dict[str, str], log: Path, errors: Path | None = None) -> Program:
    """Run a Python script in a session of its own.

    Args:
        script: its file; what it does under ``if __name__ == "__main__"`` is done.
        arguments: for it.
        env: all its variables. What vLLM reads while it is imported has the values of the first program.
        log: what it prints goes here.
        errors: what it prints to standard error, if not to `log`.
    """
    command = {"script": str(script), "arguments": arguments, "env": env, "log": str(log)}
    return Program(_ask({"start": command | {"errors": None if errors is None else str(errors)}}))


_running: subprocess.Popen[str] | None = None


def _ask(question: dict[str, Any]) -> Any:
    global _running
    if _running is None:
        command = [sys.executable, "-m", __name__]
        _running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        atexit.register(_running.kill)
    assert _running.stdin is not None
    assert _running.stdout is not None
    _running.stdin.write(json.dumps(question) + "\n")
    answer = _running.stdout.readline()
    assert answer, "the process that has imported vLLM has ended"
    return json.loads(answer)


# --- in the process that forks ---


def _serve() -> None:
    """Answer the questions of `_ask` until there are no more. A program's process comes back to run it."""
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    from vllm import envs

    from tests.support.interpreter import quick

    # The platform "cpu" asks for "spawn" by the variable itself.
    envs.environment_variables["VLLM_WORKER_MULTIPROC_METHOD"] = lambda: "fork"
    quick().__enter__()  # until the end of this process, and in all that it becomes
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or nanobind reports a leak
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                return _become(**question["start"])
        print(json.dumps(answer), flush=True)


def _become(script: str, arguments: list[str], env: dict[str, str], log: str, errors: str | None) -> None:
    import importlib
    import runpy

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    err = out if errors is None else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for file, to in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(file, to)
    for file in {nothing, out, err}:
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    importlib.invalidate_caches()
    sys.argv[:] = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _serve()
