"""Tiny checkpoints, built once a session and shared by shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.oracle.samples import Sample, load_sample


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sample]:
    """`sample(**shape)`: the checkpoint of that shape, built on first use."""
    built: dict[tuple[tuple[str, Any], ...], Sample] = {}

    def get(**shape: Any) -> Sample:
        key = tuple(sorted(shape.items()))
        if key not in built:
            built[key] = load_sample(tmp_path_factory.mktemp("tiny"), **shape)
        return built[key]

    return get
