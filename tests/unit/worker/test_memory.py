"""What is reserved for pruned steps beside the KV cache: bounds by hand, and the reserve's life."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metok_vllm.contract.budgets import bytes_per_token, deferral_limit, released_layers
from metok_vllm.contract.server_choices import ServerChoices, attach_choices
from metok_vllm.contract.settings import MetokSettings
from metok_vllm.worker import encoded_state, model_state
from metok_vllm.worker.memory import KEYS_PER_SPLIT, MemoryReserve, PruningMemory, Widths
from metok_vllm.worker.model_state import MetokModelState
from tests.support.fakes import kv_cache_config

Make = Callable[..., Any]


def qwen2_7b(batched: int, ranks: int = 1, most_bytes: int | None = None, window: tuple[int, int] | None = None) -> Any:
    """As much of vLLM's configuration for LLaVA-OneVision-7B as matters here; 32,768 tokens in bfloat16."""
    text = SimpleNamespace(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, num_hidden_layers=28
    )
    whole = SimpleNamespace(text_config=text)
    settings = MetokSettings(max_deferred_bytes=most_bytes, kv_layers=window)
    attach_choices(whole, ServerChoices(settings, (3, 10, 19), "none", None, batched, batched))
    model = SimpleNamespace(
        hf_config=whole, hf_text_config=text, dtype=torch.bfloat16, max_model_len=32768, get_head_size=lambda: 128
    )
    return SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=batched),
    )


@pytest.mark.parametrize(
    ("batched", "gib"),
    [(2048, "2.39"), (8192, "2.73"), (16384, "3.19")],
)
def test_what_a_7b_model_needs(batched: int, gib: str) -> None:
    """Under 3.5 GiB. Bytes of one token: a hidden state 7168, queries as many, keys and values 2048."""
    found = PruningMemory.of(qwen2_7b(batched))
    rows, deferred = 32768 + batched, 2 * 7168 + 7168 + 1024
    waits, batch = 32768 * deferred, batched * (3 * 7168 + 2048)  # another prompt of this length waits meanwhile
    held = waits + rows * 7 * 2048  # layers 3 to 9
    partial_sums = 28 * 4 * rows * (1 + rows // 1024)
    assert found.joining == waits + 32768 * (deferred + 7168) + batch
    assert found.gathering == waits + 32768 * deferred + rows * 2 * 7168 + batch
    assert found.attention == held + rows * (5 * 7168 + 2048) + batched * 7168
    assert found.mlp == held + rows * (5 * 7168 + 2048) + batched * 7168
    assert found.scoring == held + rows * (4 * 7168 + 2048) + partial_sums
    assert found.total == found.attention < 3.5 * 2**30
    assert f"{found.total / 2**30:.2f}" == gib


def test_ranks_share_heads_and_not_hidden_states() -> None:
    one, four = (Widths.of(qwen2_7b(2048, ranks)) for ranks in (1, 4))
    assert (four.hidden, four.query, four.kv, four.heads) == (one.hidden, one.query / 4, one.kv / 4, one.heads / 4)
    assert Widths.of(qwen2_7b(2048, ranks=7)).kv == one.kv / 4, "fewer KV heads than ranks: each has one"
    assert PruningMemory.of(qwen2_7b(2048, 4)).total < 0.75 * PruningMemory.of(qwen2_7b(2048)).total


def test_a_smaller_buffer_lowers_it() -> None:
    """Down to prompts of one step, of which none is deferred."""
    totals = [PruningMemory.of(qwen2_7b(2048, most_bytes=most)).total for most in (None, 10**9, 10**8, 0)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == 2048 * 7 * 2048 + 2048 * (5 * 7168 + 2048) + 2048 * 7168


def test_the_worst_step_may_be_one_in_which_nothing_ends() -> None:
    """Where the others' room is much larger than a prompt."""
    found = PruningMemory.of(qwen2_7b(2048, most_bytes=10**11))
    tokens = 10**11 // 22528
    assert found.joining == (tokens - 32768) * 22528 + 32768 * (22528 + 7168) + 2048 * (3 * 7168 + 2048)
    assert found.total > 10**11 - 22528


def test_settings_lower_it(make_config: Make) -> None:
    def of(**options: Any) -> PruningMemory:
        return PruningMemory.of(make_config(max_num_batched_tokens=256, max_num_seqs=8, **options))

    whole = of(max_model_len=4096)
    assert of(max_model_len=1024).total < whole.total / 3
    assert of(max_model_len=4096, additional_config={"metok": {"max_deferred_bytes": 10**6}}).total < whole.total / 2


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_window_keeps_text_of_released_layers_and_waits_for_nothing(ranks: int) -> None:
    """Two of three layers below L1 keep a deferred prompt's text: keys and values, 2048 bytes a token."""
    plain, windowed = qwen2_7b(2048, ranks), qwen2_7b(2048, ranks, window=(2, 24))
    assert released_layers(plain.model_config) == 0
    assert released_layers(windowed.model_config) == 2
    more = bytes_per_token(windowed.model_config) - bytes_per_token(plain.model_config)
    assert more == 2 * 2048
    assert Widths.of(windowed).deferred == Widths.of(plain).deferred + more // ranks
    assert deferral_limit(windowed.model_config) == 2 * 32768 * bytes_per_token(windowed.model_config)
    found, width = PruningMemory.of(windowed), Widths.of(windowed)
    rows, batch = 32768 + 2048, 2048 * (2 * width.hidden + width.query + width.kv)
    assert found.joining == 2 * 32768 * width.deferred + 32768 * max(width.hidden, width.query) + batch
    assert (
        found.mlp == 32768 * width.deferred + rows * (4 * width.hidden + width.query + width.kv) + 2048 * width.hidden
    )
    # Within the window there is nothing to keep for later.
    whole = qwen2_7b(2048, ranks, window=(0, 28))
    assert Widths.of(whole) == Widths.of(plain)
    assert PruningMemory.of(whole).total < PruningMemory.of(plain).total


@pytest.mark.parametrize("ranks", [1, 4])
def test_dials_need_no_more(ranks: int) -> None:
    """Smoothing holds a token's score, the smooth one and its frame; its partial sums took more."""
    width = Widths.of(qwen2_7b(2048, ranks))
    assert width.heads >= 4 + 4 + 8
    found = PruningMemory.of(qwen2_7b(2048, ranks))
    rows = 32768 + 2048  # L3 scores at most what L2 does, while no layer's keys and values wait
    partial_sums = width.heads * rows * (1 + -(-rows // KEYS_PER_SPLIT))
    assert rows * (3 * width.hidden + 2 * width.query + width.kv) + partial_sums <= found.total


def test_partial_sums_are_the_kernels_own() -> None:
    from metok_kernels.text_to_visual_scores import launch

    assert launch.KEYS_PER_SPLIT == KEYS_PER_SPLIT


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float, float], torch.device]:
    """`card(free, total, taken)`: a device of so many GiB, of which torch has taken some."""

    def made(free: float, total: float, taken: float) -> torch.device:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), int(total * 2**30)))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: int(taken * 2**30))
        return torch.device("meta")

    return made


