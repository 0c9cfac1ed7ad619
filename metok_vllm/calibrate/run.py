"""`metok calibrate` and `metok probe` from end to end."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from metok_vllm.calibrate.bench import Bench, Model, Row, stage1_alone
from metok_vllm.calibrate.check import first_that_passes
from metok_vllm.calibrate.engines import Engines
from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.measure import interval
from metok_vllm.calibrate.questions import Questions, choose
from metok_vllm.calibrate.report import curve_table, draw, rows_table
from metok_vllm.calibrate.search import FEW, MOST_FORWARDS, Horizon, Search, Seen, find_horizon, search
from metok_vllm.calibrate.settings import Setting, unseen_from
from metok_vllm.calibrate.stated import check_stated
from metok_vllm.calibrate.verdict import judge
from metok_vllm.contract.profile import SETTABLE, Measured, ModelMark, Profile, write_profile
from metok_vllm.frontend.fingerprint import fingerprint, model_folder
from metok_vllm.models.registry import family_of

SPARE = 1.5
"""So many times the wanted questions are asked of the stock model: some do not need their video."""

HELD_OUT = 6  # requests of a held-out question beside settings: stock twice, no video, two presets, fewer frames
BEFORE_THE_SEARCH = 4  # requests a question: the stock answer, without the video, and two presets


@dataclass(frozen=True)
class Options:
    """What the user stated."""

    model: str
    videos: Path | None = None
    questions: Path | None = None
    target: float = 0.99
    out: Path = Path("metok_profile.json")
    samples: int = 32
    answer_tokens: int = 32
    engine: Mapping[str, Any] = field(default_factory=dict)  # arguments of `vllm.LLM`
    metok: Mapping[str, Any] = field(default_factory=dict)  # settings of the server, none that is searched
    force: bool = False
    most_forwards: int = MOST_FORWARDS

    @property
    def work(self) -> Path:
        """Where results of finished engines are kept."""
        return self.out.with_name(self.out.stem + ".work")

    @property
    def picture(self) -> Path:
        return self.out.with_suffix(".png")


@dataclass
class _Session:
    console: Console
    bench: Bench
    questions: Questions
    progress: Progress
    rows: list[Row]

    def stage(self, words: str) -> None:
        self.progress.update(self.progress.task_ids[0], description=words)


@contextlib.contextmanager
def _session(options: Options, console: Console, held_out: bool, forwards: int) -> Iterator[_Session]:
    """Read the user's files, answer with the stock model, and show a progress bar while the body runs."""
    _check_writable(options)
    check_stated(options.engine, options.metok)
    mark = _mark(options)
    _refuse_unprunable(options)
    console.print(Text(f"Model:     {options.model}"))
    wanted = round(SPARE * options.samples)
    questions = choose(options.videos, options.questions, wanted, held_out)
    for name in questions.unusable:
        console.print(Text(f"Left out:  {name} is no video that METok can read.", style="yellow"))
    if questions.generic:
        console.print(
            Text("Questions: generic ones, since --questions names none; your own say more.", style="bold yellow")
        )
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} requests"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as progress, contextlib.ExitStack() as stack:
        task = progress.add_task("Stock answers", total=None)
        model = Model(
            name=options.model,
            mark=mark,
            plugin=_version("metok-vllm"),
            vllm=_version("vllm"),
            engine=options.engine,
            metok=options.metok,
            answer_tokens=options.answer_tokens,
        )
        engines = stack.enter_context(Engines(options.work, lambda done: progress.advance(task, done)))
        bench = Bench(model, engines)
        first = bench.first_job(questions.search, questions.held_out).requests
        later = min(options.samples, len(questions.search)) * forwards
        later += min(options.samples, len(questions.held_out)) * 4
        progress.update(task, total=first + later)
        rows = bench.begin(questions.search, questions.held_out, options.samples, lambda: _mark(options))
        if not bench.search or (held_out and not bench.held_out):
            raise CalibrateError(
                f"None of the questions needs its video ({bench.discarded} discarded), so nothing can be measured: state "
                "--questions that do."
            )
        yield _Session(console, bench, questions, progress, rows)
        progress.update(task, total=progress.tasks[0].completed, description="Done")
    console.print(
        Text(f"Engines:   {bench.engines.started} started, {bench.engines.read_again} read again from {options.work}")
    )


