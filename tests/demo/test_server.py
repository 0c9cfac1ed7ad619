"""The demo's server: waited for, its death explained, always stopped with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.model_choice import DemoModel
from metok_vllm.demo.server import free_port, running_server, serve_command, serve_environment, why_it_died

ROOT = Path(__file__).parents[2]


def stub_command(port: int, mode: str) -> list[str]:
    return [sys.executable, "-m", "tests.support.demo.stub_server", str(port), mode]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Whether a process is gone, or goes within a few seconds."""
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def helper_pid(log: Path) -> int:
    return int(log.read_text().split("HELPER ")[1].split()[0])


def test_a_healthy_server_runs_while_the_body_does_and_no_longer(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with running_server(stub_command(port, "healthy"), environment(), port, log, timeout=60):
        helper = helper_pid(log)
        assert is_running(helper)
    assert gone(helper)


def test_the_server_is_stopped_when_the_body_fails(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with (
        pytest.raises(ZeroDivisionError),
        running_server(stub_command(port, "healthy"), environment(), port, log, timeout=60),
    ):
        raise ZeroDivisionError
    assert gone(helper_pid(log))


def test_a_server_that_dies_is_explained_by_its_log(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with (
        pytest.raises(DemoError, match=r"^The server did not start: METok needs more layers \(log: ") as caught,
        running_server(stub_command(port, "dies"), environment(), port, log, timeout=60),
    ):
        pytest.fail("it never was healthy")
    assert caught.value.details.splitlines()[-1].startswith("RuntimeError: Engine core")


def test_a_server_that_hangs_is_given_up(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    with (
        pytest.raises(DemoError, match="not ready within 2 s"),
        running_server(stub_command(port, "hangs"), environment(), port, log, timeout=2),
    ):
        pytest.fail("it never was healthy")
    text = log.read_text()
    assert not text or gone(helper_pid(log))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_told_to_end_stops_its_server(tmp_path: Path, number: signal.Signals):
    port, log = free_port(), tmp_path / "log"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom metok_vllm.demo.server import running_server\nimport os\n"
        f"with running_server({stub_command(port, 'healthy')!r}, dict(os.environ), {port}, Path({str(log)!r})):\n"
        "    print('READY', flush=True)\n    time.sleep(600)\n"
    )
    demo = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job, which a test run may be, hands its children an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert demo.stdout is not None
    assert demo.stdout.readline() == "READY\n"
    helper = helper_pid(log)
    demo.send_signal(number)
    assert "KeyboardInterrupt" in demo.communicate(timeout=60)[1]
    assert gone(helper)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", ""),
        ("all is well\n", ""),
        ("vllm: error: METok cannot serve x (Y); it can serve: Z.\n", "METok cannot serve x (Y); it can serve: Z."),
        (
            "\x1b[31mOSError: disk full\x1b[0m\nRuntimeError: Engine core initialization failed. See above.\n",
            "disk full",
        ),
        ("  Value error, METok needs V2. [type=value_error]\n", "METok needs V2. [type=value_error]"),
        ("[rank0]: vllm.exceptions.VLLMValidationError: The prompt is too long.\n", "The prompt is too long."),
    ],
)
def test_the_reason_is_found_in_the_log(tmp_path: Path, log: str, reason: str):
    (tmp_path / "log").write_text(log)
    assert why_it_died(tmp_path / "log") == reason


def test_the_server_is_the_real_one_with_metok_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "7")
    model = DemoModel(str(tmp_path), flags=("--dtype", "float32"))
    command = serve_command(model, 8123, 32)
    at = command.index("serve")
    assert command[at : at + 4] == ["serve", str(tmp_path), "--plugin", "metok"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert {"--trust-request-mm-kwargs", "--allowed-media-domains"} <= set(command)
    assert command[-2:] == ["--dtype", "float32"]
    variables = serve_environment(model)
    assert variables["TRITON_INTERPRET"] == "7"  # the user's own choice stands
    assert variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert variables["HF_HUB_OFFLINE"] == "1"


def test_the_server_gets_room_for_a_long_video(tmp_path: Path):
    model = DemoModel(str(tmp_path))
    assert "--max-num-batched-tokens" not in serve_command(model, 1, 32)

    def room(frames: int) -> int:
        command = serve_command(model, 1, frames)
        return int(command[command.index("--max-num-batched-tokens") + 1])

    assert room(33) == 8192
    assert room(64) > 64 * 196
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 56, "patch_size": 8}}')
    assert 1000 * 16 + 1024 <= room(1000) < 1000 * 32
    # InternVL3: both sides are stated, and a frame has 256 tokens and a label.
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}}')
    assert 1000 * 265 < room(1000) < 1000 * 280