Card = Callable[[float, float, float], torch.device]


def test_the_reserve_is_held_until_the_kv_cache_exists(make_config: Make, card: Card) -> None:
    config = make_config()
    reserve = MemoryReserve(config, card(20, 24, 4))
    reserve.hold()
    held = reserve._ballast
    assert held is not None
    assert held.nbytes == PruningMemory.of(config).total
    reserve.hold()
    assert reserve._ballast is held, "every dummy run of the profile calls it"
    reserve.release()
    reserve.hold()
    assert reserve._ballast is None, "a dummy run of an idle rank must not allocate"


def helps(config: Any) -> str:
    return (
        f"lower --max-model-len (now 4096) or the setting max_deferred_bytes (now "
        f"{deferral_limit(config.model_config)}), or share the model out by --tensor-parallel-size."
    )


def test_too_full_a_card_gets_one_sentence(make_config: Make, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    reserve = MemoryReserve(config, card(0.75, 24, 4))

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(torch, "empty", no_room)
    needed = f"{PruningMemory.of(config).total / 2**30:.2f}"
    with pytest.raises(RuntimeError) as error:
        reserve.hold()
    assert str(error.value) == (
        f"METok needs {needed} GiB for pruned prompts beside the model, and meta has 0.75 GiB free: {helps(config)}"
    )
    assert error.value.__suppress_context__


def test_too_small_a_share_gets_one_sentence(make_config: Make, card: Card) -> None:
    config = make_config(gpu_memory_utilization=0.5)
    config.cache_config.kv_cache_memory_bytes = None  # which the CPU's platform sets
    needed = PruningMemory.of(config).total / 2**30
    left = needed - 0.01
    reserve = MemoryReserve(config, card(24, 24, 12 - left))
    with pytest.raises(RuntimeError) as error:
        reserve.hold()
    assert str(error.value) == (
        f"METok needs {needed:.2f} GiB for pruned prompts beside the model, and of the share of meta that "
        f"--gpu-memory-utilization allows (now 0.5) {left:.2f} GiB are left: {helps(config)}"
    )
    assert reserve._ballast is None
    MemoryReserve(config, card(24, 24, 12 - needed - 0.01)).hold()
    # With a KV cache of a stated size the share does not count.
    config.cache_config.kv_cache_memory_bytes = 2**20
    MemoryReserve(config, card(24, 24, 20)).hold()


def test_nothing_is_reserved_on_cpu(make_config: Make) -> None:
    reserve = MemoryReserve(make_config(), torch.device("cpu"))
    reserve.hold()
    assert reserve._ballast is None
    assert reserve.needed == 0


def test_the_model_state_holds_and_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hooks that vLLM's runner calls in its profiling run and
    behind the allocation of the KV cache.
    """
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    monkeypatch.setattr(DefaultModelState, "dummy_inputs_embeds", lambda self, n: torch.zeros(n))
    monkeypatch.setattr(DefaultModelState, "initialize_kv_cache", lambda self, *_: None)
    calls: list[str] = []
    state = object.__new__(MetokModelState)
    reserve: Any = SimpleNamespace(hold=lambda: calls.append("hold"), release=lambda: calls.append("release"))
    object.__setattr__(state, "_reserve", reserve)
    assert state.dummy_inputs_embeds(3).shape == (3,)
    slots: Any = SimpleNamespace(bind=lambda *_: calls.append("bind"))
    for name, value in (("deep_slots", slots), ("warm_up", None), ("model", None), ("device", None)):
        object.__setattr__(state, name, value)
    monkeypatch.setattr(model_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(model_state.ModelShapes, "of", lambda model: model)
    monkeypatch.setattr(encoded_state, "warm_up", lambda *_: calls.append("warm up") or "ready")
    said: list[str] = []
    monkeypatch.setattr(model_state.logger, "info", lambda line, *values: said.append(line % values))
    nothing: Any = None
    for _ in range(2):  # vLLM comes twice where it measures the memory of CUDA graphs
        state.initialize_kv_cache(kv_cache_config(10), nothing)
    assert calls == ["hold", "bind", "release", "warm up", "bind", "release"]
    assert said == [
        "METok: 3 KV cache groups (1 layers for every token, blocks of 4 tokens; 1 layers for text and retained, "
        "blocks of 4 tokens; 1 layers for text, blocks of 4 tokens), 0.0 % padding"
    ]