def run_probe(options: Options, console: Console | None = None) -> int:
    """The horizon alone.

    Raises:
        CalibrateError: one sentence for the user.
    """
    console = console or Console()
    with _session(options, console, held_out=False, forwards=6) as session:
        tried = Search(session.bench.evaluate, options.target)
        horizon = _horizon(session, tried)
    console.print(curve_table(horizon))
    console.print(Text(_about(session, horizon)))
    return 0


def run_calibrate(options: Options, console: Console | None = None) -> int:
    """Find a setting, check it, write the profile.

    Returns:
        0, or 1 where no setting keeps the answers.

    Raises:
        CalibrateError: one sentence for the user.
    """
    console = console or Console()
    with _session(options, console, held_out=True, forwards=options.most_forwards - BEFORE_THE_SEARCH) as session:
        bench = session.bench
        tried = Search(bench.evaluate, options.target, most=options.most_forwards - BEFORE_THE_SEARCH)
        horizon = _horizon(session, tried)
        session.stage("Searching")
        tried.seen.update(bench.seen)
        tried.least_last = horizon.chosen
        search(tried, horizon.chosen, bench.known.layers, bench.known.first_layer, bench.known.strides)
        session.stage("Checking")
        presets = dict(zip(bench.presets(), (row.seen for row in session.rows[1:]), strict=True))
        setting, found, passes = first_that_passes(tried, bench.on_held_out, options.target, presets)
        count, frames = _as_few_frames(bench, found)
        rows = [
            *session.rows[:1],
            Row(f"fewer frames, {count}, METok off", frames),
            Row("stage 1 alone", bench.on_held_out([stage1_alone(bench.known)])[0]),
            *session.rows[1:],
            Row(f"found: {setting.words()}", found),
        ]
    console.print(curve_table(horizon))
    console.print(Text(_about(session, horizon)))
    held = len(bench.held_out)
    console.print(
        rows_table(rows, f"On {held} questions about {_videos(bench.held_out)} videos that the search never saw")
    )
    console.print(
        Text(
            f"Requests a question: {BEFORE_THE_SEARCH + tried.spent} to search, {len(tried.seen)} settings; "
            f"{HELD_OUT + bench.checked} of a held-out one."
        )
    )
    draw(options.picture, horizon, tried.seen, rows)
    console.print(Text(f"Picture:   {options.picture}"))
    verdict = judge(found, frames, count, options.target, passes)
    console.print(Text(verdict.sentence, style="bold green" if verdict.beats_frames else "bold yellow"))
    if not verdict.passes and not options.force:
        console.print(Text("No profile was written (--force writes one all the same)."))
        return 1
    write_profile(options.out, _profile(session, options, setting, found, horizon))
    console.print(Text(f"Profile:   {options.out}" + ("" if verdict.beats_frames else ", written all the same")))
    if verdict.beats_frames:
        console.print(Text(f"Use it:    {serve_command(options)}"), soft_wrap=True)
    return 0 if verdict.passes else 1


def serve_command(options: Options) -> str:
    """A server as the profile was measured, for a shell."""
    words = ["vllm", "serve", options.model, "--plugin", "metok"]
    stated = {**options.engine, "additional_config": {"metok": {**options.metok, "profile": str(options.out)}}}
    for name, value in stated.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):  # one word each
            words += [f"--{flag}", *(one if isinstance(one, str) else json.dumps(one) for one in value)]
        elif value is not None:  # which is the default
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def _horizon(session: _Session, tried: Search) -> Horizon:
    session.stage("Horizon")
    facts = session.bench.known

    def look(layer: int) -> Seen:
        setting = unseen_from(layer, facts.strides[0])
        tried.try_all([setting])
        return tried.seen[setting]

    return find_horizon(look, facts.layers, facts.first_layer, len(session.bench.search), tried.target)


