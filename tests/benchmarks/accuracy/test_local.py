"""The local runner of the accuracy benchmark against the oracle, and what each baseline keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.baselines.evs import EfficientVideoSampling
from benchmarks.accuracy.baselines.fastv import AttentionPruning
from benchmarks.accuracy.baselines.frames import FewerFrames
from benchmarks.accuracy.baselines.pooling import UniformPooling
from benchmarks.accuracy.baselines.random_tokens import RandomTokens
from benchmarks.accuracy.baselines.vidcom2 import VidCom2, allot, redundancy
from benchmarks.accuracy.data import Item, UsageError
from benchmarks.accuracy.local import LocalRunner
from benchmarks.accuracy.method import Dense, DropFrom, PaperBudget
from benchmarks.accuracy.methods import CALIBRATED, PAPER, STOCK, Method, chosen, methods
from benchmarks.accuracy.metok import Stage1, Stages23
from benchmarks.accuracy.run import run_local
from benchmarks.accuracy.video import Checkpoint, Video
from metok_vllm.contract.profile import NAME, write_profile
from metok_vllm.contract.settings import parse_settings
from metok_vllm.demo.checkpoint import build_checkpoint
from metok_vllm.frontend.fingerprint import fingerprint
from tests.support.oracle import OracleSettings, run
from tests.support.oracle.samples import scene_video
from tests.support.profiles import a_profile

STEPS = 10
FRAMES = 18
QUESTIONS = (
    "Who leaves the stage first?",
    "What happens after the band has left, and who is there at the end of it all?",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = build_checkpoint(tmp_path_factory.mktemp("tiny"), seed=5, layers=8, aligner="siglip")
    return Checkpoint(folder)


@pytest.fixture(scope="module")
def video(checkpoint: Checkpoint) -> Video:
    return checkpoint.encode("a.mp4", scene_video(3, FRAMES))


@pytest.fixture
def answer(checkpoint: Checkpoint, video: Video) -> Callable[..., Any]:
    """`answer(reducer, policy, question)`: outcome and trace; ten tokens whatever they are."""
    runner = LocalRunner(checkpoint, max_tokens=STEPS, stop=frozenset())
    runner.watch(video)

    def give(reducer: Any, policy: Any, question: str = QUESTIONS[0]) -> Any:
        return runner.answer(reducer, policy, checkpoint.ask(item(question)))

    return give


def item(question: str) -> Item:
    return Item(0, Path("a.mp4"), question, (), "yes", "exists")


def test_the_prompt_is_the_processors(checkpoint: Checkpoint) -> None:
    asked = checkpoint.ask(Item(0, Path("a.mp4"), "Which?", ("red", "blue"), "A", "letter"))
    text = checkpoint.tokenizer.decode([*asked.header, *asked.suffix])
    assert "Which?\nA. red\nB. blue\nAnswer with the letter." in text
    assert text.endswith("assistant\n")
    assert checkpoint.tokenizer.decode(asked.query) == "Which? A. red B. blue Answer with the letter."


SETTINGS: list[dict[str, Any]] = [
    {},
    {"decode_retention": 0.5},
    {"preset": "balanced", "aligner": "none"},
    {"decode_retention": 1.0, "aligner": "embedding", "events": 3, "key_events": 1, "keep_ratio": 0.55},
    {"prune_layers": [2, 3, 8], "key_frames": 2, "strides": [2, 2, 4], "decode_retention": 0.3},
    {"token_budget": 90},
    {"quota": "video", "score_rows": "question", "decode_retention": 0.4},
    {"quota": "video", "frame_smoothing": 0.6, "decode_retention": 0.4},
    {"final_keep": 0.3, "decode_retention": 0.5, "prune_layers": [2, 4, 5]},
    {"kv_layers": [1, 4], "prune_layers": [2, 3, 6], "quota": "video", "events": 1, "key_events": 1},
    {"kv_layers": [4, 8], "prune_layers": [2, 3, 6], "strides": [4, 4, 4], "keep_ratio": 0.5},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_metok_is_the_oracles(checkpoint, video, answer, settings: dict[str, Any], question: str) -> None:
    """Same tokens, same survivors at every layer, same keys and values while decoding."""
    parsed = parse_settings(settings)
    stage1 = Stage1(checkpoint, parsed)
    outcome, trace = answer(stage1, Stages23(parsed), question)

    asked = checkpoint.ask(item(question))
    values = {k: getattr(parsed, k) for k in OracleSettings.__dataclass_fields__ if hasattr(parsed, k)}
    oracle = OracleSettings(**values | {"aligner": stage1.aligner})
    pixels = checkpoint.processor.video_processor([video.frames], return_tensors="pt")["pixel_values_videos"][0]
    placeholder = checkpoint.model.config.video_token_id
    prompt = [*asked.header, placeholder, *asked.suffix]
    towers = (checkpoint.tower.model, [checkpoint.aligner.pixels(video.frames)], asked.windows)
    behind, words = len(asked.header) + 1, len(checkpoint.tokenizer(question, add_special_tokens=False).input_ids)
    at = next(i for i in range(behind, len(prompt)) if checkpoint.tokenizer.decode(prompt[i:]).startswith(question))
    expected = run(
        checkpoint.model,
        prompt,
        [pixels],
        None,
        list(asked.query),
        oracle,
        STEPS,
        aligner=towers,
        question_at=range(at, at + words),
    )

    assert list(outcome.tokens) == expected.tokens
    (theirs,) = expected.videos
    first, second, third = expected.prune_layers
    start = theirs.span[0]
    visual = range(*theirs.span)
    held = [Stages23(parsed).held(layer, trace, 8) for layer in range(8)]
    assert [[start + i for i in layer.tolist()] for layer in held] == [
        [p for p in layer if p in visual] for layer in expected.kv_positions
    ]
    assert outcome.entering == theirs.span[1] - start
    assert [start + i for i in trace.alive[first].tolist()] == theirs.after_l1
    assert [start + i for i in trace.alive[second].tolist()] == theirs.after_l2
    for alive in trace.alive[third:]:
        assert [start + i for i in alive.tolist()] == theirs.after_l3
    assert (outcome.after_l1, outcome.after_l2) == (len(theirs.after_l1), len(theirs.after_l2))
    assert outcome.retained == max(len(layer) for layer in held[first:])
    decoder = checkpoint.decoder
    assert outcome.kv_bytes == sum(expected.kv_tokens) * 2 * decoder.kv_heads * decoder.head_dim * 4
    assert 0 < len(theirs.after_l2) < len(theirs.after_l1) < outcome.entering


@pytest.mark.parametrize("question", QUESTIONS)
def test_stock_is_the_plain_model(checkpoint, video, answer, question: str) -> None:
    outcome, trace = answer(UniformPooling(), Dense(), question)
    asked = checkpoint.ask(item(question))
    pixels = checkpoint.processor.video_processor([video.frames], return_tensors="pt")["pixel_values_videos"]
    tokens = len(asked.header), FRAMES * 16 + 1, len(asked.suffix)
    ids = [*asked.header, *[checkpoint.model.config.video_token_id] * tokens[1], *asked.suffix]
    out = checkpoint.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        pixel_values_videos=pixels,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
    )
    assert list(outcome.tokens) == out[0, len(ids) :].tolist()
    assert outcome.entering == outcome.per_layer == tokens[1]
    assert outcome.kv_bytes == sum(tokens) * 8 * 2 * checkpoint.decoder.kv_heads * checkpoint.decoder.head_dim * 4
    assert len(trace.alive) == 8


def test_sharing_changes_no_answer(checkpoint, video) -> None:
    """Every method, asked after all others, answers as it does alone."""
    runner = LocalRunner(checkpoint, max_tokens=4, stop=frozenset())
    asked = checkpoint.ask(item(QUESTIONS[1]))
    known = [m for m in methods(checkpoint) if m.family != "probe"]
    runner.watch(video)
    together = {m.name: runner.answer(m.reducer, m.policy, asked)[0].tokens for m in known}
    for method in known[::5]:
        runner.watch(video)
        assert runner.answer(method.reducer, method.policy, asked)[0].tokens == together[method.name], method.name
    assert len(set(together.values())) > 5  # the methods do differ


def test_a_guess_at_the_answer_changes_nothing(checkpoint, video) -> None:
    """Right, right up to some token, wrong, too long: the tokens are those of plain greedy decoding."""
    runner = LocalRunner(checkpoint, max_tokens=STEPS, stop=frozenset())
    runner.watch(video)
    asked = replace(checkpoint.ask(item(QUESTIONS[0])), draft=())
    settings = parse_settings({"decode_retention": 0.5})
    method = (Stage1(checkpoint, settings), Stages23(settings))
    plain = runner.answer(*method, asked)[0].tokens
    assert len(plain) == STEPS
    guesses = [
        plain,
        plain[:1],
        plain[:4],
        (*plain, 7, 7),
        (*plain[:3], plain[3] + 1, *plain[4:]),
        (plain[0] + 1, *plain[1:]),
    ]
    for guess in guesses:
        assert runner.answer(*method, replace(asked, draft=guess))[0].tokens == plain, guess
    ending = LocalRunner(checkpoint, max_tokens=STEPS, stop=frozenset({plain[4]}))
    ending.watch(video)
    for guess in [(), *guesses]:
        tokens = ending.answer(*method, replace(asked, draft=guess))[0].tokens
        assert tokens == plain[: plain.index(plain[4]) + 1], guess


def test_the_probe_drops_what_it_says(checkpoint, answer) -> None:
    stock, _ = answer(UniformPooling(), Dense())
    for layer in (0, 3, 7):
        outcome, trace = answer(UniformPooling(), DropFrom(layer))
        assert [len(a) > 0 for a in trace.alive] == [i < layer for i in range(8)]
        blind, whole = answer(UniformPooling(), DropFrom(layer, True))
        assert [len(a) for a in whole.alive] == [stock.entering] * 8
        assert blind.kv_bytes == outcome.kv_bytes < stock.kv_bytes
        assert blind.tokens[0] == stock.tokens[0]  # prefill alone gives the first token
    late, _ = answer(UniformPooling(), DropFrom(8))
    assert late.tokens == stock.tokens


@pytest.mark.parametrize("point", ["entering", "average"])
def test_baselines_keep_the_stated_number(checkpoint, video, answer, point) -> None:
    budget = PaperBudget(checkpoint.grid, 8, point)
    wanted, asked = budget(FRAMES), checkpoint.ask(item(QUESTIONS[0]))
    stock = UniformPooling().enter(video, asked)
    tokens = {tuple(row) for row in stock.rows.tolist()}
    reducers = [
        RandomTokens(budget),
        EfficientVideoSampling(budget),
        EfficientVideoSampling(budget, "tokens"),
        VidCom2(budget),
    ]
    for reducer in reducers:
        kept = reducer.enter(video, asked)
        assert len(kept.rows) == len(kept.offsets) == wanted < len(stock.rows)
        # Each kept token is the stock's at its own place, and the separator is still the last one.
        assert torch.equal(kept.rows, stock.rows[kept.offsets])
        assert kept.offsets[-1] == len(stock.rows) - 1
        assert (kept.offsets.diff() > 0).all()
        compact = reducer.__class__(**{**reducer.__dict__, "positions": "compact"}).enter(video, asked)
        assert torch.equal(compact.rows, kept.rows)
        assert compact.offsets.tolist() == list(range(wanted))
    fewer = FewerFrames(budget=budget).enter(video, asked)
    assert abs(len(fewer.rows) - wanted) <= 8
    assert {tuple(row) for row in fewer.rows.tolist()} <= tokens
    outcome, trace = answer(UniformPooling(), AttentionPruning(1, budget=budget))
    mean = sum(len(a) for a in trace.alive[0 if point == "average" else 1 :]) / (8 if point == "average" else 7)
    assert mean == pytest.approx(wanted, abs=0.5)
    assert outcome.entering == len(stock.rows)


def test_paper_enters_with_its_budget(checkpoint, answer) -> None:
    settings = parse_settings(None)
    outcome, _ = answer(Stage1(checkpoint, settings), Stages23(settings))
    assert outcome.entering == PaperBudget(checkpoint.grid, 8, "entering")(FRAMES)
    # Its average depends on how long the events are; the closed form takes them as equally long.
    assert outcome.per_layer == pytest.approx(PaperBudget(checkpoint.grid, 8, "average")(FRAMES), rel=0.25)
    matched, _ = answer(Stage1(checkpoint, settings, "events"), Stages23(settings))
    assert matched.entering == pytest.approx(outcome.entering, abs=8)


def test_kv_budget_is_what_paper_holds(checkpoint, video, answer) -> None:
    """The point at which baselines hold as much as METok `paper` while decoding, to half a token a layer."""
    settings = parse_settings(None)
    _, trace = answer(Stage1(checkpoint, settings), Stages23(settings))
    held = [len(Stages23(settings).held(layer, trace, 8)) for layer in range(8)]
    budget = PaperBudget(checkpoint.grid, 8, "kv")
    assert sum(held) / 8 == pytest.approx(budget(FRAMES), abs=0.5)
    assert len(RandomTokens(budget).enter(video, checkpoint.ask(item(QUESTIONS[0]))).rows) == budget(FRAMES)


def test_fewer_frames_are_an_even_sample(video) -> None:
    assert FewerFrames(4).frames(video) == [0, 5, 11, 17]
    assert FewerFrames(64).frames(video) == list(range(FRAMES))
    assert FewerFrames(1).frames(video) == [0]


def test_evs_keeps_the_first_frame_and_what_changed(checkpoint) -> None:
    frames = scene_video(1, 1).repeat(6, axis=0)
    frames[4:, :28, :28] = 255 - frames[4:, :28, :28]  # one corner changes once
    still = checkpoint.encode("still.mp4", frames)
    each = still.pooled().shape[1]
    budget = type("Few", (), {"__call__": lambda self, _: each + 3})()
    kept = EfficientVideoSampling(budget).enter(still, checkpoint.ask(item("x"))).offsets.tolist()
    assert kept[:each] == list(range(each))
    assert kept[each] == 4 * each  # the corner, in the frame in which it changed
    assert len(kept) == each + 3


def test_vidcom2_gives_more_to_what_stands_out(checkpoint) -> None:
    frames = scene_video(1, 1).repeat(8, axis=0)
    frames[5] = scene_video(9, 1)[0]
    odd = checkpoint.encode("odd.mp4", frames)
    redundant, distinct = redundancy(odd.pooled())
    assert int(distinct.argmax()) == 5
    counts = allot(distinct, 16, 48)
    assert counts[5] == max(counts) > 6
    assert all(1 <= n <= 16 for n in counts)
    assert redundant.shape == (8, 16)


def test_fastv_keeps_the_best_of_the_last_row(answer) -> None:
    outcome, trace = answer(UniformPooling(), AttentionPruning(2, share=0.5))
    assert outcome.after_l1 == round(0.5 * (FRAMES * 16 + 1))
    assert [len(a) for a in trace.alive[:3]] == [outcome.entering, outcome.entering, outcome.after_l1]
    fewer, few = answer(UniformPooling(), AttentionPruning(2, share=0.1))
    best = trace.scores[2].argsort(descending=True)[: fewer.after_l1]
    assert sorted(trace.alive[2][best].tolist()) == few.alive[2].tolist()


def test_what_cannot_be_run_is_one_sentence(checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video")
    broken = Item(0, path, "Which?", (), "red", "what")
    with pytest.raises(UsageError, match=r"broken\.mp4: .+\.$") as error:
        run_local(checkpoint, [broken], methods(checkpoint)[:1], 8, print)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UsageError, match=r"is for LLaVA-OneVision, and .* holds a qwen2 model"):
        Checkpoint(tmp_path)


def test_a_profile_in_the_models_folder_is_one_more_method(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CALIBRATED not in {m.name for m in methods(checkpoint)}
    mark = fingerprint(checkpoint.folder)
    monkeypatch.setattr(checkpoint, "folder", tmp_path)
    write_profile(tmp_path / NAME, a_profile(mark, prune_layers=[1, 2, 4], kv_layers=[1, 3], strides=[4, 4, 4]))
    (found,) = [m for m in methods(checkpoint) if m.name == CALIBRATED]
    assert found.policy.settings.prune_layers == (1, 2, 4)  # type: ignore[attr-defined]
    assert found.policy.settings.kv_layers == (1, 3)  # type: ignore[attr-defined]
    assert found.reducer.settings.strides == (4, 4, 4)  # type: ignore[attr-defined]
    (tmp_path / NAME).write_text("{")
    with pytest.raises(UsageError, match=r"is no JSON file\.$"):
        methods(checkpoint)


def test_names_are_unique_and_unknown_ones_are_refused(checkpoint) -> None:
    known: list[Method] = methods(checkpoint)
    assert len({m.name for m in known}) == len(known)
    assert not any("," in m.name for m in known)  # --methods takes them with commas between
    assert [m.name for m in chosen(known, [PAPER])] == [STOCK, PAPER]
    with pytest.raises(UsageError, match="There is no method 'best'"):
        chosen(known, ["best"])
