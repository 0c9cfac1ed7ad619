"""The main model's tokenizer, processor and chat template, loaded once before the engine is started.

vLLM loads the same ones later, some of them only in another process, and ends with a trace. What is loaded
here is kept in vLLM's own caches, so the start takes no longer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from metok_vllm.frontend.question import templates_markers
from metok_vllm.frontend.reasons import reason
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = metok_logger(__name__)


SETTINGS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
"""Files beside config.json that vLLM or transformers read, each if it is there."""


def check_settings_files(model: str) -> None:
    """Refuse a checkpoint's folder with a settings file that is no JSON object,
    or whose name is not UTF-8, which safetensors does not open.

    vLLM reads some of the files before it calls METok (`ModelConfig`), and ends with a trace.

    Raises:
        ValueError: in one sentence that names the file.
    """
    try:
        model.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"METok cannot serve {model!r}: its path is not UTF-8, and its weights cannot be opened."
        ) from None
    for name in SETTINGS:
        path = Path(model) / name
        if not path.exists():
            continue
        try:
            if not isinstance(json.loads(path.read_bytes()), dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            raise ValueError(f"METok cannot read {path}: {reason(error)}.") from None


def check_front_end(model_config: ModelConfig, chat_template: str | None) -> None:
    """Refuse a checkpoint whose prompts cannot be read; warn where no question can be found in them.

    Args:
        chat_template: the setting of this name.

    Raises:
        ValueError: in one sentence that names the part.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    with _part(f"the tokenizer of {model_config.tokenizer}"):
        tokenizer = cached_tokenizer_from_config(model_config)
    with _part(f"the processor of {model_config.model}"):
        processor = MULTIMODAL_REGISTRY.create_processor(model_config, tokenizer=tokenizer)
        processor.info.get_hf_processor()
    with _part("the chat template"):
        markers = templates_markers(tokenizer, model_config, chat_template)
    if not markers:
        logger.warning(
            "METok: no chat template shows where a user's question stands, so all text of a prompt is taken for it; "
            "state 'query' in requests, or start with another --chat-template."
        )


@contextmanager
def _part(part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and Jinja raise whatever their parsers meet
        raise ValueError(f"METok: {part} cannot be loaded: {reason(error)}.") from None
