"""Compile a `Launch` for a GPU that is not there, and read what the compiler says it needs.

Works only where kernels are not interpreted (`TRITON_INTERPRET` unset when they were imported).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton  # type: ignore[import-untyped]  # Triton ships no type information
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.backends.nvidia.compiler import get_ptxas  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from metok_kernels.launch import Launch

SHARED_LIMIT = {80: 166_912, 90: 232_448}
"""Bytes of shared memory one thread block may ask for, by compute capability (CUDA programming guide)."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel needs."""

    kernel: str
    capability: int
    registers: int
    """32-bit registers a thread."""
    spills: int
    """Bytes a thread stores to and loads from local memory because registers ran out."""
    shared: int
    """Bytes of shared memory a thread block."""
    ttir: str
    """Triton's intermediate code, before any lowering."""


def compile_launch(launch: Launch, capability: int) -> Usage:
    """Compile for compute capability `capability` (80, 90) and report the usage of registers and memory."""
    kernel, specialised = launch.kernel, dict(launch.key.arguments)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
            continue
        signature[name], known = specialised[name]
        if signature[name] == "constexpr":
            constants[name] = known
        elif known == "D":
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    registers, spills = _resource_usage(compiled.asm["ptx"], capability)
    shared = int(compiled.metadata.shared)
    return Usage(kernel.__name__, capability, registers, spills, shared, compiled.asm["ttir"])


def _resource_usage(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and spilled bytes a thread, from the verbose report of Triton's own `ptxas`."""
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        report = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", source.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    if registers is None or len(spilled) < 2:
        raise RuntimeError(f"ptxas reported no resource usage:\n{report}")
    return int(registers[1]), sum(int(size) for size in spilled)
