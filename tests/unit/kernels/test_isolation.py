"""`metok_kernels` needs torch and triton, and nothing of vLLM or of the plugin."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.support.kernels.common import ROOT, run_python

pytestmark = pytest.mark.no_gpu
PACKAGE = ROOT / "kernels" / "metok_kernels"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def test_importing_everything_imports_neither_vllm_nor_the_plugin() -> None:
    assert len(MODULES) > 20
    code = (
        f"import importlib, sys\nfor name in {MODULES!r}: importlib.import_module(name)\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'vllm', 'metok_vllm', 'transformers'}))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def imported(source: str) -> set[str]:
    """Top-level names of the packages that a module's source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(str(node.module).split(".")[0])
    return names


def test_sources_name_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "metok_kernels", *sys.stdlib_module_names}
    foreign = {str(path): imported(path.read_text()) - allowed for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in foreign.items() if names} == {}
    assert imported("def f():\n    import vllm.config\n    from numpy import array") == {"vllm", "numpy"}


def test_references_do_not_import_triton() -> None:
    """They are plain torch: what runs where Triton has no device."""
    for path in PACKAGE.glob("*/reference.py"):
        assert "triton" not in imported(path.read_text()), path
