"""The dial `kv_layers` in the engine, against the oracle: windows of every kind, and what becomes of the
blocks of layers that hold visual tokens in prefill alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, EVERY_TOKEN, RELEASED, TEXT, group_kind
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.spans import survivors_bound
from metok_vllm.worker import ops
from metok_vllm.worker.warm_up import ModelShapes
from tests.engine.test_host_reads import ON_THE_HOST, THE_READ
from tests.engine.test_kernels_in_the_engine import count_launches
from tests.engine.test_labelled_frames import cases as labelled_cases
from tests.engine.test_qwen import cases as qwen_cases
from tests.support.families import ATOL, PREFACE, cached_tokens, check, check_in_chunks, check_preempted
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine, observed
from tests.support.labelled.family import registered
from tests.support.labelled.labels import LABELS, LEVELS
from tests.support.oracle import assert_same
from tests.support.oracle.qwen_samples import load_qwen
from tests.support.oracle.samples import Sample, load_sample, picture, scene_video

LAYERS = [3, 5, 7]  # of 8
WINDOWS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "within, from above 0 to below L3": ([1, 6], {"max_num_batched_tokens": 96}),
    "from L1, so that no shallow layer keeps any": ([3, 7], {"max_num_batched_tokens": 50}),
    "over L3, prompts in one chunk": ([2, 8], {"max_num_batched_tokens": 2048}),
    "below L1 alone": ([1, 2], {"max_num_batched_tokens": 129, "enable_prefix_caching": False}),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=5)


def cases(max_tokens: int = 16) -> list[Case]:
    """Pruned prompts beside all others; text before, between and behind videos, and two adjacent ones."""
    return [
        Case((scene_video(1, 30),), max_tokens=max_tokens),
        Case((scene_video(2, 12), scene_video(3, 21)), between="\nand then\n", max_tokens=max_tokens),
        Case((), "A question without any video, long enough for two chunks " * 4, max_tokens=max_tokens),
        Case((scene_video(4, 17),), images=(picture(1, 80, 60),), metok={"quota": "video"}, max_tokens=max_tokens),
        Case((scene_video(5, 16),), metok="off", max_tokens=max_tokens),
        Case((scene_video(6, 9), scene_video(7, 5)), before=PREFACE[:200], max_tokens=max_tokens),
        Case((scene_video(8, 14),), metok={"stages": 1}, max_tokens=max_tokens),
        Case((scene_video(9, 11),), metok={"frame_smoothing": 0.5, "score_rows": "question"}, max_tokens=max_tokens),
    ]


@pytest.fixture(scope="module", params=WINDOWS)
def running(request: pytest.FixtureRequest, sample: Sample) -> Iterator[Engine]:
    window, options = WINDOWS[request.param]
    with engine(sample, {"prune_layers": LAYERS, "kv_layers": window}, max_num_seqs=8, **options) as started:
        yield started


@pytest.fixture(scope="module")
def within(sample: Sample) -> Iterator[Engine]:
    """A pool too small for many requests at once."""
    with engine(
        sample,
        {"prune_layers": LAYERS, "kv_layers": [1, 6]},
        max_model_len=640,
        max_num_batched_tokens=128,
        max_num_seqs=8,
        num_gpu_blocks_override=88,
    ) as started:
        yield started


def kinds(running: Engine) -> list[str]:
    return [group_kind(manager.kv_cache_spec) for manager in running.managers]


def test_several_groups_a_kind(sample: Sample) -> None:
    """In a layout in which all kinds have one block size. First in this file: vLLM reads its variables anew
    only while no other engine runs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_LAYOUT", "LBHNC")
        server = {"prune_layers": LAYERS, "kv_layers": [1, 2]}
        with engine(sample, server, max_num_batched_tokens=129, max_num_seqs=8) as running:
            assert kinds(running).count(RELEASED) == 2
            assert len(kinds(running)) == 8
            check_in_chunks(running, cases(8)[:5])


