"""Installed but not asked for, METok changes nothing; asking for it costs no import before it is needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import metok_vllm
from metok_vllm.models.registry import SUPPORTED
from metok_vllm.plugin import register

ROOT = Path(__file__).resolve().parents[2]

IMPORTS = """
import sys
import metok_vllm
loaded = {name.split(".")[0] for name in sys.modules}
heavy = sorted(loaded & {"vllm", "torch", "transformers", "triton", "pydantic", "av", "numpy"})
assert not heavy, f"import metok_vllm imports {heavy}"
metok_vllm.enable(events=3)
loaded = {name.split(".")[0] for name in sys.modules}
heavy = sorted(loaded & {"vllm", "torch", "transformers", "triton", "av"})
assert not heavy, f"metok_vllm.enable imports {heavy}"
"""

REGISTERS = """
import sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils import config as vllm_configs
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1 import kv_cache_spec_registry as registry_module
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
import os

registry_module.KVCacheSpecRegistry._ensure_registered()

def held():
    # Every name in every module of vLLM, and every attribute of every class there, by identity.
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vllm":
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found.update({(name, key, k): id(v) for k, v in list(vars(value).items()) if not k.startswith("_abc_")})
    return found

def registries():
    return {
        "models": set(ModelRegistry.models),
        "configs": dict(MODELS_CONFIG_MAP),
        "loaders": dict(VIDEO_LOADER_REGISTRY.name2class),
        "formats": dict(registry_module._REGISTRY_KVCACHESPEC_LIST),
        "config parsers": dict(vllm_configs._CONFIG_FORMAT_TO_CONFIG_PARSER),
        "tokenizers": dict(TokenizerRegistry.tokenizers),
        "renderers": dict(RENDERER_REGISTRY.renderers),
    }

sys.argv = ["vllm", "serve", "some/model", "--port", "8001"]
argv, environ = list(sys.argv), dict(os.environ)
before, names = registries(), held()
from metok_vllm.models.registry import SUPPORTED
from metok_vllm.plugin import register
import metok_vllm.frontend.startup
for _ in range(2):
    register()
after, renamed = registries(), held()

assert sys.argv == argv and os.environ == environ
new = {kind: set(after[kind]) - set(before[kind]) for kind in before}
assert new["models"] == new["configs"] == METOK, new
for kind in ("loaders", "config parsers", "tokenizers", "renderers"):
    assert new[kind] == {"metok"}, new
assert {spec.__name__ for spec in new["formats"]} == {"DeepAttentionSpec"}, new
for kind in before:
    assert before[kind] <= after[kind] if kind == "models" else before[kind].items() <= after[kind].items(), kind
changed = [key for key, value in names.items() if renamed.get(key) != value]
assert not changed, f"replaced in vLLM: {changed}"
assert len(names) > 10_000, len(names)
# A model's module is imported when one is built; vLLM looks at its class in a process of its own.
loaded = [name for name in sys.modules if name.startswith("metok_vllm.models.") and "registry" not in name]
assert not loaded, loaded
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_the_package_imports_nothing_heavy() -> None:
    run(IMPORTS)


def test_registering_adds_names_and_replaces_nothing() -> None:
    run(REGISTERS.replace("METOK", repr({supported.metok for supported in SUPPORTED})))


def test_a_stock_configuration_is_stock(make_config: Callable[..., Any]) -> None:
    """The plugin is loaded in this process by now, and a METok configuration was built."""
    make_config()
    config = make_config(metok=False)
    assert config.model_config.architecture == "LlavaOnevisionForConditionalGeneration"
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_extension_cls == ""
    assert config.model_config.multimodal_config.media_io_kwargs == {}
    assert config.additional_config == {}
    assert not [name for name in vars(config.model_config.hf_config) if "metok" in name.lower()]
    assert "metok" not in str(config).lower().replace(str(config.model_config.model).lower(), "")


def test_settings_without_metok_change_nothing(make_config: Callable[..., Any]) -> None:
    config = make_config(metok=False, additional_config={"metok": {"no such key": 1}})
    assert config.model_config.architecture == "LlavaOnevisionForConditionalGeneration"
    assert config.scheduler_config.scheduler_cls is None


def test_the_command_line_is_read_only_where_metok_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["vllm", "serve", "no-such-model", "--config", "no-such-file.yaml", "--no-such-option"]
    monkeypatch.setattr(sys, "argv", list(argv))
    register()
    assert sys.argv == argv


def test_the_package_is_small_at_the_top() -> None:
    assert metok_vllm.__all__ == ["enable"]


def test_serving_needs_no_plotting_library() -> None:
    """It is an extra (`demo`): only the pictures of the demo and of calibration may name it."""
    package = Path(metok_vllm.__file__).parent
    named = {str(path.relative_to(package)) for path in package.rglob("*.py") if "matplotlib" in path.read_text()}
    assert named == {"cli.py", "calibrate/report.py", "demo/timeline.py"}
