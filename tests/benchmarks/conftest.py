"""The benchmark's modules, which lie beside their program and not in a package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """`load("engine")`: a module of the benchmark; path and modules are left as they were."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    # From the repository's root Python takes the folder `kernels` for a package; whoever looked for one left it here.
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name == "kernels" or name.split("_")[0] == "engine":
            del sys.modules[name]


@pytest.fixture
def raw() -> Callable[..., dict[str, Any]]:
    """`raw(factor)`: a worker's figures as if everything took `factor` times as long, and KV too."""

    def make(factor: float = 1.0, scoring: float = 0.0) -> dict[str, Any]:
        parts = {"tower": 10.0, "stage_1": 2.0, "shallow_layers": 4.0, "scoring": scoring, "deep_layers": 30.0}
        parts |= {"rest_of_model": 1.0, "outside_model": 3.0}
        parts = {name: factor * value for name, value in parts.items()}
        levels = [
            {
                "concurrency": concurrency,
                "requests": 4,
                "wall_s": 2.0 * factor,
                "requests_per_s": 2.0 / factor,
                "cpu_s_per_request": 0.4 * factor,
                "ttft_s": [factor * value for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)],
                "token_gaps_s": [0.01 * factor] * 8,
                "most_running": concurrency,
            }
            for concurrency in (1, 2)
        ]
        return {
            "start_s": 1.0,
            "processing_s": [0.05],
            "tokens": {"prompt_tokens": 600, "text_tokens": 60},
            "kv": {"requests_per_gib": 8.0 / factor, "requests_that_fit": 8},
            "memory": {"process_mib": 900.0},
            "levels": levels,
            "breakdown": {
                "first_prune_layer": 1,
                "prefill_ms": [parts] * 3,
                "decode_step_ms": [dict.fromkeys(parts, 1.0)] * 3,
            },
        }

    return make
