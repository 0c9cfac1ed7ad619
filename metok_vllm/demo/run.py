"""The demo from end to end: a server, one question asked twice, tables and a picture."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from metok_vllm.demo.ask import Answer, Client
from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.model_choice import CLIP, QUESTION, choose_model
from metok_vllm.demo.server import HOST, free_port, running_server, serve_command, serve_environment
from metok_vllm.demo.tables import render
from metok_vllm.demo.timeline import draw_timeline
from metok_vllm.demo.video import SampledVideo, load_video
from metok_vllm.demo.view import read_report


@dataclass(frozen=True)
class DemoOptions:
    """What the user stated; None where nothing."""

    out: Path
    frames: int = 32
    video: Path | None = None
    question: str | None = None
    model: str | None = None
    url: str | None = None


def run_demo(options: DemoOptions, console: Console | None = None) -> None:
    """Ask about a video with METok on and off; print what was done; write report.json and timeline.png.

    Raises:
        DemoError: one sentence for the user: a mistake of theirs, or a server that does not play along.
    """
    console = console or Console()
    question = QUESTION if options.question is None else options.question.strip()
    if not question:
        raise DemoError("The question is empty.")
    video = load_video(options.video or CLIP, options.frames)
    with _writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    console.print(Text(f"Video:    {video.name}, {_length(video)}, {len(video.times)} frames sampled"))
    console.print(Text(f"Question: {question}"))
    with _server(options, console) as url:
        client = Client(url)
        with contextlib.closing(client), console.status("Asking, with METok and without ..."):
            frames = len(video.times)
            on = client.ask(video.data_url, question, frames, {"report": True})
            report = client.report(on.request_id)
            off = client.ask(video.data_url, question, frames, "off")
    view = read_report(report, video.times, video.duration)
    console.print(render(view, on, off, video.timed))
    results, picture = options.out / "report.json", options.out / "timeline.png"
    with _writing(results):
        _write_results(results, question, video, on, off, report)
    with _writing(picture):
        draw_timeline(view, video, question, picture)
    console.print(Text(f"The events and their frames: {picture}"))


@contextlib.contextmanager
def _server(options: DemoOptions, console: Console) -> Iterator[str]:
    """The address of the server to ask: the user's, or one that runs until the end of the body."""
    if options.url is not None:
        yield options.url
        return
    with _writing(options.out):
        model = choose_model(options.model, options.out)
    if model.note:
        console.print(Text(model.note, style="bold yellow"))
    port, log = free_port(), options.out / "server.log"
    command = serve_command(model, port, options.frames)
    console.print(Text(f"$ {shlex.join(command)}", style="dim"))
    server = contextlib.ExitStack()
    with console.status(f"Starting the server (log: {log}) ..."), _writing(log):
        server.enter_context(running_server(command, serve_environment(model), port, log))
    try:
        yield f"http://{HOST}:{port}"
    finally:
        with console.status("Stopping the server ..."):
            server.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a sentence."""
    try:
        yield
    except OSError as error:
        raise DemoError(f"Cannot write {path}: {error.strerror or error}.") from None


def _write_results(
    path: Path, question: str, video: SampledVideo, on: Answer, off: Answer, report: dict[str, object]
) -> None:
    results = {
        "video": video.name,
        "question": question,
        "metok": {"answer": on.text, "prompt_tokens": on.prompt_tokens, "report": report},
        "off": {"answer": off.text, "prompt_tokens": off.prompt_tokens},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def _length(video: SampledVideo) -> str:
    return f"{video.duration:.1f} s" if video.timed else f"{video.duration:.0f} frames"
