"""Runs stages as processes, each under its limit; nothing that fails stops the rest."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common.paths import ROOT
from benchmarks.common.provenance import commit, timestamp
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.stages import Stage

PACKING = 8  # seconds that are kept for what follows the last stage
GRACE = 5  # seconds between being asked to end and being killed
PATIENCE = 4
"""Limits are those of an H200 that is there for a short time;
without such a budget each is this many times as long.
"""

FIGURES = re.compile(
    "prompt tokens; at|passed|failed|: relative error|^smoke:|^llm |cases agree|copy [0-9]+ GB/s|^(NVIDIA|python) "
)
"""What a log has to say in the terminal, where a stage went well."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    name: str
    result: str
    """"ok", "failed (CODE)" or "out of time (SECONDS s)"."""
    seconds: int
    date: str
    commit: str
    tail: tuple[str, ...]
    """The end of its log, where it did not end well."""

    @property
    def ok(self) -> bool:
        return self.result == "ok"


def environment(small: bool, more: Mapping[str, str]) -> dict[str, str]:
    """What a stage's process sees: this checkout on the path, no network, vLLM's core in the same process."""
    settings = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if find_spec("flashinfer") is None:
        # vLLM on CUDA takes it for granted; its sampler is the only thing here that would use it.
        settings["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if small:
        settings |= {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**inherited, **settings, **more, "PYTHONPATH": os.pathsep.join(path)}


class Runner:
    """One call: starts stages, notes how they end, and has `after` called behind each."""

    def __init__(self, folder: Folder, small: bool, end: float | None, after: Callable[[], None]) -> None:
        """`end`: on `time.monotonic`'s clock, or None where the stages' own limits are the only ones."""
        self.folder = folder
        self.small = small
        self.skipped: list[str] = []
        self.no_engine = ""
        """Why no stage that starts engines is begun; empty where they are."""
        self._end = end
        self._after = after
        self._factor = 1 if end is not None and not small else PATIENCE

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def run(self, stage: Stage, more: Mapping[str, str] | None = None) -> Outcome | None:
        """Run a stage, in an environment with `more` in it, and say how it ended.

        None if there is no time for it, or it starts engines and none would run.
        """
        if self.no_engine and stage.starts_engines:
            print(f"{stage.name:18}     -    skipped: {self.no_engine}", flush=True)
            self.skipped.append(stage.name)
            return None
        limit = stage.most * self._factor
        room = self.left() - PACKING
        if room < stage.least:
            needs = f"needs {stage.least + PACKING} s, {self.left():.0f} s are left"
            print(f"{stage.name:18}     -    skipped: {needs}", flush=True)
            self.skipped.append(stage.name)
            return None
        log = self.folder.logs / f"{stage.name}.log"
        if log.exists():
            log.replace(log.with_suffix(".before.log"))
        if stage.adds_to is not None:
            stage.adds_to.unlink(missing_ok=True)
        began, date = time.monotonic(), timestamp()
        result = self._wait(stage, log, min(limit, room), more or {})
        lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        tail = () if result == "ok" else tuple(lines[-12:])
        outcome = Outcome(stage.name, result, round(time.monotonic() - began), date, commit(), tail)
        (self.folder.state / f"{stage.name}.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n")
        print(f"{outcome.name:18} {outcome.seconds:5} s  {outcome.result}", flush=True)
        for line in [line for line in lines if FIGURES.search(line)][-16:]:
            print(f"    {line.strip()[:220]}", flush=True)
        for line in tail:
            print(f"    | {line[:220]}", flush=True)
        self._after()
        return outcome

    def _wait(self, stage: Stage, log: Path, limit: float, more: Mapping[str, str]) -> str:
        command = [sys.executable, *stage.command]
        if stage.starts_engines:
            command += ["--timeout", f"{max(1, int(0.8 * limit))}"]  # one engine that hangs leaves time for another
        if stage.starts_engines and self.folder.engine_option.exists():
            # The last one counts, so it holds what the stage itself asks for.
            own = command[command.index("--engine-option") + 1] if "--engine-option" in command else "{}"
            option = {**json.loads(self.folder.engine_option.read_text()), **json.loads(own)}
            command += ["--engine-option", json.dumps(option)]
        with log.open("w") as out:
            # A group of its own, so that what the stage leaves running can be ended with it.
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.small, {**stage.environment, **more}), stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
                return "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                _signal(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                return f"out of time ({limit:.0f} s)"
            finally:
                _signal(process.pid, signal.SIGKILL)
                process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, number)


def outcomes(folder: Folder) -> dict[str, Outcome]:
    """How every stage that was run here ended, by name."""
    found = {}
    for path in folder.state.glob("*.json"):
        noted = json.loads(path.read_text())
        found[path.stem] = Outcome(**{**noted, "tail": tuple(noted["tail"])})
    return found
