"""Which of vLLM's programs a command line starts, and the parser that reads it.

`vllm serve`, `vllm run-batch`, the benchmarks that have an engine of their own, and what can be started as a
module instead (``python -m vllm.entrypoints.openai.api_server``) take `--plugin metok`. The others ask a
running server, or have no engine.
"""

from __future__ import annotations

import itertools
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

WORKS_WITH = "vllm serve, vllm run-batch, vllm bench latency, mm-processor, startup or throughput"


@dataclass(frozen=True)
class Program:
    """One of vLLM's programs that build an engine."""

    first: int  # index in `sys.argv` of what its parser reads first: the command, or the first option
    options: int  # index of the first option
    serves: bool  # has an HTTP server, to which routes can be added
    parser: Callable[[], Any]  # builds vLLM's `FlexibleArgumentParser`


def program_of(argv: Sequence[str]) -> Program | None:
    """The program that reads a command line, or None where `--plugin metok` means nothing to it."""
    command, kind = [*argv[1:3], "", ""][:2]
    if command == "serve":
        return Program(1, 2, True, _serve)
    if command == "run-batch":
        return Program(1, 2, False, _run_batch)
    if command == "bench" and kind in ("latency", "mm-processor", "startup", "throughput"):
        return Program(1, 3, False, _bench)
    module = _module(argv)
    if module in ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.launchers.api_server.entry"):
        return Program(1, 1, True, _api_server)
    if module in ("vllm.entrypoints.openai.run_batch", "vllm.entrypoints.launchers.run_batch"):
        return Program(1, 1, False, _batch_runner)
    return None


def vllm_command(argv: Sequence[str]) -> str | None:
    """How the user called a program of vLLM's, such as "vllm bench serve"; None if it is none of vLLM's."""
    module = _module(argv)
    if module is not None and module != "vllm.entrypoints.cli.main":
        return f"python -m {module}"
    if module is None and (not argv or PurePath(argv[0]).stem != "vllm"):
        return None
    command = list(itertools.takewhile(lambda word: not word.startswith("-"), argv[1:3]))
    return " ".join(["vllm", *(command if command[:1] in (["bench"], ["launch"]) else command[:1])])


def _module(argv: Sequence[str]) -> str | None:
    """Name of vLLM's module that was started with `python -m`: Python puts the path of its file first."""
    parts = PurePath(argv[0]).with_suffix("").parts if argv and argv[0].endswith(".py") else ()
    for index in range(len(parts) - 2, -1, -1):
        if parts[index : index + 2] in (("vllm", "entrypoints"), ("vllm", "benchmarks")):
            return ".".join(parts[index:])
    return None


def _top() -> tuple[Any, Any]:
    """As vLLM's `main` builds it (vllm/entrypoints/cli/main.py): the parser, and its place for commands."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")  # type: ignore[no-untyped-call]
    return parser, parser.add_subparsers()


def _serve() -> ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    parser, commands = _top()
    ServeSubcommand().subparser_init(commands)
    return parser  # type: ignore[no-any-return]


def _run_batch() -> ArgumentParser:
    from vllm.entrypoints.cli.run_batch import RunBatchSubcommand

    parser, commands = _top()
    RunBatchSubcommand().subparser_init(commands)
    return parser  # type: ignore[no-any-return]


def _bench() -> ArgumentParser:
    from vllm.entrypoints.cli.benchmark.main import BenchmarkSubcommand

    parser, commands = _top()
    BenchmarkSubcommand().subparser_init(commands)  # of the kinds, only where `sys.argv` has the command `bench`
    return parser  # type: ignore[no-any-return]


def _api_server() -> ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: ArgumentParser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    return parser


def _batch_runner() -> ArgumentParser:
    from vllm.entrypoints.launchers.run_batch import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: ArgumentParser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    return parser
