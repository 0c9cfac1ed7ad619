"""What the client of a refused request can be told to do, on this server.

Whether requests may state options for their media is vLLM's ``--trust-request-mm-kwargs``. It is no part of
vLLM's configuration: its API servers alone keep it (vllm/entrypoints/launchers/cli_args.py). The sentences
are said in other processes and places too, so it travels in the environment, which all processes of a server
inherit. Where no command line has said anything, the requests come from the process itself (`LLM()`), which
may state whatever it likes.
"""

from __future__ import annotations

import os

VARIABLE = "METOK_REQUESTS_STATE_KWARGS"
"""Not for users: set for a server's processes by `frontend/command_line.py`."""


def tell_processes(requests_state_kwargs: bool) -> None:
    """Let this process and those that it starts know what requests may state."""
    os.environ[VARIABLE] = str(int(requests_state_kwargs))


def requests_state_kwargs() -> bool:
    """Whether requests may state `mm_processor_kwargs` and `media_io_kwargs`."""
    return os.environ.get(VARIABLE) != "0"


def settings_place() -> str:
    """Where a setting of METok that a request may override can be changed, for the head of a sentence."""
    return "mm_processor_kwargs" if requests_state_kwargs() else "additional_config"


def where_settings_go() -> str:
    """Where a client states METok's settings, if it may."""
    if requests_state_kwargs():
        return "settings go into mm_processor_kwargs"
    return "this server's settings are its own, and no request states any"


def all_frames() -> str:
    """How to have every frame of a list taken; the end of a sentence that tells to send fewer."""
    if requests_state_kwargs():
        return 'state media_io_kwargs={"video": {"num_frames": -1}}, which takes them all'
    return """start the server with --media-io-kwargs '{"video": {"num_frames": -1}}', which takes them all"""


def fewer_frames() -> str:
    """How a client gets a shorter prompt."""
    if requests_state_kwargs():
        return 'take fewer frames of it by media_io_kwargs={"video": {"num_frames": ...}}'
    return "send a video of fewer frames"


def compress_alone(otherwise: str) -> str:
    """How a client has a video compressed and not pruned; `otherwise` where it cannot."""
    if requests_state_kwargs():
        return 'send the request with mm_processor_kwargs={"metok": {"stages": 1}}'
    return otherwise


def with_report() -> str:
    """Which requests leave a report."""
    where = "" if requests_state_kwargs() else " to a server with --trust-request-mm-kwargs"
    return f'requests with mm_processor_kwargs={{"metok": {{"report": true}}}}{where}'
