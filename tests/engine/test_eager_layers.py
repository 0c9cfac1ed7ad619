"""How a pruned step runs the layers: by fused operators, without compiling anything, its MLPs in slices,
within the memory that is reserved for it on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.activation import SiluAndMul

from metok_vllm.worker.memory import PruningMemory, Widths
from metok_vllm.worker.step import PrunedStep
from tests.support.guards.launches import LiveBytes, deep_launches, tensors
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, scene_video

ON_CPU_ALONE = 2
"""Launches a layer that a GPU has not: the CPU's activation is two operators, and its attention cannot write
into a tensor that it is given.
"""

MOST = 15
"""Launches of a deep layer on a GPU: its own, those of attention, and KV writes."""

ALL_SURVIVE = {"events": 4, "key_events": 4, "keep_ratio": 1, "decode_retention": 0.5}
"""Settings with which L1 and L2 drop nothing."""

LONGEST = 493
"""Tokens of `long_prompt` and its answer."""


def pruned() -> Case:
    return Case((scene_video(1, 9),), metok={"decode_retention": 0.5}, max_tokens=4)


def long_prompt() -> Case:
    """Many times longer than a step of these tests, from L1 on too."""
    return Case((scene_video(7, 40),), metok=ALL_SURVIVE, max_tokens=6)


def run_beside_another(running: Engine, case: Case) -> None:
    """One request whose prompt is pruned in a step in which another decodes."""
    running.add(Case((), "No video here.", max_tokens=12))
    running.step()
    running.run([case])


def forwards(running: Engine) -> list[Any]:
    """What the layers' modules call as their forward."""
    stack: Any = running.runner.model.decoder_stack
    return [vars(module).get(name) for module, name, _ in stack.eager._forwards]


def compiled() -> int:
    """How often this process has compiled something."""
    return int(torch._dynamo.utils.counters["frames"]["total"])


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
def test_a_pruned_step_launches_fused_operators(tmp_path_factory: pytest.TempPathFactory, eager: bool) -> None:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=23)
    with engine(sample, enforce_eager=eager, max_num_batched_tokens=256, max_num_seqs=8) as running:
        built, before = forwards(running), compiled()
        running.run([pruned()])
        assert compiled() == before, "a pruned step has compiled something"
        assert forwards(running) == built, "outside a pruned step the layers are as vLLM has built them"
        with deep_launches() as found:
            running.run([pruned()])
            run_beside_another(running, pruned())
        running.check_drained()
        if not eager:  # without METok's forward method the activation would compile itself
            stack: Any = running.runner.model.decoder_stack
            stack.eager._forwards[:] = [each for each in stack.eager._forwards if not isinstance(each[0], SiluAndMul)]
            running.run([pruned()])
            assert compiled() > before
    assert [layers.others > 0 for layers in found] == [False] * 3 + [True] * 3
    for layers in found:
        assert layers.launches["_C::fused_add_rms_norm"] == 2
        assert layers.launches["_C::rotary_embedding"] == 1
        assert layers.launches["aten::silu"] == layers.launches["aten::mul"] == 1
        # Norms 2, projections 4, rotary embedding, activation, attention, cache update: ten. Before L2 a copy
        # of what waits for it. Of the others' rows: cache update, attention, and its way into the output.
        expected = 10 + (layers.first == 1) + 3 * (layers.others > 0)
        assert layers.total - ON_CPU_ALONE == expected <= MOST, layers


def test_an_mlp_takes_no_more_rows_than_vllm_has_measured(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample, rows, case = load_sample(tmp_path_factory.mktemp("model"), seed=11), list[int](), long_prompt()
    with engine(sample, max_num_batched_tokens=96, max_num_seqs=8) as running:
        stack: Any = running.runner.model.decoder_stack
        for layer in stack.layers:
            layer.mlp.gate_up_proj.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        in_slices = running.run([case])[0]
        assert max(rows) == 96
        assert_same(running.oracle(case), in_slices, 1e-3)
        rows.clear()
        stack.eager._forwards[:] = [each for each in stack.eager._forwards if each[1] != "forward"]
        whole = running.run([case])[0]
        assert max(rows) > 4 * 96, "the prompt never needed a slice"
        assert whole.tokens == in_slices.tokens
        for ours, theirs in zip(whole.logprobs, in_slices.logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        running.check_drained()


def test_a_step_stays_within_what_is_reserved(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts of the longest length are deferred side by side, and one ends while the other waits.

    What is alive then is what `PruningMemory` says, and an MLP's inside, which vLLM's own run of one step has
    had too. The bound is tight, but for one thing: it counts a query for each token that waits.
    """
    sample, alive, run = load_sample(tmp_path_factory.mktemp("model"), seed=11), LiveBytes(), PrunedStep.run
    attend, waiting = PrunedStep.attend, 0
    # Twice the same: the encoder's cache has room for one video of this length.
    cases, batched = [long_prompt()] * 2, 16

    def measured(step: PrunedStep, *args: Any) -> torch.Tensor:
        with alive:
            return run(step, *args)

    def watched(step: PrunedStep, *args: Any) -> torch.Tensor:
        nonlocal waiting
        out = attend(step, *args)
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors(step._writes._waiting)}
        waiting = max(waiting, sum(held.values()))
        return out

    monkeypatch.setattr(PrunedStep, "run", measured)
    monkeypatch.setattr(PrunedStep, "attend", watched)
    options = {"max_num_batched_tokens": batched, "max_num_seqs": 8, "long_prefill_token_threshold": batched // 2}
    with engine(sample, max_model_len=LONGEST, **options) as running:
        config = running.runner.vllm_config
        answers = running.run(cases)
        running.check_drained()
    assert [len(answer.prompt_ids) for answer in answers] == [LONGEST - cases[0].max_tokens] * 2
    (_, visual), *_ = Counter(answers[0].prompt_ids).most_common(1)
    # Keys and values of all rows; L1 = 1, L2 = 3: two layers wait. Views of them would keep the queries too.
    assert 0 < waiting <= (LONGEST + batched) * 2 * Widths.of(config).kv
    inside = batched * 3 * config.model_config.hf_text_config.intermediate_size * 4
    bound = PruningMemory.of(config).total + inside - visual * Widths.of(config).query
    assert 0.9 * bound < alive.peak <= bound
