"""What a short time on a GPU needs on top of the benchmark programs. From the repository's root:

gpu_bench.py kernels OUT.csv [ARGS]    # benchmarks.kernels with ARGS, one operation after the other
gpu_bench.py merge OUT.json IN...      # the variants of several runs of benchmarks.engine in one file
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def kernels(out: str, *arguments: str) -> int:
    """Each operation is checked, measured and appended to `out` by itself:
    whatever ends the run keeps what is done.

    Returns the worst operation's exit code.
    """
    if "--interpret" in arguments:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    from benchmarks.kernels import cases, cli

    def alone(operation: str) -> int:
        try:
            return cli.main(["--only", operation, "--out", out, *arguments])
        except (Exception, SystemExit) as error:  # an operation that cannot run takes no other one with it
            print(f"{operation}: {type(error).__name__}: {error}", flush=True)
            return 1

    return max(map(alone, dict.fromkeys(case.op for case in cases.cases(True, torch.device("cpu")))))


def merge(out: str, *paths: str) -> int:
    """Variants that were measured in several calls, in one result; ratios are worked out anew.

    Files that are missing, or hold no variant that ran, are left out. Returns 1, and writes nothing, if there
    is no other, or if they are of different workloads, devices or versions: such figures must not stand side
    by side.
    """
    from benchmarks.engine.report import ratios

    found = [json.loads(Path(path).read_text()) for path in paths if Path(path).exists()]
    ran = [one for one in found if any("levels" in entry for entry in one["variants"].values())]
    if not ran:
        print("nothing to merge")
        return 1

    def origin(one: dict[str, Any]) -> list[Any]:
        return [one["workload"], one["hardware"]["device"], one["versions"]]

    odd = [one["command"] for one in ran if origin(one) != origin(ran[0])]
    if odd:
        print("another workload, device or version:", *odd, sep="\n")
        return 1
    result = {**ran[0], "command": " ; ".join(one["command"] for one in ran)}
    result["variants"] = {name: entry for one in ran for name, entry in one["variants"].items()}
    result["ratios_to_stock"] = ratios(result["variants"])
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    # Started by hand, only the kit may be on the path.
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "kernels")]
    sys.exit({"kernels": kernels, "merge": merge}[sys.argv[1]](*sys.argv[2:]))
