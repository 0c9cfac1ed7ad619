"""Figures as a worker would hand them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def raw() -> Callable[..., dict[str, Any]]:
    """`raw(factor)`: a worker's figures as if everything took `factor` times as long, and KV too."""

    def make(factor: float = 1.0, scoring: float = 0.0) -> dict[str, Any]:
        parts = {"tower": 10.0, "stage1": 2.0, "shallow_layers": 4.0, "scoring": scoring, "deep_layers": 30.0}
        parts |= {"compiled_layers": 0.0, "rest_of_model": 1.0}
        parts |= {"scheduling": 0.5, "preparation": 1.5, "sampling": 0.75, "outside_model": 0.25}
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
                "decode_steps_s": [0.008 * factor] * 3,
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
            "first_request": {"ttft_s": 2.1 * factor, "token_gaps_s": [0.01, 0.5 * factor, 0.01]},
            "breakdown": {
                "first_prune_layer": 1,
                "compiled": False,
                "prefill_ms": [parts] * 3,
                "decode_step_ms": [dict.fromkeys(parts, 1.0)] * 3,
            },
        }

    return make
