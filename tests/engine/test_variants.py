"""Everything that the engine launches was compiled before its first request: Triton's key of each launch,
over odd prompts, batches and positions, is among those of the warm-up.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from metok_kernels.launch import Launch, recorded_launches
from metok_kernels.specialisation import Key, unspecialised

from metok_vllm.worker import ops
from tests.support.harness import Case, Engine, engine
from tests.support.oracle.samples import Sample, load_sample, picture, scene_video

LIVE = {
    ("column_sum_kernel", "num_keys"),
    ("column_sum_kernel", "num_rows"),
    ("column_sum_kernel", "num_visual"),
    ("column_sum_kernel", "p_visual"),
    ("combine_lse_kernel", "size"),
    ("deep_slots_kernel", "batch"),
    ("deep_slots_kernel", "max_tokens"),
    ("gather_kernel", "num_out"),
    ("gather_kernel", "num_rows"),
    ("select_kernel", "num_events"),
    ("select_kernel", "size"),
    ("tiered_pool_kernel", "blocks"),
    ("tiered_pool_kernel", "frames"),
    ("tiered_pool_kernel", "separators"),
    ("tiered_pool_kernel", "total"),
}
"""Arguments whose values, in the cases below, Triton would have told apart."""


def words(count: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(("who", "is", "it", "and", "where")), count))


def odd_cases(sample: Sample) -> list[list[Case]]:
    """Waves of requests: alone and together, with every length of text from one word on, before the video,
    behind it and between two, several videos, images, none at all, every kind of setting a request may state.
    """
    alone = [
        [Case((scene_video(n, 3 + n),), words(n), before=words(7 - n) if n % 2 else "", max_tokens=2)]
        for n in range(1, 7)
    ]
    round_ones = {"events": 1, "strides": [7, 7, 7]}  # 15 frames of one token and a separator: 16
    return [
        *alone,
        [Case((scene_video(7, 15),), question_of(16, sample), metok=round_ones, max_tokens=2)],
        [Case((scene_video(8, 6),), words(2), metok={"frame_smoothing": 1, "quota": "video"}, max_tokens=1)],
        [Case((scene_video(8, 1),), words(1), max_tokens=1)],  # one frame, one token
        [Case((scene_video(9, 7),), words(3), metok={"decode_retention": 0.5, "strides": [1, 3, 5]}, max_tokens=3)],
        [
            Case((scene_video(10, 5), scene_video(11, 6)), words(2), between=words(3), max_tokens=2),
            Case((scene_video(12, 9),), words(5), metok={"decode_retention": 1, "keep_ratio": 0.9}, max_tokens=5),
            Case((), words(4), max_tokens=7),
            Case((scene_video(13, 4),), words(1), metok="off", max_tokens=3),
            Case((scene_video(14, 5),), words(6), images=(picture(1, 70, 50),), max_tokens=2),
        ],
        [Case((), words(n), max_tokens=5) for n in range(1, 4)]
        + [Case((scene_video(20 + n, 2 + n),), words(n), max_tokens=4) for n in range(1, 5)],
    ]


def question_of(multiple: int, sample: Sample) -> str:
    """A question that leaves a multiple of so many tokens behind the video."""
    placeholder = sample.model.config.video_token_id
    for question in (words(3) + "?" * count for count in range(multiple)):
        ids = sample.prompt_ids(question, videos=1)
        if (len(ids) - ids.index(placeholder) - 1) % multiple == 0:
            return question
    raise AssertionError("no such question")


@contextmanager
def compiled_before(running: Engine) -> Iterator[set[Key]]:
    """Collects the launches inside the context, each of which must have been warmed up."""
    warmed = running.runner.model_state.warm_up
    assert warmed is not None
    with recorded_launches() as seen:
        yield seen
    late = sorted(map(str, seen - warmed.variants))
    assert not late, "not compiled before the first request:\n" + "\n".join(late)


def kinds_of_values(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], set[str]]:
    """What Triton would have told apart, from here on, in arguments that a kernel is not specialised on."""
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    run = Launch.run

    def watched(launch: Launch) -> None:
        for name in frozenset.union(*unspecialised(launch.kernel)):
            value = launch.args[name]
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if number is not None and 0 not in launch.grid:
                kind = "one" if number == 1 else "divisible" if number % 16 == 0 else "neither"
                kinds[launch.kernel.__name__, name].add(kind)
        run(launch)

    monkeypatch.setattr(Launch, "run", watched)
    return kinds


def test_no_request_makes_a_variant(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "triton")
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=17)
    deferred, pruned_beside_others = 0, 0

    def watch(running: Engine) -> None:
        nonlocal deferred, pruned_beside_others
        requests = running.runner.model_state.pruned.by_id
        deferred += any(request.chunks for request in requests.values())
        pruned_beside_others += 0 < len(requests) < len(running.scheduler.requests)

    with (
        engine(sample, dtype="bfloat16", max_num_batched_tokens=37, max_num_seqs=6, max_model_len=1000) as running,
        compiled_before(running) as seen,
    ):
        kinds = kinds_of_values(monkeypatch)
        for wave in odd_cases(sample):
            running.run(wave, watch)
        running.check_drained()
        ready = running.runner.model_state.warm_up.variants
    assert deferred
    assert pruned_beside_others
    assert {key.kernel for key in ready} == {key.kernel for key in seen}, "the cases do not reach every kernel"
    told_apart = {argument for argument, values in kinds.items() if len(values) > 1}
    assert told_apart >= LIVE, f"the cases are not odd enough for {LIVE - told_apart}"
