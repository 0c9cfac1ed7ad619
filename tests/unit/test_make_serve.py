"""What `make serve` starts: from whom it fetches media."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from metok_vllm.frontend.programs import program_of

ROOT = Path(__file__).resolve().parents[2]


def allowed(*variables: str) -> list[str]:
    """The hosts that vLLM reads in the command of `make serve`; nothing is started."""
    printed = subprocess.run(
        ["make", "-n", "serve", "MODEL=m", *variables], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (line,) = [line for line in printed.replace("\\\n", " ").splitlines() if "/vllm serve" in line]
    words = shlex.split(line)
    argv = ["vllm", *words[words.index("serve") :]]
    argv = [word for i, word in enumerate(argv) if word != "--plugin" and argv[i - 1] != "--plugin"]
    program = program_of(argv)
    assert program is not None
    hosts: list[str] = program.parser().parse_args(argv[1:]).allowed_media_domains
    return hosts


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("variables", "hosts"),
    [
        ([], ["none.invalid"]),
        (["DOMAINS="], ["none.invalid"]),
        (["ARGS=--port 8001"], ["none.invalid"]),
        (["DOMAINS=a.example b.example"], ["a.example", "b.example"]),
        (["ARGS=--allowed-media-domains c.example --port 8001"], ["c.example"]),
    ],
)
def test_no_host_unless_told(variables: list[str], hosts: list[str]) -> None:
    """An empty list would be every host; `.invalid` is a domain that cannot exist (RFC 2606)."""
    assert allowed(*variables) == hosts
