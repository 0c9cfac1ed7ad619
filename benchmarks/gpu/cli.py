"""All that a machine with a GPU can say of METok: kernel tests, kernels, whole requests, in stages.

    # Everything; an hour or less. Again: what is left.
    python -m benchmarks.gpu
    # A checkpoint of your own.
    python -m benchmarks.gpu --model folder
    # These stages, even if they have run.
    python -m benchmarks.gpu kernels eager
    # What fits in 560 seconds, the most valuable first.
    python -m benchmarks.gpu --seconds 560
    # The smallest form, on a CPU.
    python -m benchmarks.gpu --small

Every stage is a process with a time limit, and nothing that fails stops the rest. Writes report.md, results/
and logs/ into --out, anew after each stage. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common.options import positive
from benchmarks.common.paths import ROOT
from benchmarks.gpu import fallback, report
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.runner import Runner, outcomes
from benchmarks.gpu.stages import PUBLISHED, SMALL, Stage, stages

WITHOUT_FOLDER = (PUBLISHED, "0.5b")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these, again if they have run")
    parser.add_argument(
        "--model", default=PUBLISHED, help="7b, 0.5b (made-up weights) or a LLaVA-OneVision folder (7b)"
    )
    parser.add_argument("--small", action="store_true", help="the smallest form, on a CPU")
    parser.add_argument("--seconds", type=positive, help="for all of it; else each stage has its own limit alone")
    parser.add_argument("--out", type=Path, help="(out/gpu-report; with --small out/gpu-report-small)")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="after each stage, archives of all there is")
    parser.add_argument("--no-plots", action="store_true", help="draw later, with --report")
    parser.add_argument("--report", action="store_true", help="write the report from what is there and run nothing")
    parser.add_argument("--list", action="store_true", help="print the stages' names and run nothing")
    options = parser.parse_args(argv)
    if options.out is None:
        options.out = ROOT / "out" / ("gpu-report-small" if options.small else "gpu-report")
    options.out = options.out.resolve()  # stages run from the repository's root
    if options.model not in WITHOUT_FOLDER:
        if not (Path(options.model) / "config.json").is_file():
            parser.error(
                f"--model: {options.model} is neither {' nor '.join(WITHOUT_FOLDER)} nor a checkpoint's folder"
            )
        options.model = str(Path(options.model).resolve())
    return options


def pack(folder: Folder, target: Path, known: Sequence[Stage]) -> None:
    """Put what there is into `target`: summary.txt, report.md, results.tar.gz, logs.tar.gz."""
    target.mkdir(parents=True, exist_ok=True)
    ended = outcomes(folder)
    listed = [ended[stage.name] for stage in known if stage.name in ended]
    summary = [f"{one.name:18} {one.seconds:5} s  {one.result}" for one in listed]
    if folder.engine_option.exists():
        summary.append(f"engines ran with {folder.engine_option.read_text().strip()}")
    (target / "summary.txt").write_text("\n".join(summary) + "\n")
    (target / "report.md").write_text(folder.report.read_text())
    for name in ("results", "logs"):
        with tarfile.open(target / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder.path / name, name)
            if name == "logs":
                for path in folder.work.glob("*/*"):
                    if path.suffix in (".log", ".json"):
                        archive.add(path, f"logs/engines/{path.parent.name}-{path.name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is to be run and write the report. 1 if a stage failed, 2 if nothing can be run here."""
    options = arguments(argv)
    folder = Folder(options.out)
    known = list(stages(folder, options.small, options.model))
    names = [stage.name for stage in known]
    unknown = sorted(set(options.stages) - set(names))
    if unknown:
        print(f"no stage {', '.join(unknown)}; there are: {' '.join(names)}")
        return 2
    if options.list:
        print("\n".join(names))
        return 0
    folder.make()
    shown = [stage for stage in known if not options.small or stage.name in (*SMALL, *options.stages)]

    def write(plots: bool = False) -> None:
        report.write(folder, shown, "tiny" if options.small else options.model, plots)
        if options.pack is not None:
            pack(folder, options.pack, known)

    usable = options.report or run(shown, options, folder, write)
    write(plots=not options.no_plots)
    print(folder.report)
    if not usable:
        return 2
    ended = outcomes(folder)
    failed = [stage.name for stage in shown if stage.name in ended and not ended[stage.name].ok]
    if failed:
        print(f"did not end well: {' '.join(failed)}; name them to run them again")
    return int(bool(failed))


def run(shown: Sequence[Stage], options: argparse.Namespace, folder: Folder, write: Callable[[], None]) -> bool:
    """Run the stages that are named, else those that have not run yet; False if the machine is of no use."""
    ended = outcomes(folder)
    end = None if options.seconds is None else time.monotonic() + options.seconds
    runner = Runner(folder, options.small, end, write)
    chosen = [stage for stage in shown if stage.name in options.stages or not (options.stages or stage.name in ended)]
    plain = ended.get("smoke-llm")
    if not (options.stages or options.small or plain is None or plain.ok):
        runner.no_engine = fallback.NO_ENGINE
    machine = shown[0]
    if machine not in chosen and not (machine.name in ended and ended[machine.name].ok):
        chosen.insert(0, machine)
    for stage in chosen:
        outcome = runner.run(stage)
        if stage is machine and outcome is not None and not outcome.ok:
            return False
        if outcome is not None and not options.small and stage.name in fallback.AFTER:
            fallback.AFTER[stage.name](runner, stage, outcome)
    if runner.skipped:
        print(f"not begun: {' '.join(runner.skipped)}")
    return True