# --- every window ---


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    moving: list[int] = []

    def watch(engine: Engine) -> None:
        pruned = engine.runner.model_state.pruned
        for request in pruned.by_id.values():
            assert request.result is None or not request.moving, "a complete prompt holds its text"
        moving.append(sum(len(request.moving) for request in pruned.by_id.values()))
        assert pruned.deferred_bytes <= sum(engine.scheduler.deferral.held.values())

    asked = cases()
    check(running, asked, running.run(asked, watch))
    chunked = running.core.vllm_config.scheduler_config.max_num_batched_tokens < 300
    assert (max(moving) > 0) == chunked, "text waits from one chunk to the next"
    assert max(moving) % kept_layers(running) == 0


def kept_layers(running: Engine) -> int:
    """Layers below L1 outside the window."""
    first, end = running.server.kv_layers
    return sum(not first <= layer < end for layer in range(LAYERS[0]))


def test_each_alone_equals_the_batch(running: Engine) -> None:
    asked = cases(6)[:2]
    for case in asked:
        (answer,) = running.run([case])
        assert_same(running.oracle(case), answer, ATOL)
    running.check_drained()


def test_a_window_makes_a_difference(running: Engine) -> None:
    """Else the comparison would say nothing of it."""
    case = cases()[0]
    ours = running.oracle(case)
    first, end = running.server.kv_layers
    for other in (None, (first, end - 1), (max(first - 1, 0), end), (first + 1, end)):
        if other is not None and (other[0] >= other[1] or other == (first, end) or end > LAYERS[2]):
            continue
        whole = Engine(None, running.sample, replace(running.server, kv_layers=other))
        with pytest.raises(AssertionError, match="step"):
            assert_same(ours, observed_only(whole.oracle(case)), ATOL)


def observed_only(result: Any) -> Any:
    return type(result)(result.prompt_ids, result.tokens, result.logprobs)


