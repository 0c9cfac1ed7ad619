"""The demo's output in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from metok_vllm.demo.ask import Answer
from metok_vllm.demo.questions import DemoQuestion
from metok_vllm.demo.view import Amounts, EventView, ReportView

_STRIDE_STYLES = ("bold green", "yellow", "dim")
"""Styles of the finest, the middle and the coarsest stride."""


def render(view: ReportView, on: Answer, off: Answer, timed: bool = True) -> RenderableType:
    """Everything the demo says about two answers to the same question, with METok and without.

    Args:
        view: the report of the request with METok.
        on: its answer.
        off: the answer with METok off.
        timed: whether the report's times are seconds.
    """
    return Group(
        answer_panel("Answer with METok", on),
        answer_panel("Answer with METok off", off),
        events_table(view, timed),
        frames_table(view),
        amounts_table(view, on, off),
    )


def answer_panel(title: str, answer: Answer) -> Panel:
    """One answer, as the model wrote it."""
    return Panel(_words(answer.text), title=title, title_align="left", expand=False)


def answers_table(rows: Sequence[tuple[DemoQuestion, Answer, Answer]]) -> Table:
    """Every question with its answers, METok on and off;
    where the right one is known, a wrong one is marked.
    """
    right = [question.answer for question, _, _ in rows]
    score = ""
    if None not in right:
        hits = [sum(a[i].text.strip() == q.answer for q, *a in rows) for i in (0, 1)]
        score = f"Right: {hits[0]} of {len(rows)} with METok, {hits[1]} of {len(rows)} without."
    table = Table(
        title="Answers",
        title_justify="left",
        title_style="bold",
        caption=score,
        caption_justify="left",
        show_lines=True,
    )
    for column in ("question", "right answer", "METok", "METok off"):
        table.add_column(column, overflow="fold")
    for question, on, off in rows:
        cells = [_words(question.prompt), _words(question.answer) if question.answer is not None else Text("-")]
        for answer in (on, off):
            cell = _words(answer.text)
            if question.answer is not None:
                cell.stylize("green" if answer.text.strip() == question.answer else "red")
                cell.append("" if answer.text.strip() == question.answer else "  (wrong)")
            cells.append(cell)
        table.add_row(*cells)
    return table


def _words(text: str) -> Text:
    """Somebody's words: never read as markup, without what a terminal would obey."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text) or "(no words)")


def events_table(view: ReportView, timed: bool = True) -> Table:
    """One row per event: its frames, time, how many frames at which stride, tokens."""
    unit = "s" if timed else "frames"
    table = Table(title="Events", title_justify="left", title_style="bold")
    table.add_column("event", justify="right")
    table.add_column("key")
    table.add_column("frames", justify="right")
    table.add_column(f"time ({unit})", justify="right")
    for stride in view.strides:
        table.add_column(f"stride {stride}", justify="right")
    table.add_column("tokens", justify="right")
    for event in view.events:
        table.add_row(
            str(event.index + 1),
            Text("key", style="bold green") if event.key else Text("-", style="dim"),
            f"{event.first}-{event.last}" if event.frames > 1 else str(event.first),
            f"{event.start:.1f} - {event.end:.1f}",
            *(str(event.count(stride)) for stride in view.strides),
            str(event.tokens),
        )
    table.add_section()
    totals = (sum(event.count(stride) for event in view.events) for stride in view.strides)
    table.add_row(
        "", "", str(len(view.frames)), f"{view.duration:.1f}", *map(str, totals), str(view.visual_tokens[1][1])
    )
    return table


def frames_table(view: ReportView) -> Table:
    """Every frame's stride and tokens, run by run."""
    table = Table(
        title="Frames: how finely each is kept",
        title_justify="left",
        title_style="bold",
        caption="One number a frame. How many frames get which stride is fixed by their number; the key frames of key "
        "events come first. A separator behind an event or a row counts with the frame before it.",
        caption_justify="left",
    )
    table.add_column("event", justify="right")
    table.add_column("stride of each frame")
    table.add_column("tokens of each frame")
    for event in view.events:
        tokens = [frame.tokens for frame in view.frames[event.first : event.last + 1]]
        table.add_row(str(event.index + 1), _strides(view, event), _runs(tokens))
    return table


def amounts_table(view: ReportView, on: Answer, off: Answer) -> Table:
    """Tokens, memory and work with METok off and on."""
    layers = view.prune_layers
    table = Table(
        title="Before and after",
        title_justify="left",
        title_style="bold",
        caption="Prompt tokens as the server counted them for both requests; KV cache and prefill by the engine's own "
        "counts (language model, causal attention).",
        caption_justify="left",
    )
    for column in ("", "METok off", "METok", "saved"):
        table.add_column(column, justify="left" if column == "" else "right")
    stock = view.visual_tokens[0][1]
    rows: list[tuple[str, Amounts]] = [
        ("prompt tokens (text and video)", Amounts(off.prompt_tokens, on.prompt_tokens)),
        ("visual tokens encoded", Amounts(stock, view.visual_tokens[1][1])),
        (f"visual tokens from layer {layers[0]}", Amounts(stock, view.visual_tokens[2][1])),
        (f"visual tokens from layer {layers[1]}", Amounts(stock, view.visual_tokens[3][1])),
        (f"visual tokens from layer {layers[2]}", Amounts(stock, view.visual_tokens[4][1])),
    ]
    if view.retained is not None:
        kept = f"visual KV kept for decoding, layers {layers[0]}-{layers[2] - 1} (tokens)"
        rows.append((kept, Amounts(stock, view.retained)))
    for name, amounts in rows:
        table.add_row(name, str(amounts.stock), str(amounts.metok), _percent(amounts))
    table.add_section()
    kv, flops = view.kv_bytes, view.prefill_flops
    table.add_row("KV cache of the prompt", bytes_text(kv.stock), bytes_text(kv.metok), _percent(kv))
    table.add_row("prefill work (FLOPs)", f"{flops.stock:.3g}", f"{flops.metok:.3g}", _percent(flops))
    return table


def bytes_text(count: int) -> str:
    """A number of bytes in a unit that fits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def plain(renderable: RenderableType, width: int = 120) -> str:
    """The same as text without colours."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def _strides(view: ReportView, event: EventView) -> Text:
    text = Text()
    for stride in event.strides:
        tier = min(view.strides.index(stride), len(_STRIDE_STYLES) - 1)
        text.append(f"{stride} ", style=_STRIDE_STYLES[tier])
    return text


def _runs(numbers: Iterable[int]) -> str:
    """``4, 4, 4, 16`` as ``3 x 4, 16``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0] + 1, number)
        else:
            runs.append((1, number))
    return ", ".join(f"{count} x {number}" if count > 1 else str(number) for count, number in runs)


def _percent(amounts: Amounts) -> str:
    return f"{100 * amounts.saved:.1f} %"
