"""Does anything run at all? From the repository's root: gpu_smoke.py [lib] [metok] [llm];
ends with 1 if something is wrong.

lib:   vLLM's compiled operators and its FlashAttention, against plain torch
metok: `metok_vllm.worker.ops` on the GPU against the CPU (without a GPU: METOK_KERNELS=triton in Triton's
    interpreter)
llm:   a small Qwen2 with random weights; SMOKE=eager|safe|graph|compile chooses its engine
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WRONG: list[str] = []
"""Names of what failed."""


def compare(name: str, run: Callable[[], tuple[Tensor, Tensor]], limit: float) -> None:
    """Print the relative error, over all elements, of the first of two results to the second."""
    try:
        result, expected = run()
        error = ((result.float() - expected.float()).norm() / expected.float().norm()).item()
        right = error < limit  # not so where it is NaN
        print(f"{name}: relative error {error:.2e}", "ok" if right else f"WRONG (limit {limit})", flush=True)
    except Exception:
        right = False
        print(f"{name}: FAILED\n{traceback.format_exc(limit=-3)}", flush=True)
    if not right:
        WRONG.append(name)


def lib() -> None:
    """What vLLM brings compiled: two operators,
    and FlashAttention, of the version it takes here, with the heads of the models in the benchmark.
    """
    import vllm._custom_ops as ops
    from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version: Any = get_flash_attn_version()
    platform: Any = current_platform
    print(type(platform).__name__, platform.get_device_name(), platform.get_device_capability(), torch.__version__)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    x, weight = new(64, 1024), new(1024)

    def norm() -> tuple[Tensor, Tensor]:
        out = torch.full_like(x, float("nan"))  # an element that is not written shows
        ops.rms_norm(out, x, weight, 1e-6)
        return out, rms_norm(x.float(), (1024,), weight.float(), 1e-6)

    def gate() -> tuple[Tensor, Tensor]:
        out = x.new_full((64, 512), float("nan"))
        torch.ops._C.silu_and_mul(out, x)
        return out, silu(x[:, :512].float()) * x[:, 512:]

    def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.float().transpose(0, 1)[None] for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)

    def attention(rows: int, heads: int, kv_heads: int, dim: int, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = new(rows, heads, dim), new(rows, kv_heads, dim), new(rows, kv_heads, dim)
        edges = ints(0, rows)
        out = flash_attn_varlen_func(
            q, k, v, max_seqlen_q=rows, cu_seqlens_q=edges, max_seqlen_k=rows, cu_seqlens_k=edges, causal=causal,
            fa_version=version,
        )  # fmt: skip
        return out, plain(q, k, v, causal)

    def paged(keys: int, heads: int, kv_heads: int, dim: int, page: int = 16) -> tuple[Tensor, Tensor]:
        q, pages = new(1, heads, dim), -(-keys // page)
        k_cache, v_cache = (new(2 * pages, page, kv_heads, dim) for _ in range(2))
        table = torch.randperm(2 * pages, device="cuda")[:pages].to(torch.int32)[None]
        out = flash_attn_varlen_func(
            q, k_cache, v_cache, max_seqlen_q=1, cu_seqlens_q=ints(0, 1), max_seqlen_k=keys, seqused_k=ints(keys),
            causal=True, block_table=table, fa_version=version,
        )  # fmt: skip
        k, v = (cache[table[0].long()].flatten(0, 1)[:keys] for cache in (k_cache, v_cache))
        return out, plain(q, k, v, causal=False)  # one row, the last: it sees every key

    compare("rms_norm", norm, 1e-2)
    compare("silu_and_mul", gate, 1e-2)
    name = f"FlashAttention {version}"  # None where vLLM finds none: then each of these fails
    compare(f"{name} prefill, 28/4 heads of 128", partial(attention, 700, 28, 4, 128, True), 1e-2)
    compare(f"{name} vision tower, 16 heads of 72", partial(attention, 729, 16, 16, 72, False), 1e-2)
    compare(f"{name} paged decode, 28/4 heads of 128", partial(paged, 5003, 28, 4, 128), 1e-2)
    compare(f"{name} tiny model, 4/2 heads of 32", partial(attention, 300, 4, 2, 32, True), 1e-2)


def metok() -> None:
    """Every operation of a pruned step at sizes in use; bfloat16 inputs, the reference in float32."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    from metok_vllm.compression.pooling import PoolStyle
    from metok_vllm.compression.tiers import quota
    from metok_vllm.worker import ops
    from metok_vllm.worker.dense_attention import DenseAttention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def both(operation: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
        """The operation on the device, and as plain torch on the CPU."""
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        exact = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        result = operation(*moved)
        chosen = os.environ.get(ops.VARIABLE)
        os.environ[ops.VARIABLE] = "torch"
        try:
            expected = operation(*exact)
        finally:
            os.environ.pop(ops.VARIABLE) if chosen is None else os.environ.update({ops.VARIABLE: chosen})
        return result.cpu(), expected

    total, rows, place = 520, 20, torch.arange(520)
    for heads, kv_heads, dim in ((28, 4, 128), (4, 2, 32)):
        query, key = torch.randn(rows, heads, dim).bfloat16(), torch.randn(total, kv_heads, dim).bfloat16()
        seen = (query, key, place[15:480], place[-rows:], place, dim**-0.5)
        compare(f"METok scores, {heads}/{kv_heads} heads of {dim}", partial(both, ops.scores, *seen), 1e-2)

    lengths, keep = torch.tensor([100, 150, 230]), torch.tensor([76, 50, 230])
    events = (torch.rand(480), lengths, keep, 356)
    compare("METok select", partial(both, ops.select, *events), 1e-12)

    side, width = (27, 896) if device == "cuda" else (9, 64)  # the interpreter takes long
    frames = torch.randn(16, side, side, width).bfloat16()

    def similarity(x: Tensor) -> Tensor:
        return ops.event_similarity(x)[1]

    compare("METok event_similarity", partial(both, similarity, frames.flatten(1, 2)), 1e-2)

    counts = quota(16, events=5, key_events=3, key_frames=6)
    tiers = torch.arange(3).repeat_interleave(torch.tensor(counts.counts()))

    def pool(x: Tensor, tiers: Tensor, separator: Tensor, event_ids: Tensor) -> Tensor:
        return ops.pool_video(x, tiers, (2, 4, 8), counts, PoolStyle("bilinear"), separator, event_ids).tokens

    video = (frames, tiers, frames[0, 0, 0], torch.arange(16) * 5 // 16)
    compare("METok pool_video", partial(both, pool, *video), 1e-2)

    def gather(*arguments: Tensor) -> Tensor:
        return torch.cat([x.float().flatten() for x in ops.gather(*arguments)])

    hidden = torch.randn(total, 896).bfloat16()
    survivors = (place[::3].contiguous(), hidden, hidden + 1, place)
    compare("METok gather", partial(both, gather, *survivors), 1e-12)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.full_like(q, float("nan"))
        dense = DenseAttention("CPU_ATTN")
        if q.is_cuda:  # as vLLM chooses: its flash attention takes no float32
            flash = DenseAttention("FLASH_ATTN", get_flash_attn_version(head_size=q.shape[-1]))
            dense = DenseAttention("TRITON_ATTN") if q.dtype == torch.float32 else flash
        starts = torch.tensor([0, 300, 305, 382], dtype=torch.int32, device=q.device)
        ops.causal_attention(q, k, v, [300, 5, 77], starts, 300, q.shape[-1] ** -0.5, out, dense)
        return out

    for heads, kv_heads, dim, kind in (
        (28, 4, 128, torch.bfloat16),
        (14, 2, 64, torch.bfloat16),
        (4, 2, 32, torch.bfloat16),
        (4, 2, 32, torch.float32),
    ):
        packed = [torch.randn(382, count, dim).to(kind) for count in (heads, kv_heads, kv_heads)]
        name = f"METok causal_attention, {heads}/{kv_heads} heads of {dim}, {kind}"
        compare(name, partial(both, attend, *packed), 1e-2)


def llm() -> None:
    """Whole requests through vLLM, without METok; on a CPU a very small model,
    to try this program and not vLLM.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    cuda = torch.cuda.is_available()
    size, heads = (1024, 8) if cuda else (64, 2)  # heads of 128; of 32, which a CPU takes
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": size, "intermediate_size": 2816,
        "num_hidden_layers": 4 if cuda else 1, "num_attention_heads": heads,
        "num_key_value_heads": 2, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16" if cuda else "float32", "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "rope_theta": 10000.0,
    }  # fmt: skip
    graphs = "FULL_AND_PIECEWISE" if os.environ.get("PIECE") else "FULL_DECODE_ONLY"
    safe = {"attention_backend": "TRITON_ATTN", "compilation_config": {"custom_ops": ["none"]}}
    engines: dict[str, dict[str, Any]] = {
        "eager": {"enforce_eager": True},
        "safe": {"enforce_eager": True, **safe},
        "graph": {"compilation_config": {"mode": 0, "cudagraph_mode": graphs}},
        "compile": {},
    }
    which = os.environ.get("SMOKE", "eager")
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 2048, "seed": 0, **engines[which]}
    if cuda:
        options["gpu_memory_utilization"] = 0.3
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(config))
    began = time.time()
    engine = LLM(str(folder), **options)
    started = time.time()
    tokens = 32 if cuda else 2
    prompt = TokensPrompt(prompt_token_ids=list(range(3, 200 if cuda else 20)))
    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    answers = engine.generate([prompt] * (8 if cuda else 1), params, use_tqdm=False)
    spent = f"start {started - began:.1f} s, requests {time.time() - started:.2f} s"
    print("llm", which, len(answers), answers[0].outputs[0].token_ids[:8], spent)
    if any(len(answer.outputs[0].token_ids) != tokens for answer in answers):
        WRONG.append("llm")


if __name__ == "__main__":
    # Started by hand, only the kit may be on the path, and nothing be set.
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "kernels")]
    for variable, value in (
        ("VLLM_USE_V2_MODEL_RUNNER", "1"),
        ("HF_HUB_OFFLINE", "1"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ):
        os.environ.setdefault(variable, value)
    for part in sys.argv[1:] or ["lib", "llm"]:
        {"lib": lib, "metok": metok, "llm": llm}[part]()
    print("smoke:", f"WRONG: {', '.join(WRONG)}" if WRONG else "ok")
    sys.exit(bool(WRONG))
