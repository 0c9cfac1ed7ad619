"""The decoder against files made to break it: the known attacks, and cases drawn from fixed seeds.

The long form is ``make fuzz MINUTES=30``; a finding's line goes into `ATTACKS` once it is mended.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from metok_vllm.media.settings import VideoSettings
from tests.support.media_fuzz.bases import BASES, NAMES, base_data, base_file
from tests.support.media_fuzz.cases import MAX_BYTES, Case, Step, draw, parse, shrunk
from tests.support.media_fuzz.judge import MOST_MIB, SETTINGS, fault, verdict
from tests.support.media_fuzz.operations import OPERATIONS
from tests.support.media_fuzz.runner import Outcome, Runner

DRAWN = 100
QUICK = replace(SETTINGS, timeout_s=1.0)

# Lines of `make fuzz CASE=...`, with a word of the sentence that refuses it; "" where it has frames; None
# where it depends on how fast the machine is.
ATTACKS: dict[str, tuple[str, str | None]] = {
    # One call of libav that goes on for minutes.
    "mkv tags, 66 KB": ("mkv: mkv.tags(1000,0)", "timeout_s"),
    "mkv tags, 330 KB": ("mkv: mkv.tags(5000,0)", "timeout_s"),
    "flv names": ("flv-h264: flv.keys(20000)", "timeout_s"),
    # Counts without a table behind them.
    "uuid first": ("mp4: mp4.samples(60000000) mp4.first(0) mp4.index_first()", "claims far more frames"),
    "uuid first, 4 tracks": ("mp4: mp4.samples(60000000) mp4.tracks(4) mp4.first(0)", "claims far more frames"),
    "index in free": ("mp4: mp4.samples(60000000) mp4.index_in(0,0)", "claims far more frames"),
    "index in hoov": ("mp4: mp4.samples(60000000) mp4.index_in(1,0)", "claims far more frames"),
    "copy of the index in free": ("mp4: mp4.index_in(0,2) mp4.samples(60000000)", ""),
    "decoy handler": ("mp4: mp4.decoy(0) mp4.samples(60000000)", "claims far more frames"),
    "edits": ("mp4: mp4.edits(30000)", None),
    "fragments": ("mp4-fragments: mp4.fragments(2000,80000000,3)", "claims far more frames"),
    "sample groups, 5 KB": ("mp4-hevc: mp4.sgpd(906155947,167,67108864)", "memory"),
    # Streams for which the decoder loads more of itself.
    "subtitles beside": ("mkv: mkv.other_track(0)", ""),
    "data beside": ("mkv: mkv.other_track(7)", ""),
    "private streams": ("ps: ps.small(748) ps.streams(953,133)", "codec"),
    "a stream that comes up later": ("flv: splice(1,17,3)", "holds no frames"),
    # Good videos that are large.
    "black": ("mp4: black(4096,4096,32)", "max_output_mib"),
    "gif canvas": ("gif: gif.canvas(16000,2200) gif.frames(5000,2)", "max_output_mib"),
    "slow gif": ("gif: gif.canvas(1500,1000) gif.frames(40000,2)", "timeout_s"),
}


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as pool:
        yield pool


@pytest.mark.parametrize("name", ATTACKS)
def test_known_attacks_end_in_time_in_little_memory_with_one_sentence(name: str, runner: Runner) -> None:
    line, words = ATTACKS[name]
    outcome, wrong = verdict(parse(line), lambda data: runner.run_one(data, QUICK), QUICK)
    assert wrong is None, f"{wrong}: make fuzz CASE='{line}'"
    if words is not None:
        assert words in outcome.said
        assert outcome.kind == ("refused" if words else "frames")


def test_drawn_cases_end_in_time_in_little_memory_with_frames_or_one_sentence(runner: Runner) -> None:
    kinds: list[str] = []
    findings = []
    for seed in range(DRAWN):
        case = draw(seed)
        outcome, wrong = verdict(case, lambda data: runner.run_one(data, QUICK), QUICK)
        kinds.append(outcome.kind)
        if wrong is not None:
            findings.append(f"{wrong}\n  make fuzz CASE='{case}'")
    assert not findings, "\n".join(findings)
    assert min(kinds.count("frames"), kinds.count("refused")) > DRAWN // 5


@pytest.mark.parametrize("name", NAMES)
def test_base_files_are_good_and_come_through_their_grammar_unchanged(name: str, runner: Runner) -> None:
    assert base_file(name).data() == base_data(name)
    outcome = runner.run_one(base_data(name), SETTINGS)
    assert fault(outcome) is None
    assert outcome.said.startswith("8x48x64x3 uint8 of 12" if name != "mp4-sound" else "The file has no video stream")


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_changes_a_file_and_does_so_the_same_way_each_time(name: str) -> None:
    operation, dice = OPERATIONS[name], random.Random(name)
    bases = [base for base in NAMES if not operation.families or BASES[base].family in operation.families]
    assert bases
    for base in bases * 4:
        args = tuple(domain.draw(dice) for domain in operation.domains)
        case = Case(base, (Step(name, args),))
        data = case.data()
        if data != base_data(base):
            assert data == case.data()
            assert len(data) <= MAX_BYTES
            return
    pytest.fail("it never changes a file")


def test_a_case_is_its_line() -> None:
    cases = [draw(seed) for seed in range(500)]
    assert [parse(str(case)) for case in cases] == cases
    assert {step.name for case in cases for step in case.steps} > {
        "repeat",
        "claim",
        "nest",
        "splice",
        "cut",
        "mkv.tags",
    }
    for wrong in ("", "mp5: drop(1)", "mp4: dorp(1)", "mp4: drop(1,2)", "mp4: drop(1) and more"):
        with pytest.raises(ValueError, match=r"unknown|takes|cannot read"):
            parse(wrong)


def test_shrinking_leaves_the_operation_at_fault_and_the_smallest_number_that_it_needs() -> None:
    def fails(case: Case) -> bool:
        return any(step.name == "mkv.tags" and step.args[0] >= 700 for step in case.steps)

    case = parse("mkv: flip(3,4,5) mkv.void(9000) mkv.tags(5000,2) drop(17) cut(990)")
    small = shrunk(case, fails)
    assert [step.name for step in small.steps] == ["mkv.tags"]
    assert 700 <= small.steps[0].args[0] < 1000
    assert small.steps[0].args[1] == 0


GOOD = Outcome("frames", "8x48x64x3 uint8 of 12, [...]", 0.1, 50)


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (GOOD, None),
        (replace(GOOD, kind="refused", said="The video is empty (0 bytes)."), None),
        (replace(GOOD, seconds=SETTINGS.timeout_s + 1.1), "slow"),
        (replace(GOOD, peak_mib=MOST_MIB + 1), "memory"),
        (replace(GOOD, kind="broken", said="IndexError: 3"), "broken"),
        (replace(GOOD, kind="refused", said="One. Two."), "not one sentence"),
        (replace(GOOD, kind="refused", said="Two\nlines."), "not one sentence"),
        (replace(GOOD, kind="refused", said="It failed with Errno 22."), "libav's wording"),
        (replace(GOOD, kind="refused", said=f"{'A long ' * 50}one."), "too long"),
    ],
)
def test_the_judge_finds_each_kind_of_fault(outcome: Outcome, wrong: str | None) -> None:
    found = fault(outcome)
    assert found is None if wrong is None else found is not None and wrong in found


def test_the_judge_finds_an_outcome_that_differs_but_not_where_the_time_limit_struck() -> None:
    def judged(second: Outcome) -> str | None:
        answers = iter((GOOD, second))
        return verdict(parse("mp4:"), lambda data: next(answers))[1]

    assert judged(GOOD) is None
    assert "differs" in str(judged(replace(GOOD, said="other")))
    assert judged(replace(GOOD, said="late", seconds=SETTINGS.timeout_s)) is None


def test_the_judge_takes_a_case_for_slow_that_is_slow_each_time() -> None:
    slow = replace(GOOD, seconds=SETTINGS.timeout_s + 2)
    for outcomes, wrong in (
        ((slow, slow, slow), "slow"),
        ((slow, slow, GOOD, GOOD), "None"),
        ((GOOD, slow, GOOD), "None"),
        ((GOOD, slow, slow, slow), "slow"),
    ):
        answers = iter(outcomes)
        assert str(verdict(parse("mp4:"), lambda data, answers=answers: next(answers))[1]).startswith(wrong)


def test_memory_of_a_child_is_seen(runner: Runner) -> None:
    settings = VideoSettings(num_frames=16, timeout_s=20, threads=1)
    outcome = runner.run_one(parse("mp4: black(1024,2048,16)").data(), settings)
    assert outcome.kind == "frames", outcome.said
    assert 16 * 1024 * 2048 * 3 / 2**20 < outcome.peak_mib < MOST_MIB
