"""Entry point of the plugin: vLLM calls `register` in every process,
before it reads options or builds a model.

Registering only adds names to vLLM's registries. Nothing changes for a server that does not ask for METok.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of METok's models and formats, KV cache format, video loader and media connector.

    Takes `--plugin metok` off the command line first. May be called several times in one process. With a vLLM
    that METok is not made for, a server that asks for METok does not start; others get a warning and go on.

    Raises:
        SystemExit: METok is asked for and cannot be had.
    """
    from metok_vllm.frontend.command_line import apply_plugin_option
    from metok_vllm.log import metok_logger

    asked = apply_plugin_option()
    try:
        _refuse_version()
        _register_models()
        _register_lazily()
    except (ImportError, AttributeError, TypeError) as error:
        if asked:
            raise SystemExit(f"vllm: error: METok cannot be loaded into this vLLM: {error}") from error
        metok_logger(__name__).warning("METok cannot be loaded into this vLLM and is off: %s", error)


def _refuse_version() -> None:
    import vllm

    from metok_vllm.contract.vllm_versions import refuse_version

    refuse_version(vllm.__version__)


def _register_models() -> None:
    from vllm.model_executor.models import ModelRegistry

    from metok_vllm.models.registry import SUPPORTED

    for supported in SUPPORTED:
        if supported.metok not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(supported.metok, supported.module)


def _register_lazily() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from metok_vllm.frontend.checkpoint_format import register_formats
    from metok_vllm.frontend.startup import MetokConfig
    from metok_vllm.media.connector import register_connector
    from metok_vllm.media.loader import register_loader
    from metok_vllm.models.registry import SUPPORTED
    from metok_vllm.scheduler.kv_manager import register_kv_cache_spec

    for supported in SUPPORTED:
        MODELS_CONFIG_MAP[supported.metok] = MetokConfig
    register_formats()
    register_kv_cache_spec()
    register_loader()
    register_connector()
