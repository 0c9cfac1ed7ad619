"""Imports go down only: what a folder of the package may know of the others."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, KERNELS = ROOT / "metok_vllm", ROOT / "kernels" / "metok_kernels"
TOP = ("plugin", "cli", "demo", "calibrate", "__init__")

LAYERS = (
    ("log",),
    ("compression",),
    ("contract",),
    ("media",),
    ("frontend", "scheduler", "worker", "serve"),
    ("models",),
    TOP,
)
"""From the bottom up. A folder imports from the layers below its own; only the top also within its own."""

ANYBODY = "metok_vllm.models.registry"
"""A table of strings, which any layer may import: it imports nothing of the package itself."""

BY_NAME = {
    ("frontend.command_line", "metok_vllm.serve.routes.MetokRoutes"): "vLLM's --middleware takes a name",
    ("frontend.startup", "metok_vllm.scheduler.scheduler.MetokScheduler"): "loaded in the engine core's process",
    ("frontend.startup", "metok_vllm.worker.rpc.MetokWorkerExtension"): "loaded in the worker's process",
    ("models.registry", "metok_vllm.models.llava_onevision:MetokLlavaOnevisionForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.llava_qwen:MetokLlavaQwenForCausalLM"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen2_5_vl:MetokQwen2_5_VLForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen2_vl:MetokQwen2VLForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen3_vl:MetokQwen3VLForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen3_vl_moe:MetokQwen3VLMoeForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen3_5:MetokQwen3_5ForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.qwen3_5:MetokQwen3_5MoeForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.internvl:MetokInternVLForConditionalGeneration"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.internvl_chat:MetokInternVLChatModel"): (
        "vLLM imports a model's module when it builds one"
    ),
    ("models.registry", "metok_vllm.models.original_llava.config:read_config"): "imported for such a checkpoint alone",
    ("models.registry", "metok_vllm.models.original_llava.tokenizer:load_tokenizer"): (
        "imported for such a checkpoint alone"
    ),
    ("models.registry", "metok_vllm.models.original_llava.tokenizer:set_placeholders"): (
        "imported for such a checkpoint alone"
    ),
}
"""Who names something of another module in a string, which no import shows, and why. No others."""

COMPRESSION_NEEDS = {"torch", "metok_vllm", *sys.stdlib_module_names}


def module_name(path: Path) -> str:
    """Dotted name below the package. `__init__` stays in it, so that relative imports come out right."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str, source: str) -> set[str]:
    """Every name that a module imports anywhere in it, in full: `from a.b import c` gives `a.b.c`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["metok_vllm", *module.split(".")][: -node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def room(name: str) -> str:
    """The folder, or the file beside the folders, of a full name; `__init__` for what stands in neither."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if any(part in layer for layer in LAYERS) else "__init__"


def level(of_room: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if of_room in layer)


def climbing(module: str, source: str) -> list[str]:
    """What a module imports and may not, as sentences."""
    own = room(f"metok_vllm.{module}")
    wrong = []
    for name in sorted(imported(module, source)):
        if name.split(".")[0] != "metok_vllm" or f"{name}.".startswith(f"{ANYBODY}."):
            continue
        target = room(name)
        if target != own and own not in TOP and level(target) >= level(own):
            wrong.append(f"{module} imports {name}")
    return wrong


def foreign(module: str, source: str) -> list[str]:
    """What `compression` imports and may not: it needs torch alone, and of the package only itself."""
    names = imported(module, source)
    return [
        f"{module} imports {name}"
        for name in sorted(names)
        if name.split(".")[0] not in COMPRESSION_NEEDS
        or (name.startswith("metok_vllm") and room(name) != "compression")
    ]


def test_every_folder_has_its_layer() -> None:
    folders = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert folders == {name for layer in LAYERS for name in layer}


def test_imports_go_down() -> None:
    assert [fault for module, source in MODULES.items() for fault in climbing(module, source)] == []
    assert climbing("models.registry", MODULES["models.registry"]) == []
    assert not [name for name in imported("models.registry", MODULES["models.registry"]) if "metok_vllm" in name]


def test_compression_needs_torch_alone() -> None:
    inside = {module: source for module, source in MODULES.items() if module.startswith("compression.")}
    assert len(inside) > 10
    assert [fault for module, source in inside.items() for fault in foreign(module, source)] == []


def test_kernels_know_neither_vllm_nor_the_package() -> None:
    sources = [path.read_text("utf-8") for path in KERNELS.rglob("*.py")]
    assert len(sources) > 20
    found = {name.split(".")[0] for source in sources for name in imported("", source)}
    assert not found & {"vllm", "metok_vllm"}


def test_names_in_strings_are_known_and_exist() -> None:
    found = {
        (module, node.value)
        for module, source in MODULES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("metok_vllm.")
    }
    assert found == set(BY_NAME)
    for _, name in found:
        path, _, thing = name.replace(":", ".").rpartition(".")
        tree = ast.parse(MODULES[path.removeprefix("metok_vllm.")])
        assert thing in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}, name


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("contract.made_up", "from metok_vllm.worker import ops", "metok_vllm.worker.ops"),
        ("contract.made_up", "def f():\n    import metok_vllm.media.loader", "metok_vllm.media.loader"),
        ("compression.made_up", "if TYPE_CHECKING:\n    from ..contract.spans import VideoSpan", "contract.spans.VideoSpan"),
        ("worker.made_up", "from metok_vllm.scheduler.chunking import longest_chunk", "scheduler.chunking.longest_chunk"),
        ("worker.made_up", "from metok_vllm.models import base", "metok_vllm.models.base"),
        ("worker.made_up", "from metok_vllm import enable", "metok_vllm.enable"),
        ("log", "from .compression import events", "metok_vllm.compression.events"),
        ("worker.__init__", "from ..serve import routes", "metok_vllm.serve.routes"),
        ("worker.made_up", "from metok_vllm.models.registry import SUPPORTED", ""),
        ("worker.made_up", "from metok_vllm.models import registry", ""),
        ("worker.made_up", "from . import ops", ""),
        ("worker.made_up", "from metok_vllm.contract.spans import VideoSpan\nfrom metok_vllm.log import metok_logger", ""),
        ("cli", "from metok_vllm.demo.run import run_demo", ""),
    ],
)  # fmt: skip
def test_what_climbs_is_caught(module: str, source: str, caught: str) -> None:
    faults = climbing(module, source)
    assert len(faults) == bool(caught), faults
    assert all(fault.endswith(caught) for fault in faults)


@pytest.mark.parametrize(
    "source",
    ["import vllm.config", "import triton", "def f():\n    from numpy import array", "from ..log import metok_logger"],
)
def test_what_compression_may_not_have_is_caught(source: str) -> None:
    assert len(foreign("compression.made_up", source)) == 1


def test_what_compression_may_have_is_not() -> None:
    assert foreign("compression.made_up", "import torch\nimport math\nfrom .tiers import quota") == []
