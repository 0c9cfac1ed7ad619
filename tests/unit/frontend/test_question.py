"""The question, read off prompts as real chat templates render them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer

from metok_vllm.frontend.question import TurnMarkers, fitting_markers, last_user_text, turn_markers

Turns = list[tuple[str, str]]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant of the user.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}"
    "{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = '<|begin_of_text|>' + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] + ' ' }}"
    "{% else %}{% set rest = messages %}{{ 'A chat between a curious user and an artificial intelligence assistant. ' }}"
    "{% endif %}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Template:
    """A template, what its tokenizer calls special, and how vLLM hands it a message's content."""

    source: str
    special: tuple[str, ...]
    parts: bool = False
    system: bool = True
    ambiguous: tuple[str, ...] = ()  # plain text that is a marker there

    def render(self, tokenizer: Any, turns: Turns) -> str:
        """As vLLM does: media in front of the text; as parts, or as placeholders in one string."""
        messages: list[dict[str, Any]] = []
        for role, text in turns:
            content: Any = text
            if self.parts:
                videos = text.count("<video>")
                text = text.replace("<video>", "").strip()
                content = [{"type": "video"}] * videos + [{"type": "text", "text": text}]
            messages.append({"role": role, "content": content})
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=self.source, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
TEMPLATES = {
    "chatml": Template(CHATML, CHATML_TOKENS),
    "qwen": Template(QWEN, CHATML_TOKENS),
    "llava-onevision": Template(LLAVA_ONEVISION, CHATML_TOKENS, parts=True),
    "llama3": Template(LLAMA3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "vicuna": Template(VICUNA, ("<s>", "</s>"), ambiguous=("USER:", "ASSISTANT:")),
    "gemma": Template(GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>")),
    "mistral": Template(MISTRAL, ("<s>", "</s>"), system=False, ambiguous=("[INST]", "[/INST]")),
}


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module", params=list(TEMPLATES))
def template(request: pytest.FixtureRequest) -> Template:
    return TEMPLATES[request.param]


def asked(tokenizer: Any, template: Template, turns: Turns) -> str:
    removed = ("<video>", "<image>", *template.special)
    return last_user_text(template.render(tokenizer, turns), turn_markers(tokenizer, template.source), removed)


QUESTIONS = [
    "What happens in this video?",
    "Which comes first: (A) the rabbit, (B) the bird?",
    "x",
    "什么动物最先出现 兔子🐇还是小鸟",
    "ما الذي يحدث في هذا الفيديو؟",
    "Qu'est-ce qui se passe à la fin ? e\u0301te\u0301",
    "👩‍👩‍👧‍👦 and 🇫🇷?",
    "What does the user say to the assistant? The system answers 'user: hello'.",
    "Is '[{'type': 'text', 'text': 'a'}]' a list?",
    "Do im_start, <|im_begin|>, <user>, <|eot|> and {{ message }} mean anything?",
    "first reply last \u2460 \u2461reply\u2461",
    "user",
    "assistant",
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_about_one_video(tokenizer: Any, template: Template, question: str) -> None:
    assert asked(tokenizer, template, [("user", f"<video>\n{question}")]) == question


def test_turns_before_the_last_are_not_the_question(tokenizer: Any, template: Template) -> None:
    turns = [
        ("user", "<video>\nWhat is this?"),
        ("assistant", "A video about what a user asked."),
        ("user", "And then?"),
        ("assistant", "Then it ends."),
        ("user", "Who was the user?"),
    ]
    assert asked(tokenizer, template, turns) == "Who was the user?"


def test_the_system_prompt_is_not_the_question(tokenizer: Any, template: Template) -> None:
    if not template.system:
        pytest.skip("this template takes no system prompt")
    turns = [("system", "Answer the user in one word."), ("user", "<video>\nWhat is this?")]
    assert asked(tokenizer, template, turns) == "What is this?"


def test_text_around_placeholders(tokenizer: Any, template: Template) -> None:
    if template.parts:
        pytest.skip("this template puts media first")
    question = "Compare <video> with\n<video>\nand <image>, please."
    assert asked(tokenizer, template, [("user", question)]) == "Compare with and , please."


def test_a_question_of_several_lines(tokenizer: Any, template: Template) -> None:
    question = "Which one?\n\n(A)\tthe rabbit\n(B)  the bird\n"
    assert asked(tokenizer, template, [("user", f"<video>\n{question}")]) == "Which one? (A) the rabbit (B) the bird"


def test_no_question_at_all(tokenizer: Any, template: Template) -> None:
    assert asked(tokenizer, template, [("user", "<video>")]) == ""


def test_the_markers_enclose_the_users_text(tokenizer: Any, template: Template) -> None:
    markers = turn_markers(tokenizer, template.source)
    prompt = template.render(tokenizer, [("user", "A question"), ("assistant", "A reply"), ("user", "Another one")])
    for text in ("A question", "Another one"):
        assert f"{markers.start}{text}{markers.end}" in prompt
    assert markers.start.strip()
    assert markers.end.strip()


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


@given(questions=st.lists(words, min_size=1, max_size=3), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text(tokenizer: Any, questions: list[str], name: str) -> None:
    template = TEMPLATES[name]
    turns: Turns = []
    for question in questions:
        turns += [("user", question), ("assistant", "I see.")]
    expected = " ".join(questions[-1].split())
    if any(piece in " ".join(questions) for piece in ("<video>", "<image>", *template.special, *template.ambiguous)):
        return
    assert asked(tokenizer, template, turns[:-1]) == expected


def test_what_follows_the_users_turn_is_not_the_question(tokenizer: Any) -> None:
    """A tool's answer, or a reply that the client began."""
    template = TEMPLATES["chatml"]
    turns = [("user", "<video>\nWhen?"), ("assistant", "I look it up."), ("tool", "At noon.")]
    assert asked(tokenizer, template, turns) == "When?"
    prompt = template.render(tokenizer, [("user", "<video>\nWhen?")]) + "It happens at"
    assert last_user_text(prompt, turn_markers(tokenizer, CHATML), ("<video>", *CHATML_TOKENS)) == "When?"


class WithoutTemplate:
    """A base model's tokenizer."""

    chat_template = None

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("tokenizer.chat_template is not set")


def test_what_is_no_template_is_said(tokenizer: Any) -> None:
    with pytest.raises(TemplateSyntaxError):
        turn_markers(tokenizer, "{% for message in messages %}")


def test_which_template_has_rendered_a_prompt() -> None:
    first, second = TurnMarkers("<|user|>\n", "<|end|>"), TurnMarkers("### user: ", "\n###")
    assert fitting_markers("<|user|>\nWhy?<|end|>", (first, second)) == first
    assert fitting_markers("### user: Why?\n### assistant: ", (first, second)) == second
    assert fitting_markers("Why?", (first, second)) is None
    assert fitting_markers("Why?", ()) is None


@pytest.mark.parametrize(
    "source", [None, "{{ raise_exception('no') }}", "{{ messages[0] }}", "always the same", "{{ 1 / 0 }}"]
)
def test_without_a_usable_template_the_prompt_is_the_question(tokenizer: Any, source: str | None) -> None:
    markers = turn_markers(WithoutTemplate() if source is None else tokenizer, source)
    assert last_user_text("<video>\nWhat is\n this? ", markers, ("<video>",)) == "What is this?"


def test_the_tokenizers_own_template(tokenizer: Any) -> None:
    class Owner:
        chat_template = CHATML

        def apply_chat_template(self, messages: Any, chat_template: Any, **kwargs: Any) -> Any:
            return tokenizer.apply_chat_template(messages, chat_template=chat_template or self.chat_template, **kwargs)

    assert turn_markers(Owner()) == TurnMarkers("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_that_the_template_did_not_render() -> None:
    markers = TurnMarkers("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert last_user_text("<video> just text", markers, ("<video>",)) == "just text"
    assert last_user_text("", markers, ()) == ""


@given(words)
def test_through_a_real_tokenizer(tokenizer: Any, question: str) -> None:
    """Only token ids are left where the question is read; special ones are removed as such."""
    special = tuple(sorted({"<video>", "<image>", *tokenizer.all_special_tokens}, key=len, reverse=True))
    if any(piece in question for piece in special):
        return
    prompt = TEMPLATES["chatml"].render(tokenizer, [("user", f"<video>\n{question}")])
    decoded = tokenizer.decode(tokenizer.encode(prompt), skip_special_tokens=False)
    assert last_user_text(decoded, turn_markers(tokenizer, CHATML), special) == " ".join(question.split())
