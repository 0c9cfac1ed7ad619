"""What does compression cost in answers? Stock, METok and its ablations,
and other methods, on held-out videos.

    # The test set: every method locally, three points through vLLM.
    python -m benchmarks.accuracy
    # A reduced run for CI.
    python -m benchmarks.accuracy --short
    # Your questions, any server.
    python -m benchmarks.accuracy --set my.jsonl --url http://localhost:8000 --plain
    python -m benchmarks.accuracy --plot benchmarks/results/accuracy.json

Writes a JSON, a CSV and plots. See the section "Accuracy" of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.accuracy.data import Item, UsageError, load_items
from benchmarks.accuracy.generated_set import generate
from benchmarks.accuracy.methods import CALIBRATED, PAIRS, SERVED, SHORT, STOCK, UNDER_PROFILE, chosen, methods
from benchmarks.accuracy.plot import draw
from benchmarks.accuracy.report import Answers, paired, read_up_to, show, show_pairs, summarise, write_csv, write_json
from benchmarks.accuracy.run import agreement, describe_model, describe_set, run_local, run_server
from benchmarks.accuracy.server import ServerError, ServerRunner, Settings, started
from benchmarks.accuracy.video import Checkpoint, require_model
from benchmarks.common.options import positive
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.provenance import conditions
from metok_vllm.demo.errors import DemoError
from metok_vllm.demo.model_choice import TRAINED

AGREE = 0.9
CHANGES_THE_RUN = ("set", "split", "videos", "limit", "model", "frames", "methods", "served", "url", "probe")
"""A run with one of these options is another one than the repository's, and does not replace its result."""
WIDTH = 200
"""Columns of the tables, at least; narrower terminals wrap them."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    ap = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--short", action="store_true", help="8 videos and the main methods; writes under out/")
    ap.add_argument("--set", type=Path, help="JSON lines of your own; default: generated videos of --split")
    ap.add_argument("--split", choices=("test", "valid"), default="test", help="of the generated videos (test)")
    ap.add_argument("--videos", type=positive, help="generated videos (100)")
    ap.add_argument("--limit", type=positive, help="only the first so many questions")
    ap.add_argument("--model", type=Path, default=TRAINED, help="folder of a LLaVA-OneVision checkpoint")
    ap.add_argument("--frames", type=positive, default=64, help="most frames sampled from a video (64)")
    ap.add_argument("--methods", type=lambda text: text.split(","), help="only these of the local methods, by name")
    ap.add_argument(
        "--probe", action="store_true", help="only the probe: up to which layer does the model read its video?"
    )
    ap.add_argument("--list", action="store_true", help="list the local methods and stop")
    ap.add_argument("--served", type=int, help="questions that also go through a real server (120, short 12; 0: none)")
    ap.add_argument("--url", help="ask this server instead of running anything here")
    ap.add_argument(
        "--plain", action="store_true", help="with --url: any OpenAI-compatible server, nothing of METok's is sent"
    )
    ap.add_argument(
        "--metok", type=settings, action="append", default=[], metavar="JSON", help="with --url: one more point"
    )
    ap.add_argument(
        "--out", type=Path, help="JSON to write (out/accuracy.json; as it is: benchmarks/results/accuracy.json)"
    )
    ap.add_argument("--plot", type=Path, metavar="JSON", help="draw the plots of a result again and stop")
    args = ap.parse_args(argv)
    if args.plain and not args.url:
        ap.error("--plain goes with --url")
    if args.probe and (args.url or args.methods):
        ap.error("--probe goes with neither --url nor --methods: it runs methods of its own here")
    short, as_it_is = args.short, all(getattr(args, name) == ap.get_default(name) for name in CHANGES_THE_RUN)
    args.videos = args.videos or (8 if short else 100)
    args.served = args.served if args.served is not None else (12 if short else 120)
    default = RESULTS / "accuracy.json" if as_it_is else ROOT / "out" / "accuracy.json"
    args.out = args.out or (ROOT / "out" / "accuracy-short.json" if short else default)
    if args.probe:
        args.served = 0
    return args


def settings(text: str) -> dict[str, Any]:
    """METok's settings for a request."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object of settings: {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark: 0, 1 where server and local runner do not agree, 2 where it cannot run."""
    args = arguments(argv)
    console = Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH)
    if args.plot:
        for path in draw(json.loads(args.plot.read_text()), args.plot):
            console.print(str(path))
        return 0
    try:
        return run(args, console, shlex.join(["python", "-m", "benchmarks.accuracy", *(argv or sys.argv[1:])]))
    except (UsageError, ServerError, DemoError) as error:
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace, console: Console, command: str) -> int:
    """The benchmark itself."""
    began = time.monotonic()
    if not args.url:
        require_model(args.model)
    path = args.set or generate(args.split, args.videos, ROOT / "out" / f"accuracy-{args.split}-{args.videos}")
    items = load_items(path, args.limit)
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **conditions(),
    }
    if args.url:
        result["set"] = describe_set(path, items, [], args.frames)
        ask_server(args, items, result, console)
    else:
        compare_methods(args, path, items, result, console)
    result["minutes"] = (time.monotonic() - began) / 60
    write_json(result, args.out)
    write_csv(result, args.out.with_suffix(".csv"))
    written = [args.out, args.out.with_suffix(".csv")]
    if "local" in result:
        written += draw(result, args.out)
    console.print(f"{result['minutes']:.1f} minutes; " + ", ".join(str(p) for p in written))
    return 0 if agreed(result) else 1


