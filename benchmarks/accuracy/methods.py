"""The methods and operating points of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.accuracy.baselines.evs import EfficientVideoSampling
from benchmarks.accuracy.baselines.fastv import AttentionPruning
from benchmarks.accuracy.baselines.frames import FewerFrames
from benchmarks.accuracy.baselines.pooling import UniformPooling
from benchmarks.accuracy.baselines.random_tokens import RandomTokens
from benchmarks.accuracy.baselines.vidcom2 import VidCom2
from benchmarks.accuracy.data import UsageError
from benchmarks.accuracy.method import Dense, DropFrom, PaperBudget, Point, Policy, Reducer
from benchmarks.accuracy.metok import Stage1, Stages23
from benchmarks.accuracy.video import Checkpoint
from metok_vllm.compression.selection import prune_layers
from metok_vllm.contract.profile import NAME, read_profile
from metok_vllm.contract.settings import parse_settings

Family = Literal["stock", "baseline", "METok", "ablation", "probe"]
STOCK = "stock"
PAPER, BALANCED, CALIBRATED = "metok paper", "metok balanced", "metok calibrated"
SERVED: dict[str, dict[str, Any] | Literal["off"]] = {
    STOCK: "off",
    PAPER: {"preset": "paper"},
    BALANCED: {"preset": "balanced"},
}
"""What the server run asks for: the value of `mm_processor_kwargs["metok"]`. No profile rules there."""
UNDER_PROFILE: dict[str, dict[str, Any] | Literal["off"]] = {CALIBRATED: {}}
"""What a server is asked for that has started with the profile in the model's folder."""
SHORT = (STOCK, PAPER, BALANCED, CALIBRATED, "frames = average", "random = average", "evs = average", "metok stage 1")
PAIRS = (
    (CALIBRATED, BALANCED),
    (CALIBRATED, "evs = average"),
    (CALIBRATED, "vidcom2 = average"),
    (BALANCED, "evs = average"),
    (BALANCED, "vidcom2 = average"),
    (PAPER, "evs tokens = kv"),
    (PAPER, "vidcom2 = kv"),
    (BALANCED, "quota event"),
    (BALANCED, "events off"),
    (BALANCED, "attention random"),
    (BALANCED, "layers 2-6-10"),
    (BALANCED, "key events 5"),
)
"""Methods that are also compared with each other, beside each with stock."""


@dataclass(frozen=True)
class Method:
    """One operating point."""

    name: str
    family: Family
    what: str  # in one phrase
    reducer: Reducer
    policy: Policy


def methods(checkpoint: Checkpoint) -> list[Method]:
    """Every operating point for a checkpoint, stock first; names are unique."""
    layers = len(checkpoint.decoder.layers)
    found = [Method(STOCK, "stock", "the model as it is", UniformPooling(), Dense())]
    found += _baselines(checkpoint.grid, layers)
    found += _metok(checkpoint)
    found += _ablations(checkpoint, layers)
    found += _probes(layers)
    return found


def chosen(known: list[Method], names: list[str] | None) -> list[Method]:
    """The methods of these names (None: all), stock always among them.

    Raises:
        UsageError: an unknown name.
    """
    if names is None:
        return known
    unknown = sorted(set(names) - {m.name for m in known})
    if unknown:
        raise UsageError(f"There is no method '{unknown[0]}'; there are: {', '.join(m.name for m in known)}.")
    return [m for m in known if m.name == STOCK or m.name in names]


def _baselines(grid: int, layers: int) -> list[Method]:
    found = []

    def add(name: str, what: str, reducer: Reducer, policy: Policy | None = None) -> None:
        found.append(Method(name, "baseline", what, reducer, policy or Dense()))

    for count in (32, 16, 8, 4, 2):
        add(f"frames {count}", f"at most {count} frames, evenly sampled", FewerFrames(count))
    for stride in (3, 4, 8):
        add(f"pooling {stride}", f"every frame pooled with stride {stride}", UniformPooling(stride))
    points: tuple[tuple[Point, str], ...] = (
        ("entering", "the tokens that enter with METok paper"),
        ("average", "METok paper's mean tokens per layer"),
        ("kv", "METok paper's mean KV per layer while decoding"),
    )
    for point, words in points:
        budget = PaperBudget(grid, layers, point)
        add(f"frames = {point}", f"as many frames as give {words}", FewerFrames(budget=budget))
        add(f"random = {point}", f"random tokens, {words}", RandomTokens(budget))
        add(f"evs = {point}", f"EVS in pixels, {words}", EfficientVideoSampling(budget))
        add(f"evs tokens = {point}", f"EVS by tokens' cosine, {words}", EfficientVideoSampling(budget, "tokens"))
        add(f"vidcom2 = {point}", f"VidCom2, {words}", VidCom2(budget))
        if point != "kv":  # what FastV computes before it prunes is more than that already
            then = AttentionPruning(1, budget=budget)
            add(f"fastv 1 = {point}", f"FastV after layer 1, {words}", UniformPooling(), then)
    add("fastv 2 half", "FastV as published: half after layer 2", UniformPooling(), AttentionPruning(2, share=0.5))
    average, words = PaperBudget(grid, layers, "average"), dict(points)["average"]
    add("fastv 2 = average", f"FastV after layer 2, {words}", UniformPooling(), AttentionPruning(2, budget=average))
    return found


