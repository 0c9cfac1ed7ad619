"""The compiler half that Triton's backend discovery asks for.

It compiles nothing: kernels are interpreted.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget, Language


class InterpreterCompiler(BaseBackend):
    """Accepts the target `cpu` and refuses to compile for it, in one sentence."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "metok-interpreter"

    def parse_options(self, options: dict[str, Any]) -> Any:
        raise RuntimeError(
            "Triton kernels run on CPU only in the interpreter: set TRITON_INTERPRET=1 before the start."
        )

    def add_stages(self, stages: dict[str, Any], options: object, language: Language) -> None:
        self.parse_options({})

    def load_dialects(self, context: Any) -> None:
        return None

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
