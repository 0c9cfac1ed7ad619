"""The `metok` command.

`metok demo` shows METok at work on a real video; `metok calibrate` finds settings that leave a model's
answers what they are, and `metok probe` the layer behind which it reads no video; `metok models` lists what
can be served.

A user's mistake ends in one sentence and exit status 2, never in a trace.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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

    _add_calibrate(commands)
    models = commands.add_parser("models", help="list the model architectures that METok can serve")
    models.set_defaults(run=_models)
    return top


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find settings that leave this model's answers what they are",
        description="Ask the model about your videos, with METok off and under many settings, and write the cheapest "
        "setting that leaves the answers what they are: a profile for vllm serve. Needs no labels. Interrupted, the "
        "same command goes on. Ends with 1 where no setting does.",
    )
    probe = commands.add_parser(
        "probe",
        help="find the layer behind which this model reads no video",
        description="The first step of metok calibrate alone: minutes instead of many.",
    )
    for command in (calibrate, probe):
        command.add_argument("model", metavar="MODEL", help="folder (or Hugging Face name) of a checkpoint")
        command.add_argument("--videos", type=Path, metavar="DIR", help="folder of video files")
        command.add_argument(
            "--questions",
            type=Path,
            metavar="FILE",
            help="JSON lines of video and question (default: generic questions about every video)",
        )
        command.add_argument("--samples", type=_positive, default=32, metavar="N", help="questions (default: 32)")
        command.add_argument(
            "--answer-tokens", type=_positive, default=32, metavar="N", help="of an answer, compared (default: 32)"
        )
        command.add_argument(
            "--out",
            type=Path,
            default=Path("metok_profile.json"),
            metavar="FILE",
            help=(
                "the profile; beside it the picture (.png) and the folder of finished work (.work)"
                if command is calibrate
                else "names the folder of finished work (.work), which metok calibrate goes on from"
            ),
        )
        command.add_argument("--tensor-parallel-size", type=_positive, metavar="N", help="as of vllm serve")
        command.add_argument("--dtype", help="as of vllm serve")
        command.add_argument("--max-model-len", type=_positive, metavar="N", help="as of vllm serve")
        command.add_argument("--num-frames", type=_positive, metavar="N", help="frames sampled from a video")
        command.add_argument(
            "--engine-option",
            type=_json_object,
            default={},
            metavar="JSON",
            help="""more arguments of vllm.LLM, as '{"quantization": "fp8"}'""",
        )
        command.add_argument(
            "--metok",
            type=_json_object,
            default={},
            metavar="JSON",
            help="""settings of the server that are not searched, as '{"aligner_model": "google/siglip-..."}'""",
        )
    calibrate.add_argument(
        "--target", type=_share, default=0.99, metavar="SHARE", help="of the answers, must agree (default: 0.99)"
    )
    calibrate.add_argument("--force", action="store_true", help="write a profile that does not reach the target too")
    calibrate.set_defaults(run=_calibrate, force=False)
    probe.set_defaults(run=_probe, force=False, target=0.99)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text!r}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r}")
    return options


def _engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; what `--engine-option` states wins."""
    stated = {
        name: getattr(options, name)
        for name in ("tensor_parallel_size", "dtype", "max_model_len")
        if getattr(options, name) is not None
    }
    if options.num_frames is not None:
        stated["media_io_kwargs"] = {"video": {"num_frames": options.num_frames}}
    return {**stated, **options.engine_option}


def _calibrate(options: argparse.Namespace) -> int:
    if find_spec("matplotlib") is None:
        print("metok: error: Calibration draws with matplotlib: pip install matplotlib.", file=sys.stderr)
        return 2
    from metok_vllm.calibrate.run import run_calibrate

    return _measuring(options, run_calibrate)


def _probe(options: argparse.Namespace) -> int:
    from metok_vllm.calibrate.run import run_probe

    return _measuring(options, run_probe)


def _measuring(options: argparse.Namespace, command: Callable[[Any], int]) -> int:
    from metok_vllm.calibrate.errors import CalibrateError
    from metok_vllm.calibrate.run import Options

    try:
        return command(
            Options(
                model=options.model,
                videos=options.videos,
                questions=options.questions,
                target=options.target,
                out=options.out,
                samples=options.samples,
                answer_tokens=options.answer_tokens,
                engine=_engine_arguments(options),
                metok=options.metok,
                force=options.force,
            )
        )
    except CalibrateError as error:
        if error.details:
            print(error.details, file=sys.stderr)
        print(f"metok: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metok: interrupted; the same command goes on where it was.", file=sys.stderr)
        return 130


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
        print("metok: error: The demo draws with matplotlib: pip install matplotlib.", file=sys.stderr)
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