def _metok(checkpoint: Checkpoint) -> list[Method]:
    def stages(delta: float, **more: Any) -> Stages23:
        return Stages23(parse_settings({"decode_retention": delta}), **more)

    first = Stage1(checkpoint, parse_settings(None))
    flat = Stage1(checkpoint, parse_settings({"strides": [2, 2, 2], "aligner": first.aligner}))
    found = [
        Method("metok stage 1", "METok", "events, alignment and pooling alone", first, Dense()),
        Method(
            "metok stages 1+2",
            "METok",
            "and pruning in prefill; decoding keeps what was computed",
            first,
            stages(0, release=False),
        ),
        Method(PAPER, "METok", "all stages, decode_retention 0", first, stages(0.0)),
        Method("metok retention 0.5", "METok", "all stages, decode_retention 0.5", first, stages(0.5)),
        Method(BALANCED, "METok", "the preset balanced", first, Stages23(parse_settings({"preset": "balanced"}))),
        Method("metok stages 2+3", "METok", "every frame at stride 2; decode_retention 1", flat, stages(1.0)),
    ]
    profile = checkpoint.folder / NAME
    if profile.is_file():
        try:
            own = parse_settings(read_profile(profile).settings)
        except ValueError as error:
            raise UsageError(str(error)) from None
        what = "the profile in the model's folder, as metok calibrate found it"
        found.append(Method(CALIBRATED, "METok", what, Stage1(checkpoint, own), Stages23(own)))
    return found


def _ablations(checkpoint: Checkpoint, layers: int) -> list[Method]:
    """Each changes one thing of `balanced`, so that the answers of many words stay readable."""
    found = []

    def add(name: str, what: str, first: Stage1, then: Stages23) -> None:
        found.append(Method(name, "ablation", f"balanced, {what}", first, then))

    def with_settings(**values: Any) -> tuple[Stage1, Stages23]:
        settings = parse_settings({"preset": "balanced", **values})
        # Only what stage 1 looks at, so that points which share it share its work.
        own = {k: v for k, v in values.items() if k in ("events", "key_events", "key_frames", "aligner", "strides")}
        return Stage1(checkpoint, parse_settings(own)), Stages23(settings)

    first, then = with_settings()
    add("quota event", "the best of each event survive, not of the video", *with_settings(quota="event"))
    add("events off", "one event, as many tokens", Stage1(checkpoint, first.settings, "events"), then)
    add("alignment random", "frames and events ranked at random", Stage1(checkpoint, first.settings, "alignment"), then)
    add("attention random", "stage 2 keeps random tokens", first, Stages23(then.settings, random_scores=True))
    for aligner in ("none", "embedding"):
        if first.aligner != aligner:
            add(f"aligner {aligner}", f"aligner {aligner}", *with_settings(aligner=aligner))
    for count in (1, 2, 4, 5):
        add(f"key events {count}", f"{count} key events of 5", *with_settings(key_events=count))
    for ratio in (0.4, 0.6, 0.9, 1.0):
        add(f"keep ratio {ratio:g}", f"keep_ratio {ratio:g}", *with_settings(keep_ratio=ratio))
    for choice in _other_layers(layers):
        add(f"layers {'-'.join(map(str, choice))}", "other pruning layers", *with_settings(prune_layers=list(choice)))
    return found


def _other_layers(layers: int) -> list[tuple[int, int, int]]:
    """Earlier and later pruning layers than the default's, and none of stage 3's dropping."""
    l1, l2, l3 = prune_layers(layers)
    tries = [
        (max(1, l1 // 2), max(2, l2 // 2), max(3, l3 // 2)),
        (l1, l2, layers - 1),
        (l1, l2, layers),
        (l1, l2 + 2, l3 + 2),
        (l1 + 1, l2 + 2, l3 + 2),
        (l1 + 2, l2 + 2, l3 + 2),
    ]
    fitting = {t for t in tries if 1 <= t[0] < t[1] < t[2] <= layers and t != (l1, l2, l3)}
    return sorted(fitting)


def _probes(layers: int) -> list[Method]:
    """Where the language model reads the video: no visual token from a layer on.

    From layer 0: it is blind.
    """
    found = []
    for layer in range(layers):
        what = f"no visual token from layer {layer} on"
        found.append(Method(f"drop from {layer}", "probe", what, UniformPooling(), DropFrom(layer)))
    for layer in range(0, layers, 2):
        what = f"no visual keys and values from layer {layer} on while decoding"
        found.append(Method(f"decode blind from {layer}", "probe", what, UniformPooling(), DropFrom(layer, True)))
    return found
