"""``python -m tests.support.media_fuzz``: draw and decode cases for some minutes; exit 1 on a finding."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field

from .cases import Case, draw, parse, shrunk
from .judge import SETTINGS, Decode, verdict
from .runner import Outcome, Runner


@dataclass
class Tally:
    """What was seen so far."""

    start: float = field(default_factory=time.monotonic)
    cases: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    slowest: dict[str, tuple[float, Case]] = field(default_factory=dict)
    largest: dict[str, tuple[float, Case]] = field(default_factory=dict)

    def add(self, case: Case, outcome: Outcome) -> None:
        """Count one case."""
        self.cases += 1
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        if outcome.seconds > self.slowest.get(case.family, (0.0, case))[0]:
            self.slowest[case.family] = (outcome.seconds, case)
        if outcome.peak_mib > self.largest.get(case.family, (0.0, case))[0]:
            self.largest[case.family] = (outcome.peak_mib, case)

    def line(self, findings: int) -> str:
        """One line of progress."""
        seconds = time.monotonic() - self.start
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        return (
            f"{seconds:6.0f} s  {self.cases} cases, {self.cases / seconds:.1f} a second: {kinds}; {findings} findings"
        )

    def table(self) -> str:
        """The worst time and memory of each container."""
        rows = [
            f"{family:10} {self.slowest[family][0]:8.2f} {self.largest[family][0]:10.0f}"
            for family in sorted(self.slowest)
        ]
        return "\n".join([f"{'container':10} {'worst s':>8} {'worst MiB':>10}", *rows])


Kind = tuple[str, str, frozenset[str]]
"""What is wrong, the container family, and the operations that it takes."""


def is_known(case: Case, wrong: str, known: set[Kind]) -> bool:
    """Whether a finding like this one was reported: the same fault, and at least the same operations."""
    names = {step.name for step in case.steps}
    return any((wrong.partition(":")[0], case.family) == key[:2] and key[2] <= names for key in known)


def report(case: Case, outcome: Outcome, wrong: str, decode: Decode) -> Kind:
    """Print a finding, as small as it gets, and return its kind."""
    kind = wrong.partition(":")[0]

    def same(smaller: Case) -> bool:
        found = verdict(smaller, decode)[1]
        return found is not None and found.partition(":")[0] == kind

    small = shrunk(case, same)
    size = len(small.data())
    print(f"FINDING {wrong}  ({case.base}, {outcome.seconds:.1f} s, {outcome.peak_mib:.0f} MiB)", flush=True)
    print(f"  make fuzz CASE='{small}'  ({size} bytes)", flush=True)
    return kind, case.family, frozenset(step.name for step in small.steps)


def main() -> int:
    """Run the cases that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="the first case's number; each later one is one more")
    parser.add_argument("--case", help="one case, as a finding's line gives it")
    parser.add_argument("--out", help="write the bytes of --case to this file")
    asked = parser.parse_args()
    try:
        only = [parse(asked.case)] if asked.case else None
    except ValueError as error:
        parser.error(str(error))
    if only and asked.out:
        with open(asked.out, "wb") as file:
            file.write(only[0].data())
    tally, findings, told = Tally(), 0, time.monotonic()
    known: set[Kind] = set()
    with Runner() as runner:

        def decode(data: bytes) -> Outcome:
            return runner.run_one(data, SETTINGS)

        seed = asked.seed
        while time.monotonic() - tally.start < asked.minutes * 60:
            case = only[0] if only else draw(seed)
            outcome, wrong = verdict(case, decode)
            tally.add(case, outcome)
            if wrong is not None:
                findings += 1
                if not is_known(case, wrong, known):
                    known.add(report(case, outcome, wrong, decode))
            if only:
                print(f"{outcome.kind}: {outcome.said}  ({outcome.seconds:.2f} s, {outcome.peak_mib:.0f} MiB)")
                break
            seed += 1
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(tally.line(findings), flush=True)
    print(tally.line(findings))
    print(tally.table())
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
