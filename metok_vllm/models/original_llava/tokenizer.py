"""The tokenizer of an original-format checkpoint: the language model's, with placeholders added.

The authors mark a picture or video by a number that is no token. vLLM needs tokens, so two are added, in rows
that the vocabulary has to spare (151646 of 152064 are in use).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, Qwen2Config

from metok_vllm.models.original_llava.weights import check_tower

if TYPE_CHECKING:
    from vllm.config import ModelConfig

IMAGE, VIDEO = "<image>", "<video>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2's, for a checkpoint without one: the authors' templates "qwen_1_5" and "qwen_2" render the same."""


def load_tokenizer(*args: Any, **kwargs: Any) -> Any:
    """The tokenizer, with `<image>` and `<video>` as tokens of their own.

    Args are those of `AutoTokenizer.from_pretrained`, and so are the errors.
    """
    # With a config of its own: transformers does not know `llava_qwen`, and takes `llava` for another model.
    tokenizer = AutoTokenizer.from_pretrained(*args, **{**kwargs, "config": Qwen2Config()})
    tokenizer.add_tokens([IMAGE, VIDEO], special_tokens=True)
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def set_placeholders(model_config: ModelConfig, tokenizer: Any) -> None:
    """Tell the config the ids of the placeholders.

    Raises:
        ValueError: the tokenizer is another model's, the vocabulary has no rows to spare, or there are no
            weights for the vision tower.
    """
    config: Any = model_config.hf_config
    vocabulary = tokenizer.get_vocab()
    if IMAGE not in vocabulary or VIDEO not in vocabulary:
        raise ValueError(
            f"METok cannot serve {model_config.model} with the tokenizer of {model_config.tokenizer}: it needs the "
            "checkpoint's config.json beside it."
        )
    config.image_token_index, config.video_token_index = vocabulary[IMAGE], vocabulary[VIDEO]
    rows = int(config.text_config.vocab_size)
    if max(config.image_token_index, config.video_token_index) >= rows:
        raise ValueError(
            f"METok cannot serve {model_config.model}: its vocabulary of {rows} rows has none to spare for {IMAGE} and "
            f"{VIDEO}."
        )
    check_tower(model_config.model)