def test_blocks_by_group_before_and_after_completion(running: Engine) -> None:
    """Exactly, of the scheduler and of the worker; what is given back is free with the next step."""
    case = Case((scene_video(10, 40), scene_video(11, 8)), between=" then ", max_tokens=5)
    name = running.add(case)
    internal, pool = running.internal[name], running.scheduler.kv_cache_manager.block_pool
    runner, seen, free, counts, outputs = running.runner, [], [], None, {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
        counts = running.scheduler.slot_counts.get(internal, counts)
        if internal not in running.scheduler.requests:
            break
        computed = running.scheduler.requests[internal].num_computed_tokens
        held = [len(manager.req_to_blocks[internal]) for manager in running.managers]
        index = runner.req_states.req_id_to_index[internal]
        seen.append((computed, held, runner.block_tables.num_blocks.np[:, index].tolist()))
        free.append(pool.get_num_free_blocks())
        assert free[-1] + sum(held) == pool.num_gpu_blocks - 1
    assert counts is not None
    text, prompt = counts.text_tokens, counts.prompt_len
    assert prompt > 4 * text, "the videos must dominate for this to say something"
    kept = {AFTER_L1: survivors_bound(counts.spans, 1), AFTER_L2: survivors_bound(counts.spans, 2), TEXT: 0}
    complete = next(i for i, (computed, _, _) in enumerate(seen) if computed == prompt)

    def blocks(tokens: dict[str, int]) -> list[int]:
        return [-(-tokens[kind] // m.block_size) for kind, m in zip(kinds(running), running.managers, strict=True)]

    deep = {kind: text + bound for kind, bound in kept.items()}
    before = blocks({EVERY_TOKEN: prompt, RELEASED: prompt, **deep})
    assert seen[complete][1] == before
    # The worker knows already where the next block comes.
    assert seen[complete][2] == blocks({EVERY_TOKEN: prompt, RELEASED: text, **deep})
    for ahead, (computed, held, on_worker) in enumerate(seen[complete + 1 :], 1):
        assert computed == prompt + ahead
        after = {kind: slots + ahead for kind, slots in deep.items()}
        expected = blocks({EVERY_TOKEN: prompt + ahead, RELEASED: text + ahead, **after})
        assert held == on_worker == expected
    released = [
        b - a for b, a, kind in zip(before, seen[complete + 1][1], kinds(running), strict=True) if kind == RELEASED
    ]
    assert released
    assert min(released) > 0
    assert free[complete + 1] > free[complete]
    assert_same(running.oracle(case), observed(outputs[name]), ATOL)
    running.check_drained()


def test_the_report_counts_what_the_window_keeps(running: Engine) -> None:
    case = Case((scene_video(12, 20),), metok={"report": True}, max_tokens=2)
    running.run([case])
    (shown, *_) = running.runner.model_state.reports.recent()
    held = running.oracle(case).kv_tokens
    assert held is not None
    one = running.runner.model_state.reports.shape.kv_bytes(4)  # float32
    assert shown["kv_bytes"]["metok"] == sum(held) * one
    first, end = running.server.kv_layers
    assert shown["kv_layers"] == [first, min(end, LAYERS[2])]
    assert (shown["visual_tokens"]["retained"], shown["visual_tokens"]["after_l3"]) == (0, 0)


# --- one window, in a small pool ---


def test_preempted_requests_release_again(within: Engine) -> None:
    asked = cases(60)
    check_preempted(within, [*asked, *asked[:2]])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_an_aborted_request_leaves_nothing(within: Engine, steps: int) -> None:
    """Between chunks, just complete, with the release pending, and while decoding."""
    victim, neighbour = Case((scene_video(21, 26),), max_tokens=40), Case((scene_video(22, 14),), max_tokens=12)
    victim_id, neighbour_id = within.add(victim), within.add(neighbour)
    outputs: dict[str, Any] = {}
    for _ in range(steps):
        outputs |= within.step()
    within.llm.llm_engine.abort_request([victim_id])
    while within.llm.llm_engine.has_unfinished_requests():
        outputs |= within.step()
    assert victim_id not in outputs
    assert_same(within.oracle(neighbour), observed(outputs[neighbour_id]), ATOL)
    within.check_drained()


def test_preempted_between_completion_and_release(within: Engine) -> None:
    """And with its blocks already given back: it begins again, and answers as it would have."""
    case = Case((scene_video(23, 24),), max_tokens=10)
    for later in (0, 1, 4):
        name = within.add(case)
        request = within.scheduler.requests[within.internal[name]]
        while request.num_computed_tokens < request.num_prompt_tokens + later:
            within.step()
        assert request.num_computed_tokens == request.num_prompt_tokens + later
        within.scheduler.running.remove(request)
        within.scheduler._preempt_request(request, 0.0)
        outputs: dict[str, Any] = {}
        while within.llm.llm_engine.has_unfinished_requests():
            outputs |= within.step()
        assert request.num_preemptions == 1
        assert_same(within.oracle(case), observed(outputs[name]), ATOL)
        within.check_drained()


def test_released_blocks_serve_others_at_once(within: Engine) -> None:
    """Requests that come one by one while others decode: what one gives back the next one writes over."""
    asked = [Case((scene_video(30 + i, 15 + 2 * i),), max_tokens=20) for i in range(6)]
    names, outputs = [], {}
    for case in asked:
        names.append(within.add(case))
        for _ in range(4):
            outputs |= within.step()
    while within.llm.llm_engine.has_unfinished_requests():
        outputs |= within.step()
    check(within, asked, [observed(outputs[name]) for name in names])


def test_several_samples_of_one_request(within: Engine) -> None:
    case = Case((scene_video(24, 20),), max_tokens=1)
    request_id = within.add(case, n=2, temperature=1e-3)
    outputs: dict[str, Any] = {}
    while within.llm.llm_engine.has_unfinished_requests():
        outputs |= within.step()
    expected = within.oracle(case).tokens
    assert [list(c.token_ids) for c in outputs[request_id].outputs] == [expected, expected]
    within.check_drained()


def test_a_presets_own_retention_gives_way(within: Engine) -> None:
    case = Case((scene_video(27, 18),), metok={"preset": "balanced"}, max_tokens=12)
    (answer,) = within.run([case])
    assert_same(within.oracle(replace(case, metok={"quota": "video"})), answer, ATOL)


@pytest.mark.parametrize("dial", ["decode_retention", "final_keep"])
def test_a_request_cannot_state_the_other_rule(within: Engine, dial: str) -> None:
    with pytest.raises(ValueError, match=rf"'{dial}' has no place beside kv_layers, .*: leave it out\."):
        within.add(Case((scene_video(25, 8),), metok={dial: 0.5}))
    assert not within.scheduler.requests


def test_nothing_waits_for_the_device(within: Engine) -> None:
    """But for the one read of how many tokens survive."""
    case = Case((scene_video(26, 30),), max_tokens=4)
    with waits_of_metok() as found:
        within.run([case])
    assert found.pop(THE_READ) == 1
    assert set(found) <= ON_THE_HOST, found


# --- the prefix cache ---


@pytest.mark.parametrize("window", [[1, 6], [3, 7]], ids=["some shallow layers keep all", "none does"])
def test_text_before_a_video_is_shared(sample: Sample, window: list[int]) -> None:
    """Its blocks survive the release, in every group; nothing behind it is ever shared."""
    with engine(
        sample, {"prune_layers": LAYERS, "kv_layers": window}, max_num_batched_tokens=128, enable_prefix_caching=True
    ) as running:
        case = Case((scene_video(4, 30),), before=PREFACE, max_tokens=8)
        text = Case((), before=PREFACE, max_tokens=8)
        assert cached_tokens(running, case) == 0
        assert cached_tokens(running, text) >= running.prefix_unit
        # Held by both at once, and let go by the video request first, then by the other.
        long = Case((), before=PREFACE, max_tokens=30)
        asked = [case, long, Case((scene_video(4, 20),), "Where?", before=PREFACE, max_tokens=12), text]
        check(running, asked, running.run(asked))
        running.scheduler.reset_prefix_cache()
        name = running.add(case)
        while not running.scheduler.deferral.held:
            running.step()
        second = running.add(text)
        outputs: dict[str, Any] = {}
        while running.llm.llm_engine.has_unfinished_requests():
            outputs |= running.step()
        check(running, [case, text], [observed(outputs[name]), observed(outputs[second])])


# --- the kernels, other families ---


def test_forced_kernels_equal_the_oracle(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: slots and lengths of four kinds in one launch, in pruned steps too."""
    monkeypatch.setenv(ops.VARIABLE, "triton")
    launches = count_launches(monkeypatch)
    settings = {"prune_layers": LAYERS, "kv_layers": [1, 6]}
    asked = [cases(6)[1], Case((scene_video(3, 8),), max_tokens=6), Case((), "No video here.", max_tokens=8)]
    with engine(sample, settings, max_num_batched_tokens=96, max_num_seqs=8) as running:
        launches.clear()
        check(running, asked, running.run(asked))
    assert launches["deep_slots"] > 10


def test_every_layer_that_metok_writes_is_warmed_up(sample: Sample) -> None:
    """Released ones among them: their blocks may be of a size that no other group has."""
    settings = {"prune_layers": LAYERS, "kv_layers": [1, 8]}
    with engine(sample, settings, max_num_batched_tokens=96, max_num_seqs=8) as running:
        model = running.runner.model
        warmed = {layer.layer_name for layer in ModelShapes.of(model).deep_layers}
        assert warmed == set(running.runner.model_state.deep_slots.group_rows)
        assert server_choices(running.runner.model_config.hf_config).window == (1, LAYERS[2])


def test_text_inside_a_video_moves_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Frames labelled by text, in chunks that cut videos, and extra channels behind the first layers."""
    sample = load_sample(tmp_path_factory.mktemp("labelled"), seed=23)
    settings = {"prune_layers": [LEVELS, 4, 6], "kv_layers": [1, 5]}
    limits = {"max_model_len": 768, "max_num_batched_tokens": 160, "max_num_seqs": 8, "num_gpu_blocks_override": 110}
    with registered(), engine(sample, settings, **limits) as running:
        running.labels = LABELS
        check_in_chunks(running, without_retention(labelled_cases(16)))


def test_rotary_positions_of_three_axes(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = load_qwen(tmp_path_factory.mktemp("qwen"), "qwen2.5-vl", seed=41)
    settings = {"prune_layers": [2, 4, 6], "kv_layers": [1, 5]}
    with engine(sample, settings, max_num_batched_tokens=96, max_num_seqs=8) as running:
        check_in_chunks(running, without_retention(qwen_cases(10))[:8])


def without_retention(asked: list[Case]) -> list[Case]:
    rule = ("decode_retention", "final_keep")
    return [
        replace(case, metok={k: v for k, v in case.metok.items() if k not in rule})
        if isinstance(case.metok, dict)
        else case
        for case in asked
    ]
