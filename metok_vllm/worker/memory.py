"""Memory of a pruned step that vLLM's profiling run does not see.

vLLM sizes the KV cache by a dummy run of `max_num_batched_tokens` tokens through the stock model. A pruned
step needs more: what deferred prompts hold, and deep layers that run on whole prompts, where stock vLLM would
run on a chunk. All of it is allocated while vLLM measures and given back before the first request.

L3 scores too where `final_keep` lets tokens pass it. It needs less than L2: nothing waits any more, and fewer
rows are left. Smoothing takes two float32 and an index a token, when the partial sums of its scores have been
freed.

What an MLP allocates inside is not counted: it takes no more rows at once than the dummy run gave it
(`eager_layers.py: in_slices`).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch
from vllm.utils.mem_utils import format_gib

from metok_vllm.contract.budgets import bytes_per_token, deferral_limit, ending_limit, released_layers
from metok_vllm.contract.server_choices import pruning_layers, server_choices
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metok_logger(__name__)

KEYS_PER_SPLIT = 1024
"""Scoring keeps a partial sum for each head, scoring token and so many keys; as in
`metok_kernels/text_to_visual_scores/launch.py`.
"""


@dataclass(frozen=True)
class Widths:
    """Bytes of one token's tensors on one tensor-parallel rank."""

    hidden: int
    query: int
    kv: int  # of one layer, keys and values
    heads: int  # 4 for each query head: a float32 a head
    released: int = 0  # layers below L1 that keep the KV of text alone: keys and values of all text wait

    @property
    def deferred(self) -> int:
        """Hidden state, residual, query and key at L1; keys and values of the released layers."""
        return 2 * self.hidden + self.query + self.kv // 2 + self.released * self.kv

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Widths:
        """By the sizes of the model."""
        model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
        text, head_dim, dtype = model.hf_text_config, model.get_head_size(), model.dtype
        assert isinstance(dtype, torch.dtype)
        heads, kv_heads = text.num_attention_heads // ranks, max(1, text.num_key_value_heads // ranks)
        return cls(
            text.hidden_size * dtype.itemsize,
            heads * head_dim * dtype.itemsize,
            2 * kv_heads * head_dim * dtype.itemsize,
            4 * heads,
            released_layers(model),
        )


@dataclass(frozen=True)
class PruningMemory:
    """Upper bounds in bytes on one worker, at each of the moments of a pruned step that need most."""

    joining: int  # at L1: pieces of the prompts that end, and one tensor of them in one piece
    gathering: int  # at L1: scores, then the rows that go on
    attention: int  # in a layer from L1 up, at the end of its attention
    mlp: int  # there, at the end of its MLP, with L2's queries and keys captured
    scoring: int  # at L2

    @property
    def total(self) -> int:
        """What is reserved."""
        total: int = max(astuple(self))
        return total

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> PruningMemory:
        """By the sizes of the model and the scheduler."""
        model = vllm_config.model_config
        first, second, _ = pruning_layers(model.hf_config)
        deferred = deferral_limit(model) // bytes_per_token(model)
        batched = int(vllm_config.scheduler_config.max_num_batched_tokens)
        # Rule 4 of `scheduler/chunking.py`.
        ending = min(deferred, max(ending_limit(vllm_config), int(model.max_model_len)))
        # With `kv_layers` nothing waits for L2: layers keep all that survive L1, or text alone.
        waiting = 0 if server_choices(model.hf_config).window else second - first
        width = Widths.of(vllm_config)
        # While a prompt ends, the others have less room to be deferred; each moment is worst at one of the
        # two ends.
        none, most = (_moments(width, waiting, deferred, tokens, batched) for tokens in (0, ending))
        return cls(*map(max, none, most))


def _moments(width: Widths, waiting: int, deferred: int, ending: int, batched: int) -> tuple[int, ...]:
    """`PruningMemory` for one step.

    Args:
        width: bytes of a token.
        waiting: layers L1 .. L2-1, whose keys and values are kept until L2 has chosen what is retained.
        deferred: tokens of all deferred prompts, with those that end.
        ending: tokens of the deferred prompts that end in the step.
        batched: tokens of the step; all other rows are among them.
    """
    rows = ending + batched
    others = (deferred - ending) * width.deferred
    batch = batched * (2 * width.hidden + width.query + width.kv)  # the step's own at L1, with the captured layer
    held = others + rows * waiting * width.kv
    qkv = width.query + width.kv
    partial_sums = width.heads * rows * (1 + -(-rows // KEYS_PER_SPLIT))
    return (
        others + ending * (width.deferred + max(width.hidden, width.query)) + batch,
        others + ending * width.deferred + max(partial_sums, rows * 2 * width.hidden) + batch,
        # Normed input, residual; queries, keys, values; the attention's output, twice of the others; its
        # projection.
        held + rows * (3 * width.hidden + qkv + width.query) + batched * width.query,
        # The layer's input, residual, the MLP's input and output, one slice of that twice.
        held + rows * (4 * width.hidden + qkv) + batched * width.hidden,
        held + rows * (2 * width.hidden + qkv + width.query) + partial_sums,
    )


class MemoryReserve:
    """Holds `PruningMemory` while vLLM profiles.

    Does nothing on CPU, where the KV cache has a size of its own.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.device = device
        self.needed = PruningMemory.of(vllm_config).total if device.type != "cpu" else 0
        cache, model = vllm_config.cache_config, vllm_config.model_config
        # With a KV cache of a stated size vLLM looks at no share of the device.
        self._share = 1.0 if cache.kv_cache_memory_bytes else float(cache.gpu_memory_utilization)
        self._helps = (
            f"lower --max-model-len (now {model.max_model_len}) or the setting max_deferred_bytes "
            f"(now {deferral_limit(model)}), or share the model out by --tensor-parallel-size."
        )
        self._ballast: torch.Tensor | None = None
        self._released = device.type == "cpu"

    def hold(self) -> None:
        """Allocate; called in every dummy run, effective once, before the KV cache exists.

        Raises:
            RuntimeError: the device has not as much, or vLLM may not take as much of it, in one sentence that
                says what helps.
        """
        if self._released or self._ballast is not None:
            return
        needs = f"METok needs {format_gib(self.needed)} GiB for pruned prompts beside the model"
        free, total = torch.cuda.mem_get_info(self.device)
        left = int(self._share * total) - torch.cuda.memory_allocated(self.device)
        if self.needed >= left:  # nothing would be left for the KV cache
            raise RuntimeError(
                f"{needs}, and of the share of {self.device} that --gpu-memory-utilization allows (now {self._share}) "
                f"{format_gib(left)} GiB are left: {self._helps}"
            )
        try:
            self._ballast = torch.empty(self.needed, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            raise RuntimeError(f"{needs}, and {self.device} has {format_gib(free)} GiB free: {self._helps}") from None
        logger.info(
            "METok: %s GiB reserved for pruned prompts; less with a shorter --max-model-len or max_deferred_bytes",
            format_gib(self.needed),
        )

    def release(self) -> None:
        """Give the memory back for good: the KV cache has been sized without it."""
        self._ballast = None
        self._released = True
