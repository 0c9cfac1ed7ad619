"""One live server for all tests of this folder: its start is what costs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support.oracle.samples import Sample, load_sample
from tests.support.server.asking import OPTIONS
from tests.support.server.live import Server, serving


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=17)


@pytest.fixture(scope="session")
def server(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = json.dumps({"metok": {"decode_retention": 0.5}})
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(
        sample.path, log, "--plugin", "metok", "--additional-config", settings, "--trust-request-mm-kwargs",
        "--max-num-batched-tokens", "256", "--served-model-name", "tiny",
        "--allowed-media-domains", "videos.example.com", "127.0.0.2", "--enable-prompt-tokens-details",
        "--mm-processor-cache-gb", "0.02", "--num-gpu-blocks-override", "4096", *OPTIONS,
    ) as running:  # fmt: skip
        yield running
