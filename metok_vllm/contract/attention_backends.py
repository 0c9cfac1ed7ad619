"""vLLM's attention backends that METok works with.

METok gives the deep layers shorter sequences than vLLM knows of: it shifts the lengths on the device, and
`seq_lens_cpu_upper_bound` on the host stays what vLLM made it. Without speculative decoding vLLM calls that
bound exact, and some backends plan their reads by it. Those read slots that hold nothing, in silence. The
backends below were read in vLLM 0.32 (`vllm/v1/attention/backends/`):

- `FLASH_ATTN` attends and schedules ahead of time (version 3) by the lengths on the device; of the host's it
  takes the longest, as a bound. It reads the host's more closely only under decode context parallelism and
  for models with bidirectional prefixes; METok refuses the one and serves none of the other.
- `TRITON_ATTN` attends by the lengths on the device, and takes the longest of the host's as a bound.
- `CPU_ATTN` attends and schedules by the lengths on the device, which here is the host.

Not: `FLASHINFER` and its relatives (pages by the host's lengths, `flashinfer.py: build`), `FLEX_ATTENTION`
(its own mask over logical positions), `TURBOQUANT` (copies the host's lengths), backends for ROCm, and those
that nobody has read.
"""

from __future__ import annotations

from typing import Literal, get_args

AttentionBackend = Literal["FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"]
"""By vLLM's names (`AttentionBackend.get_name()`)."""

ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = get_args(AttentionBackend)


def refused_backend(name: str, flag: str = "--attention-backend", why: str = "") -> str | None:
    """The sentence that refuses an attention backend, or None where METok works with it.

    Args:
        name: vLLM's name of the backend.
        flag: the option by which another is chosen.
        why: how it came to be chosen, where the user did not name it.
    """
    if name in ATTENTION_BACKENDS:
        return None
    return f"METok does not support the attention backend {name}{why}: use FLASH_ATTN or TRITON_ATTN in {flag}."