def _as_few_frames(bench: Bench, found: Seen) -> tuple[int, Seen]:
    """So many frames that their tokens are as many as the found setting's, and what they do."""
    stock = sum(bench.stock_tokens) / len(bench.stock_tokens)
    count = max(1, round(bench.frames * found.tokens / stock)) * bench.known.frame_group
    return count, bench.fewer_frames(count)


def _about(session: _Session, horizon: Horizon) -> str:
    bench = session.bench
    asked = f"{len(bench.search)} questions about {_videos(bench.search)} videos"
    discarded = f" ({bench.discarded} more do not need their video and were discarded)" if bench.discarded else ""
    if not horizon.found:
        return (
            f"No horizon: on {asked}{discarded} the model reads its video up to its last layers, so L3 cannot drop what "
            "is left. Stage 1 alone, or fewer frames, are what can be saved."
        )
    few = f" and one layer is added, with fewer than {FEW} questions" if len(bench.search) < FEW else ""
    later = f"; L3 is {horizon.chosen}, where the answers agree{few}" if horizon.chosen > horizon.layer else ""
    return f"Horizon: layer {horizon.layer} of {horizon.layers}, on {asked}{discarded}{later}."


def _videos(asked: tuple[Any, ...]) -> int:
    return len({one.video for one in asked})


def _profile(session: _Session, options: Options, setting: Setting, found: Seen, horizon: Horizon) -> Profile:
    bench = session.bench
    folder = Path(options.model)
    return Profile(
        format=1,
        model=folder.name if folder.is_absolute() else options.model,  # where it lies is nobody's business
        mark=ModelMark.model_validate_json(bench.model.mark),
        settings=_settings(options, setting),
        engine=dict(options.engine),
        vllm=bench.known.vllm,
        plugin=bench.model.plugin,
        horizon=horizon.layer,
        layers=horizon.layers,
        generic_questions=session.questions.generic,
        search_videos=_videos(bench.search),
        search_questions=len(bench.search),
        measured=Measured(
            videos=_videos(bench.held_out),
            questions=len(bench.held_out),
            agreement=found.agreement,
            interval=interval(sum(found.agrees), len(found.agrees)),
            largest_harm=found.worst,
            tokens=found.tokens,
            tokens_stock=sum(bench.stock_tokens) / len(bench.stock_tokens),
            kv=found.kv_share,
            flops=found.flops,
        ),
    )


def _settings(options: Options, setting: Setting) -> dict[str, Any]:
    """What the profile states. A tower's own path is each server's business; that it takes one is not."""
    stated = {key: value for key, value in options.metok.items() if key in SETTABLE}
    tower = {"aligner": "dual-tower"} if options.metok.get("aligner_model") else {}
    return {**setting.profile(), **tower, **stated}


def _mark(options: Options) -> str:
    try:
        return fingerprint(_folder(options)).model_dump_json()
    except ValueError as error:
        raise CalibrateError(str(error)) from None


def _folder(options: Options) -> Path:
    return model_folder(options.model, options.engine.get("revision"))


def _refuse_unprunable(options: Options) -> None:
    """A language model that cannot be pruned has nothing to calibrate.

    Raises:
        CalibrateError: it is one.
    """
    try:
        family = family_of(json.loads((_folder(options) / "config.json").read_bytes()).get("architectures"))
    except (ValueError, AttributeError):  # no JSON, or no object: vLLM says what is wrong with it
        return
    if family is not None and family.unprunable:
        raise CalibrateError(
            f"There is nothing to calibrate: {family.unprunable}, so this model is served with the setting stages 1, which "
            "prunes no layer."
        )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


def _check_writable(options: Options) -> None:
    path = options.out
    try:
        if path.is_dir():
            raise CalibrateError(f"Cannot write {path}: it is a folder.")
        if path in (options.picture, options.work):
            raise CalibrateError(
                f"Cannot write {path}: a name that ends with {path.suffix} is that of what else is written. End it with "
                ".json."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalibrateError(f"Cannot write {path}: {error.strerror or error}.") from None
