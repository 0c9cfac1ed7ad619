"""A profile as `metok calibrate` writes it, of no model unless a mark is given."""

from __future__ import annotations

from typing import Any

from metok_vllm.contract.profile import Measured, ModelMark, Profile

NO_MODEL = ModelMark(config_sha256="0" * 64, weights_sha256="1" * 64)


def a_profile(mark: ModelMark = NO_MODEL, **settings: Any) -> Profile:
    return Profile(
        format=1,
        model="some/model",
        mark=mark,
        settings=settings or {"prune_layers": [1, 2, 3], "keep_ratio": 0.5, "quota": "video"},
        vllm="0.32.0",
        plugin="0.1.0",
        horizon=3,
        layers=4,
        generic_questions=False,
        search_videos=8,
        search_questions=32,
        measured=Measured(
            videos=8,
            questions=32,
            agreement=31 / 32,
            interval=(0.8427, 0.9944),
            largest_harm=0.1,
            tokens=20.0,
            tokens_stock=100.0,
            kv=0.25,
            flops=0.3,
        ),
    )