def agreed(result: dict[str, Any]) -> bool:
    """Whether the two runners gave nearly always the same answers and counts; ties in float32 may differ."""
    table = result.get("server", {}).get("agreement", {})
    return all(min(row["same_text"], row["same_counts"]) >= AGREE * row["questions"] for row in table.values())


def compare_methods(
    args: argparse.Namespace, path: Path, items: list[Item], result: dict[str, Any], console: Console
) -> None:
    """Every method locally, then some through a server that this program starts."""
    checkpoint = Checkpoint(args.model)
    known = methods(checkpoint)
    if args.list:
        for method in known:
            console.print(f"{method.name}: {method.what}", highlight=False)
        raise SystemExit(0)
    names = args.methods
    if args.probe:
        names = [method.name for method in known if method.family == "probe"]
    elif args.short and names is None:
        names = [method.name for method in known if method.name in SHORT]
    answers, lengths = run_local(checkpoint, items, chosen(known, names), args.frames, console.print)
    result["model"] = describe_model(checkpoint, args.model)
    result["set"] = describe_set(path, items, lengths, args.frames)
    result["local"] = {"methods": summarise(items, answers), "pairs": paired(items, answers, PAIRS)}
    show(console, "Local runner", result["local"]["methods"])
    if result["local"]["pairs"]:
        show_pairs(console, result["local"]["pairs"])
    if probed := read_up_to(result["local"]["methods"], len(checkpoint.decoder.layers)):
        console.print(probed, highlight=False)
    if not args.served:
        return
    chosen_items = np.linspace(0, len(items) - 1, min(args.served, len(items)), dtype=int)  # over all videos and kinds
    asked = [items[i] for i in chosen_items]
    theirs = {
        n: Answers(a.family, a.what, a.definition, [a.outcomes[i] for i in chosen_items]) for n, a in answers.items()
    }
    served: dict[str, Answers] = {}
    for points in (SERVED, UNDER_PROFILE) if CALIBRATED in {method.name for method in known} else (SERVED,):
        log = ROOT / "out" / f"accuracy-server{'-profile' if points is UNDER_PROFILE else ''}.log"
        with started(args.model, args.frames, log, profile=points is UNDER_PROFILE) as url:
            server = ServerRunner(url, args.frames, len(checkpoint.decoder.layers))
            served |= run_server(server, asked, points, console.print)
            server.close()
    result["server"] = {"methods": summarise(asked, served), "agreement": agreement(asked, theirs, served)}
    show(console, "vLLM server with METok", result["server"]["methods"])
    for name, row in result["server"]["agreement"].items():
        console.print(
            f"{name}: server and local runner give the same answer to {row['same_text']} of {row['questions']} questions, "
            f"the same token and KV counts for {row['same_counts']}"
        )


def ask_server(args: argparse.Namespace, items: list[Item], result: dict[str, Any], console: Console) -> None:
    """A server of the user's own."""
    points: dict[str, Settings] = {STOCK: None} if args.plain else {**SERVED}
    if not args.plain:
        points |= {f"metok {json.dumps(stated)}": stated for stated in args.metok}
    url = args.url.rstrip("/")
    server = ServerRunner(url if url.endswith("/v1") else f"{url}/v1", args.frames)
    served = run_server(server, items, points, console.print)
    server.close()
    result["server"] = {"url": args.url, "model": server.model, "methods": summarise(items, served)}
    show(console, f"{server.model} at {args.url}", result["server"]["methods"])
