"""A Triton driver that is active only where kernels are interpreted and no GPU exists."""

from __future__ import annotations

import os
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """Stands in for a GPU driver while `TRITON_INTERPRET=1`; launches nothing itself.

    The interpreter executes kernels with NumPy. Triton still asks the active driver for the device and the
    target.
    """

    @classmethod
    def is_active(cls) -> bool:
        if os.environ.get("TRITON_INTERPRET") != "1":
            return False
        import torch

        return not torch.cuda.is_available() and not torch.xpu.is_available()

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(f"the interpreter compiles nothing (asked for the C++ type of {ty})")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        return None

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("timings under the interpreter mean nothing")
