"""Measure every kernel on the GPU, beside plain torch and torch.compile,
against ceilings measured in the same run.

    # On a GPU; appends to benchmarks/results/kernels.csv.
    python -m benchmarks.kernels
    # Anywhere: checks the results and this program, times nothing.
    python -m benchmarks.kernels --small --interpret

All cases of an operation are compared with their float32 references before one of them is timed; one
difference, and nothing is reported of that operation. Each row is written when it is measured: what ends the
run early keeps what is done. A time is that of the GPU alone (CUDA events), with the L2 overwritten before
each call.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.paths import RESULTS
from benchmarks.common.provenance import commit, timestamp

COLUMNS = (
    "date", "commit", "mode", "device", "torch", "triton", "op", "shape", "implementation",
    "p20_us", "p50_us", "p80_us", "megabytes", "gigaflops", "gigabytes_per_s", "share_of_copy",
    "teraflops_per_s", "share_of_matmul",
)  # fmt: skip
"""`mode` is "gpu" or "interpreter"; a row of the interpreter carries no time, for it would mean nothing."""


def flatten(result: Any) -> list[Any]:
    """The tensors of a result."""
    return [tensor for tensor in result if tensor is not None] if isinstance(result, tuple) else [result]


def difference(case: Any) -> str | None:
    """Compare the operation and its plain form with the reference; a sentence if one differs, else None."""
    import torch

    # Results may be buffers that the next call writes again, hence the clones.
    expected = [tensor.clone() for tensor in flatten(case.reference())]
    forms = (("metok", case.run, case.tolerance), ("torch", case.plain, case.plain_tolerance))
    for name, function, rtol in forms:
        for index, (actual, wanted) in enumerate(zip(flatten(function()), expected, strict=True)):
            scale = wanted[wanted.isfinite()].abs().max().item() if wanted.is_floating_point() else 0.0
            try:
                torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * 1e-1 * scale)
            except AssertionError as error:
                return f"{case.op} ({case.shape}): {name}, result {index}: {' '.join(str(error).split())}"
    return None


def time_us(function: Callable[[], Any], repeats: int, flush: Any) -> tuple[float, float, float]:
    """(p20, p50, p80) microseconds of GPU time.

    Writing `flush` empties the L2, and lets the host run ahead: a call of a few launches has no gaps between
    them.
    """
    import torch

    for _ in range(10):
        function()
    event: Any = torch.cuda.Event  # torch does not annotate its constructor
    events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) * 1e3 for start, end in events], dtype=torch.float64)
    p20, p50, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def ceilings(repeats: int, flush: Any) -> tuple[float, float]:
    """(GB/s of a copy of 1 GiB, TFLOP/s of a bf16 product of 8192 x 8192 matrices) on this device, now."""
    import torch

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / time_us(lambda: target.copy_(source), repeats, flush)[1] / 1e3
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matmul = 2 * 8192**3 / time_us(lambda: a @ b, repeats, flush)[1] / 1e6
    return copy, matmul


def measure(
    case: Any, repeats: int, flush: Any, copy: float, matmul: float, compiled: bool = True
) -> list[dict[str, Any]]:
    """One row for each of metok, torch and, where `compiled` and the case say so, torch.compile."""
    import torch

    rows = []
    torch.compiler.reset()
    forms = [("metok", case.run), ("torch", case.plain)]
    if compiled and case.compile:
        forms.append(("torch.compile", torch.compile(case.plain)))
    for name, function in forms:
        p20, p50, p80 = time_us(function, repeats, flush)
        bandwidth, speed = case.bytes / p50 / 1e3, case.flops / p50 / 1e6
        rows.append({
            "op": case.op, "shape": case.shape, "implementation": name,
            "p20_us": f"{p20:.2f}", "p50_us": f"{p50:.2f}", "p80_us": f"{p80:.2f}",
            "megabytes": f"{case.bytes / 1e6:.3f}", "gigaflops": f"{case.flops / 1e9:.3f}",
            "gigabytes_per_s": f"{bandwidth:.1f}", "share_of_copy": f"{bandwidth / copy:.3f}",
            "teraflops_per_s": f"{speed:.3f}", "share_of_matmul": f"{speed / matmul:.4f}",
        })  # fmt: skip
    return rows


def summary(case: Any, measured: Sequence[dict[str, Any]]) -> str:
    """One line for the terminal."""
    times = {row["implementation"]: float(row["p50_us"]) for row in measured}
    shares = f"{measured[0]['share_of_copy']} of copy, {measured[0]['share_of_matmul']} of product"
    listed = ", ".join(f"{name} {value:.1f} us" for name, value in times.items())
    verdict = "" if times["metok"] <= min(times.values()) else "   <- plain torch is faster: use it"
    return f"{case.op:22} {case.shape}: {listed} ({shares}){verdict}"


def interpreted(case: Any) -> list[dict[str, Any]]:
    """A case's row in the interpreter: that it agrees with its reference, and no time."""
    return [{"op": case.op, "shape": case.shape, "implementation": "metok"}]


