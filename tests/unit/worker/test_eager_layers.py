"""The forward methods of a pruned step: which they are, that they come and go, and MLPs in slices."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from metok_vllm.worker import eager_layers
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.eager_layers import EagerLayers, fused_forward, in_slices


class Layer(nn.Module):
    """As much of a decoder layer as matters here."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), SiluAndMul())


@pytest.fixture(autouse=True)
def config() -> Iterator[Any]:
    """Operators as in vLLM's default mode: none is on."""
    from vllm.config.compilation import CompilationConfig

    made = VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    with set_current_vllm_config(made):
        yield made


def made(*layers: nn.Module, most_rows: int = 4, custom_ops: tuple[str, ...] = ("none",)) -> EagerLayers:
    return EagerLayers(Decoder(SimpleNamespace(layers=layers, norm=RMSNorm(32))), most_rows, custom_ops)


def test_forwards_are_set_and_put_back() -> None:
    layer = Layer()
    eager, x = made(layer), torch.randn(10, 32)
    operators: list[Any] = [layer.norm, layer.mlp[1]]
    before = [operator._forward_method for operator in operators]
    rows: list[int] = []
    layer.mlp[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with eager.running():
        assert all(new._forward_method is not old for new, old in zip(operators, before, strict=True))
        layer.mlp(x)
    with pytest.raises(RuntimeError, match="of a layer"), eager.running():
        raise RuntimeError("of a layer")
    assert [operator._forward_method for operator in operators] == before
    assert "forward" not in vars(layer.mlp)
    layer.mlp[0](x)
    assert rows == [4, 4, 2, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [32, 36])
def test_a_norm_equals_vllms_own(hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, and without it where the kernel takes no such row (36 of the CPU's)."""
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    norm = RMSNorm(hidden, dtype=dtype)
    nn.init.normal_(norm.weight)
    torch.manual_seed(1)
    x, residual = torch.randn(2, 7, hidden).to(dtype)
    near = {"atol": 1e-6, "rtol": 2e-2 if dtype == torch.bfloat16 else 1e-5}
    fused = fused_forward(norm)
    torch.testing.assert_close(fused(x), norm.forward_native(x), **near)
    torch.testing.assert_close(fused(x[::2]), norm.forward_native(x[::2]), **near)
    expected = norm.forward_native(x.clone(), residual.clone())
    for ours, theirs in zip(fused(x.clone(), residual.clone()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **near)
    assert (fused.__qualname__.startswith("_norm_by_kernel")) is (hidden == 32)


def test_a_norm_that_the_kernels_do_not_cover_keeps_vllms_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert eager_layers._norm_by_kernel(RMSNorm(32)) is not None
    assert eager_layers._norm_by_kernel(RMSNorm(32, var_hidden_size=16)) is None
    assert eager_layers._norm_by_kernel(RMSNorm(32, dtype=torch.bfloat16)) is None
    with eager_layers.ir.ops.rms_norm.set_priority(["native"]):
        assert eager_layers._norm_by_kernel(RMSNorm(32)) is not None
    # Another kernel than vLLM's own, chosen by the operator.
    monkeypatch.setattr(type(eager_layers.ir.ops.rms_norm), "get_priority", lambda _: ["oink", "native"])
    assert eager_layers._norm_by_kernel(RMSNorm(32)) is None
    norm = RMSNorm(32)
    assert fused_forward(norm).__qualname__.startswith("CustomOp.forward_cpu")


def test_an_operator_is_what_vllm_runs_uncompiled() -> None:
    from vllm.platforms import current_platform

    class Doubled(CustomOp):
        name = "doubled"

        def __init__(self) -> None:
            super().__init__(compile_native=True)

        def forward_native(self, x: torch.Tensor) -> str:
            return "slow"

        def forward_cpu(self, x: torch.Tensor) -> str:
            return "fast"

    operator, x = Doubled(), torch.zeros(1)
    assert current_platform.is_cpu()
    assert operator._forward_method is not operator.forward_cpu
    assert fused_forward(operator)(x) == "fast"
    assert operator._enforce_enable is False


def test_operators_switched_off_by_name_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(eager_layers.logger, "info", lambda text, *args: said.append(text % args))
    layer = Layer()
    native = layer.mlp[1]._forward_method
    with made(layer, custom_ops=("none", "-silu_and_mul")).running():
        assert layer.mlp[1]._forward_method is native
        assert layer.norm._forward_method.__qualname__.startswith("_norm_by_kernel")
    assert said == ["METok: custom_ops switch off silu_and_mul, in steps that prune too"]


def test_layers_share_a_module() -> None:
    first, second = Layer(), Layer()
    second.norm = first.norm
    names = [id(module) for module, name, _ in made(first, second)._forwards if name == "_forward_method"]
    assert len(names) == len(set(names)) == 4  # a norm, two activations, the last norm


def test_a_layer_without_an_mlp_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear has no mlp"):
        made(nn.Linear(2, 2))


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 11])
def test_slices_are_the_same_rows(rows: int) -> None:
    seen: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return (x * 3).to(torch.float64)

    x = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2)
    out = in_slices(forward, 4, x)
    assert torch.equal(out, (x * 3).to(torch.float64))
    assert out.dtype == torch.float64
    assert max(seen) <= 4
    assert sum(seen) == rows
    assert len(seen) == max(1, -(-rows // 4))


def test_one_slice_is_what_forward_returns() -> None:
    x = torch.ones(4, 2)
    assert in_slices(lambda rows: rows, 4, x) is x
