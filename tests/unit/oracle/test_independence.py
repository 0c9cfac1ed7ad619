"""A judge that shares code with the judged would share its mistakes."""

from __future__ import annotations

import ast
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "support" / "oracle"
JUDGE = {
    *("__init__", "decoder", "internvl", "labelled", "qwen", "qwen3", "qwen3_5", "result", "run", "settings"),
    *("stage1", "stage2"),
}


def imported(path: Path) -> set[str]:
    """Every module that the file imports anywhere,
    and every `tests.support.oracle` name among them in full.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_oracle_imports_nothing_of_the_project():
    """The judge's files import torch, the standard library and each other; nothing of ours comes behind."""
    allowed = {"__future__", "math", "collections", "dataclasses", "decimal", "fractions", "typing", "torch"}
    for name in JUDGE:
        found = imported(FOLDER / f"{name}.py")
        ours = {module.split(".")[3] for module in found if module.startswith("tests.support.oracle.")}
        assert ours <= JUDGE, (name, ours - JUDGE)
        others = {module.split(".")[0] for module in found if not module.startswith("tests.support.oracle.")}
        assert others <= allowed, (name, others - allowed)
