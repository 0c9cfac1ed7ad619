"""The main model's tokenizer, processor and chat template, loaded once before the engine is started.

vLLM loads the same ones later, some of them only in another process, and ends with a trace. What is loaded
here is kept in vLLM's own caches, so the start takes no longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from metok_vllm.frontend.question import templates_markers
from metok_vllm.frontend.reasons import reason
from metok_vllm.log import metok_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = metok_logger(__name__)


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
