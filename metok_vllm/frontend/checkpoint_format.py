"""Checkpoints in a format that transformers cannot read, told to vLLM through its own registries.

vLLM finds a config parser by `--config-format` and a tokenizer by `--tokenizer-mode`. Those of METok read
what the table of families (`models/registry.py`) says is in a format of its own, and leave all other
checkpoints to vLLM's. So `LLM()` may always be given them; on the command line `--plugin metok` adds them
where they are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tokenizers.registry import TokenizerRegistry, cached_tokenizer_from_config, get_tokenizer
from vllm.transformers_utils import config as vllm_configs
from vllm.transformers_utils.config import HFConfigParser, register_config_parser

from metok_vllm.frontend.reasons import reason
from metok_vllm.models.registry import FORMAT, SUPPORTED, named, read_own_format, with_own_format

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class MetokConfigParser(HFConfigParser):
    """vLLM's parser, and before it the formats of METok's own."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        """As vLLM's.

        Raises:
            ValueError: METok cannot serve the checkpoint, in one sentence.
        """
        stated, _ = PreTrainedConfig.get_config_dict(model, revision=revision, token=kwargs.get("token"))
        overrides = kwargs.get("hf_overrides")  # vLLM would put them where nobody looks
        asked = {**stated, **overrides} if isinstance(overrides, dict) else stated
        config = read_own_format(asked, str(model))
        if config is not None:
            return stated, config
        parsed: tuple[dict[str, Any], PreTrainedConfig] = super().parse(
            model, trust_remote_code, revision, code_revision, **kwargs
        )
        return parsed


class MetokTokenizer:
    """What vLLM loads a tokenizer by in this mode (`vllm/tokenizers/registry.py: get_tokenizer`)."""

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | Path, *args: Any, download_dir: str | None = None, **kwargs: Any
    ) -> Any:
        """A tokenizer of a format of METok's own, or vLLM's."""
        where = {"revision": kwargs.get("revision"), "cache_dir": download_dir}
        try:
            stated, _ = PreTrainedConfig.get_config_dict(path_or_repo_id, token=kwargs.get("token"), **where)
        except OSError:  # a tokenizer alone
            stated = {}
        own = with_own_format(stated.get("architectures"))
        if own is None:
            return get_tokenizer(path_or_repo_id, *args, tokenizer_mode="hf", download_dir=download_dir, **kwargs)
        return get_cached_tokenizer(named(own.tokenizer)(path_or_repo_id, *args, **kwargs, cache_dir=download_dir))


def register_formats() -> None:
    """Make them known to vLLM; calling it again changes nothing."""
    from vllm.renderers.registry import RENDERER_REGISTRY

    if FORMAT not in vllm_configs._CONFIG_FORMAT_TO_CONFIG_PARSER:
        with _quiet(vllm_configs.__name__):
            register_config_parser(FORMAT)(MetokConfigParser)
    unknown = {name for supported in SUPPORTED if supported.own_format for name in supported.own_format.unknown_types}
    for name in unknown - set(CONFIG_MAPPING.keys()):
        # vLLM looks at the config beside a tokenizer, and logs errors where it cannot.
        AutoConfig.register(name, type("OwnFormatConfig", (PreTrainedConfig,), {"model_type": name}))
    if FORMAT not in TokenizerRegistry.tokenizers:
        TokenizerRegistry.register(FORMAT, MetokTokenizer.__module__, MetokTokenizer.__name__)
        RENDERER_REGISTRY.register(FORMAT, "vllm.renderers.hf", "HfRenderer")


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """vLLM would tell every server of a format that it may not have asked for."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def complete_config(model_config: ModelConfig) -> None:
    """What the config of a format of its own says of the tokenizer.

    vLLM calls METok for this when it knows the model (`verify_and_update_model_config`).

    Raises:
        ValueError: the tokenizer is not METok's, cannot be loaded or does not fit, in one sentence.
    """
    own = with_own_format(model_config.architectures)
    if own is None or model_config.skip_tokenizer_init:  # the latter is refused later
        return
    if model_config.tokenizer_mode != FORMAT:
        raise ValueError(
            f"METok reads the tokenizer of this checkpoint's format by itself: use --tokenizer-mode {FORMAT}."
        )
    try:
        tokenizer = cached_tokenizer_from_config(model_config)
    except Exception as error:  # transformers raises whatever its parsers meet
        where = model_config.tokenizer
        raise ValueError(f"METok: the tokenizer of {where} cannot be loaded: {reason(error)}.") from None
    named(own.complete)(model_config, tokenizer)
