"""The demo from end to end: a server, every question asked twice, tables and a picture."""

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
from metok_vllm.demo.model_choice import CLIP, PROFILED_FRAMES, QUESTION, DemoModel, choose_model
from metok_vllm.demo.questions import DemoQuestion, load_questions
from metok_vllm.demo.server import HOST, free_port, running_server, serve_command, serve_environment
from metok_vllm.demo.tables import answers_table, render
from metok_vllm.demo.timeline import draw_timeline
from metok_vllm.demo.video import SampledVideo, load_video
from metok_vllm.demo.view import read_report, reported_frames


@dataclass(frozen=True)
class DemoOptions:
    """What the user stated; None where nothing."""

    out: Path
    frames: int | None = None
    video: Path | None = None
    question: str | None = None
    questions: Path | None = None
    model: str | None = None
    url: str | None = None


@dataclass(frozen=True)
class Exchange:
    """One question with its two answers, and METok's report of the first."""

    question: DemoQuestion
    on: Answer
    off: Answer
    report: dict[str, object]


def run_demo(options: DemoOptions, console: Console | None = None) -> None:
    """Ask about a video with METok on and off; print what was done; write report.json and timeline.png.

    Of several questions the first one's events, frames and savings are shown.

    Raises:
        DemoError: one sentence for the user: a mistake of theirs, or a server that does not play along.
    """
    console = console or Console()
    if options.question is not None and not options.question.strip():
        raise DemoError("The question is empty.")
    model = None
    if options.url is None:
        with _writing(options.out):
            model = choose_model(options.model, options.out)
    path, questions = _what_to_ask(options, model)
    frames = options.frames or (model.frames if model else PROFILED_FRAMES)
    video = load_video(path, frames)
    with _writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    console.print(Text(f"Video:    {video.name}, {_length(video)}, {len(video.times)} frames sampled"))
    console.print(Text(f"Question: {questions[0].prompt}" + (f" ... {len(questions)} in all" * (len(questions) > 1))))
    with _server(options, model, frames, console) as url:
        client = Client(url)
        with contextlib.closing(client), console.status("Asking, with METok and without ..."):
            exchanges = [_ask(client, video, question) for question in questions]
    first = exchanges[0]
    video = video.in_groups(reported_frames(first.report))
    view = read_report(first.report, video.times, video.duration)
    if len(exchanges) > 1:
        console.print(answers_table([(e.question, e.on, e.off) for e in exchanges]))
        console.print(Text(f"What METok did for the first question, {first.question.prompt!r}:"))
    console.print(render(view, first.on, first.off, video.timed))
    results, picture = options.out / "report.json", options.out / "timeline.png"
    with _writing(results):
        _write_results(results, video, exchanges)
    with _writing(picture):
        draw_timeline(view, video, first.question.prompt, picture)
    console.print(Text(f"The events and their frames: {picture}"))


def _what_to_ask(options: DemoOptions, model: DemoModel | None) -> tuple[Path, list[DemoQuestion]]:
    """The video file and the questions: the user's, else those that come along with the model."""
    if options.questions is not None:
        return load_questions(options.questions, options.video)
    sample = model.sample if model and options.video is None else None
    path, questions = options.video or CLIP, [DemoQuestion(QUESTION)]
    if sample is not None:
        path, questions = load_questions(sample, None)
    if options.question is not None:
        questions = [DemoQuestion(options.question.strip())]
    return path, questions


def _ask(client: Client, video: SampledVideo, question: DemoQuestion) -> Exchange:
    frames = len(video.times)
    on = client.ask(video.data_url, question.prompt, frames, {"report": True})
    report = client.report(on.request_id)
    return Exchange(question, on, client.ask(video.data_url, question.prompt, frames, "off"), report)


@contextlib.contextmanager
def _server(options: DemoOptions, model: DemoModel | None, frames: int, console: Console) -> Iterator[str]:
    """The address of the server to ask: the user's, or one that runs `model` until the end of the body."""
    if model is None:
        assert options.url is not None
        yield options.url
        return
    if model.note:
        console.print(Text(model.note, style="bold yellow"))
    port, log = free_port(), options.out / "server.log"
    command = serve_command(model, port, frames)
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


def _write_results(path: Path, video: SampledVideo, exchanges: list[Exchange]) -> None:
    results = [
        {
            "question": e.question.prompt,
            "right": e.question.answer,
            "metok": {"answer": e.on.text, "prompt_tokens": e.on.prompt_tokens, "report": e.report},
            "off": {"answer": e.off.text, "prompt_tokens": e.off.prompt_tokens},
        }
        for e in exchanges
    ]
    path.write_text(json.dumps({"video": video.name, "questions": results}, indent=1) + "\n")


def _length(video: SampledVideo) -> str:
    return f"{video.duration:.1f} s" if video.timed else f"{video.duration:.0f} frames"
