"""Memory of a pruned step that vLLM's profiling run does not see.

vLLM sizes the KV cache by a dummy run of `max_num_batched_tokens` tokens through the stock model. A pruned
step needs more: what deferred prompts hold, and the copies that join and gather them. And its deep layers run
on whole prompts, where stock vLLM would run on a chunk. All of it is allocated while vLLM measures and given
back before the first request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.utils.mem_utils import format_gib

from metok_vllm.contract.budgets import bytes_per_token, deferral_limit, ending_limit
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = metok_logger(__name__)


@dataclass(frozen=True)
class PruningMemory:
    """Upper bounds in bytes on one worker."""

    deferred: int  # state of the prompts that span several steps
    joined: int  # the same of the prompts that end in a step, in one piece
    gathered: int  # hidden state and residual of the rows that go on, before and after a pruning layer
    waiting: int  # keys and values of layers L1 .. L2-1, until L2 has chosen what is retained
    layers: int  # what a layer allocates for the rows beyond those that vLLM profiles with

    @property
    def total(self) -> int:
        return self.deferred + self.joined + self.gathered + self.waiting + self.layers

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> PruningMemory:
        """By the sizes of the model and the scheduler."""
        model = vllm_config.model_config
        text = model.hf_text_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        dtype = model.dtype
        assert isinstance(dtype, torch.dtype)
        batched = int(vllm_config.scheduler_config.max_num_batched_tokens)
        ending = max(ending_limit(vllm_config), int(model.max_model_len))
        head_dim = model.get_head_size()
        kv_heads = max(1, text.num_key_value_heads // ranks)
        heads = text.num_attention_heads // ranks
        first, second, _ = server_choices(model.hf_config).prune_layers
        # A layer holds its input and residual. Beside them it holds either queries, keys, values and the
        # attention's output, or the MLP's two halves and their product.
        attention = (2 * heads + 2 * kv_heads) * head_dim
        mlp = 3 * (text.intermediate_size // ranks)
        layer = 2 * text.hidden_size + max(attention, mlp)
        return cls(
            deferred=deferral_limit(model),
            joined=ending * bytes_per_token(model),
            gathered=2 * (ending + batched) * 2 * text.hidden_size * dtype.itemsize,
            waiting=(second - first) * (ending + batched) * 2 * kv_heads * head_dim * dtype.itemsize,
            layers=ending * layer * dtype.itemsize,
        )


class MemoryReserve:
    """Holds `PruningMemory` while vLLM profiles.

    Does nothing on CPU, where the KV cache has a size of its own.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.device = device
        self.needed = PruningMemory.of(vllm_config).total if device.type != "cpu" else 0
        self._ballast: torch.Tensor | None = None
        self._released = device.type == "cpu"

    def hold(self) -> None:
        """Allocate; called in every dummy run, effective once, before the KV cache exists."""
        if self._released or self._ballast is not None:
            return
        logger.info(
            "METok: %s GiB reserved for pruned prompts; less with a shorter --max-model-len or max_deferred_bytes",
            format_gib(self.needed),
        )
        self._ballast = torch.empty(self.needed, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        """Give the memory back for good: the KV cache has been sized without it."""
        self._ballast = None
        self._released = True