def measured_by(options: argparse.Namespace) -> Callable[[Any], list[dict[str, Any]]]:
    """What measures a case on the GPU and says so in the terminal; it has measured the ceilings."""
    import torch

    flush = torch.empty(2**30, dtype=torch.uint8, device="cuda")  # larger than any L2
    copy, matmul = ceilings(options.repeats, flush)
    print(f"{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s, bf16 product {matmul:.0f} TFLOP/s")

    def rows(case: Any) -> list[dict[str, Any]]:
        measured = measure(case, options.repeats, flush, copy, matmul, not options.no_compile)
        print(summary(case, measured), flush=True)
        return measured

    return rows


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to the CSV; a file with other columns is refused rather than mixed.

    Without rows nothing is written.
    """
    new = not path.exists() or path.stat().st_size == 0
    if not new and path.read_text().splitlines()[0] != ",".join(COLUMNS):
        raise SystemExit(f"{path} has other columns: move it away first")
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--interpret", action="store_true", help="Triton's interpreter on the CPU: no times")
    parser.add_argument("--only", metavar="OP", nargs="+", help="these operations, by name")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes longest")
    parser.add_argument("--repeats", type=int, default=100, help="timed calls of each implementation (100)")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.csv")
    parsed = parser.parse_args(argv)
    if parsed.interpret and not parsed.small:
        parser.error("--interpret needs --small: real sizes would take hours")
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, append, one operation after the other.

    1 if a result is wrong or an operation cannot run, 2 if there is no GPU to measure on.
    """
    options = arguments(argv)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton  # type: ignore[import-untyped]  # Triton ships no type information

    from benchmarks.kernels.cases import cases

    if not options.interpret and not torch.cuda.is_available():
        print("no GPU here: run with --small --interpret to check everything but speed", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.interpret else "cuda")
    torch.manual_seed(0)
    names = list(dict.fromkeys(case.op for case in cases(True, torch.device("cpu"))))
    unknown = sorted(set(options.only or ()) - set(names))
    if unknown:
        raise SystemExit(f"--only: no operation {', '.join(unknown)}; there are {', '.join(names)}")
    common = {
        "date": timestamp(),
        "commit": commit(), "torch": torch.__version__, "triton": triton.__version__,
        "mode": "interpreter" if options.interpret else "gpu",
        "device": platform.machine() if options.interpret else torch.cuda.get_device_name(),
    }  # fmt: skip
    append(options.out, [])  # refuses a file that is of no use before anything is measured
    rows = interpreted if options.interpret else measured_by(options)
    failed = done = 0
    for name in names:
        if options.only is not None and name not in options.only:
            continue

        def of_operation(name: str = name) -> Any:
            # A generator, so that the inputs of one case at a time are in memory.
            return (case for case in cases(options.small, device) if case.op == name)

        try:
            wrong = [message for message in map(difference, of_operation()) if message]
            if not wrong:
                for case in of_operation():
                    append(options.out, [{**common, **row} for row in rows(case)])
                    done += 1
        except Exception as error:  # an operation that cannot run takes no other one with it
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            failed += 1
            print(f"{name} is wrong or cannot run; nothing more is reported of it.", *wrong, sep="\n", file=sys.stderr)
    if options.interpret:
        print(f"{done} cases agree with their references in the interpreter; no time was measured.")
    return int(failed > 0)
