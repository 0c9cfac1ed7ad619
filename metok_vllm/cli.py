"""The `metok` command.

`metok demo` shows METok at work on a real video; `metok models` lists what it can serve.

A user's mistake ends in one sentence and exit status 2, never in a trace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

DEFAULT_OUT = Path("out/demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: this process's) and return the exit status."""
    # A pipe may have an encoding that lacks the tables' lines and arrows; a "?" is better than a trace.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="metok", description="METok for vLLM: token compression for questions about long videos."
    )
    top.add_argument("--version", action="version", version=f"metok-vllm {_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="ask a real server about a real video, with METok and without",
        description="Start vLLM with METok (or use a running server), ask about a video with METok on and off, and "
        "show what was kept of every frame. Writes a picture of the events, timeline.png.",
    )
    demo.add_argument("--video", type=Path, metavar="FILE", help="a video file (default: a clip that comes along)")
    asked = demo.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="what to ask about it")
    asked.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="JSON lines of video, question (prompt, where it has options) and, if known, the right answer",
    )
    where = demo.add_mutually_exclusive_group()
    where.add_argument(
        "--model",
        metavar="MODEL",
        help="folder (or Hugging Face name) of a checkpoint to serve (default: a small one that stands in)",
    )
    where.add_argument(
        "--url",
        metavar="http://...",
        help="a running server, started with --plugin metok --trust-request-mm-kwargs; OPENAI_API_KEY is its key",
    )
    demo.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help=f"results (default: {DEFAULT_OUT})")
    demo.add_argument(
        "--frames",
        type=_frame_count,
        metavar="N",
        help="frames to sample (default: 32; the model that comes along: 64)",
    )
    demo.set_defaults(run=_demo)

    models = commands.add_parser("models", help="list the model architectures that METok can serve")
    models.set_defaults(run=_models)
    return top


def _version() -> str:
    try:
        return version("metok-vllm")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "(not installed)"


def _frame_count(text: str) -> int:
    from metok_vllm.demo.video import MOST_FRAMES

    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_FRAMES:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {MOST_FRAMES}, not {text!r}")
    return int(text)


def _demo(options: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        print("metok: error: The demo draws with matplotlib: pip install 'metok-vllm[demo]'.", file=sys.stderr)
        return 2
    from metok_vllm.demo.errors import DemoError
    from metok_vllm.demo.run import DemoOptions, run_demo

    try:
        run_demo(
            DemoOptions(
                video=options.video,
                question=options.question,
                questions=options.questions,
                model=options.model,
                url=options.url,
                out=options.out,
                frames=options.frames,
            )
        )
    except DemoError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(f"metok: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _models(_: argparse.Namespace) -> int:
    from metok_vllm.models.registry import SUPPORTED

    print("METok serves checkpoints of these architectures:")
    for supported in SUPPORTED:
        print(f"  {supported.stock}: {supported.about}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
