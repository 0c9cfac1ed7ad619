"""Three live servers for all tests of this folder: their start is what costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oracle.samples import Sample, load_sample
from tests.support.server import double
from tests.support.server import strict as strict_server
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
        "--mm-processor-cache-gb", "0.02", "--num-gpu-blocks-override", "4096", *OPTIONS, as_typed=True,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strict_server.media_folder(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def strict(sample: Sample, media_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`test_edge.py` and `test_hostile_load.py` share it. The last test of the second ends it."""
    log = tmp_path_factory.mktemp("log") / "strict.log"
    with serving(sample.path, log, *strict_server.options(media_folder)) as running:
        yield running


@pytest.fixture(scope="session")
def two(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two of each process; `test_two_api_servers.py`, the last who needs it, ends it."""
    if len(double.cores()) < 2:
        pytest.skip("two engines need two cores")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in double.environment().items():
            patch.setenv(name, value)
        log = tmp_path_factory.mktemp("log") / "two.log"
        with serving(sample.path, log, *double.options()) as running:
            yield running
