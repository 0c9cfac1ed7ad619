"""What is printed and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from metok_vllm.calibrate.bench import Row
from metok_vllm.calibrate.measure import interval
from metok_vllm.calibrate.search import Horizon, Seen
from metok_vllm.calibrate.settings import Setting
from metok_vllm.contract.forced import KL_LIMIT


def curve_table(horizon: Horizon) -> Table:
    """The probe's points."""
    table = Table(title=f"Nothing visual from layer k on, of {horizon.layers}")
    for name in ("k", "largest KL", "agree"):
        table.add_column(name, justify="right")
    for layer, seen in sorted(horizon.curve.items()):
        table.add_row(str(layer), f"{max(seen.kl):.3f}", f"{100 * seen.agreement:.1f} %")
    return table


def rows_table(rows: Sequence[Row], title: str) -> Table:
    """One line a way to answer."""
    table = Table(title=title)
    table.add_column("", overflow="fold")
    for name in ("tokens", "KV", "FLOPs", "agree", "95 %", "harm"):
        table.add_column(name, justify="right")
    for row in rows:
        seen = row.seen
        low, high = interval(sum(seen.agrees), len(seen.agrees))
        table.add_row(
            Text(row.name),
            f"{seen.tokens:.0f}",
            f"{100 * seen.kv_share:.0f} %",
            f"{100 * seen.flops:.0f} %",
            f"{100 * seen.agreement:.1f} %",
            f"{100 * low:.0f}-{100 * high:.0f}",
            f"{seen.worst:.2f}",
        )
    return table


def draw(path: Path, horizon: Horizon, tried: Mapping[Setting, Seen], rows: Sequence[Row]) -> None:
    """KL against layer, and cost against agreement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    points = sorted(horizon.curve.items())
    left.semilogy([layer for layer, _ in points], [max(*s.kl, 1e-5) for _, s in points], "o-", color="#1f5fa8")
    left.axhline(KL_LIMIT, color="#888", linestyle="--", linewidth=1)
    left.annotate(f"limit {KL_LIMIT:g}", (points[0][0] if points else 0, KL_LIMIT), va="bottom", color="#555")
    left.set(xlabel="layer k", ylabel="largest KL of a question, nats", title="Nothing visual from layer k on")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.plot(
        [seen.tokens for seen in tried.values()],
        [100 * seen.agreement for seen in tried.values()],
        ".",
        color="#bbb",
        label="tried in the search",
    )
    for row in rows:
        right.plot(row.seen.tokens, 100 * row.seen.agreement, "o", label=row.name.split(":")[0])
    right.set(xlabel="visual tokens, mean of the layers", ylabel="answers that agree, %", title="Cost and agreement")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
