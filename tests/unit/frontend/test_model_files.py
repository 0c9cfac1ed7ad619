"""The main model's tokenizer, processor and chat template: one sentence at start; and the question is found
through the template that is in force.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from metok_vllm.frontend.command_line import rewritten
from metok_vllm.frontend.model_files import SETTINGS
from tests.support.oracle.samples import scene_video
from tests.unit.conftest import METOK
from tests.unit.frontend.test_startup import refusal

Make = Callable[..., Any]

OTHER_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'video' %}<video>{% elif p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
WARNING = "METok: no chat template shows where a user's question stands"


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "model")


def write(*names: str, content: bytes = b"{") -> Callable[[Path], None]:
    return lambda model: [(model / name).write_bytes(content) for name in names] and None


def remove(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names] and None


TOKENIZER, PROCESSOR = "METok: the tokenizer of {} cannot be loaded: ", "METok: the processor of {} cannot be loaded: "
ALL_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer": (remove("tokenizer.json"), TOKENIZER),
    "no tokenizer at all": (remove("tokenizer.json", "tokenizer_config.json"), TOKENIZER),
    "a broken tokenizer": (write("tokenizer.json"), TOKENIZER),
    "no processor": (remove(*ALL_PROCESSORS), PROCESSOR),
    "a template that is no text": (write("chat_template.jinja", content=b"\xff\xfe"), ""),
    "a template that is none": (
        write("chat_template.jinja", content=b"{% for m in messages %}"),
        "METok: the chat template cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint(make_config: Make, model: Path, fault: str) -> None:
    damage, sentence = FAULTS[fault]
    damage(model)
    said = refusal(make_config, model=str(model))
    assert said.startswith(sentence.format(model))
    assert said.endswith(".")


@pytest.mark.parametrize("name", [*SETTINGS, "config.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_settings_file_that_cannot_be_read(model: Path, name: str, content: bytes) -> None:
    """On the command line; vLLM reads some of them before it asks METok."""
    argv = ["vllm", "serve", str(model), "--plugin", "metok"]
    assert rewritten(argv) != argv
    (model / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^METok cannot read ") as error:
        rewritten(argv)
    assert str(model) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a b", 'it\'s "quoted"', "\u00fc\u6f22", "-plugin", "$HOME;{}"])
def test_odd_names_of_a_folder(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = model.rename(model.parent / name)
    monkeypatch.chdir(odd.parent)
    for argument in (str(odd), f"./{name}"):
        argv = rewritten(["vllm", "serve", argument, "--plugin", "metok"])
        assert argv[2] == argument


def test_a_name_that_is_not_utf8(model: Path) -> None:
    odd = os.fsdecode(os.fsencode(model) + b"\xff")
    model.rename(odd)
    with pytest.raises(ValueError, match="METok") as error:
        rewritten(["vllm", "serve", odd, "--plugin", "metok"])
    assert str(error.value) == f"METok cannot serve {odd!r}: its path is not UTF-8, and its weights cannot be opened."


def test_without_a_tokenizer(make_config: Make) -> None:
    assert refusal(make_config, skip_tokenizer_init=True) == (
        "METok reads the question with the model's tokenizer: remove --skip-tokenizer-init."
    )


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr("logging.Logger.warning", lambda self, text, *args, **_: said.append(text % args))
    return said


def metok_warnings(said: list[str]) -> list[str]:
    """But for the one that every model gets that nobody has calibrated."""
    return [text for text in said if text.startswith("METok") and "not calibrated" not in text]


@pytest.mark.parametrize("content", [None, b"always the same", b"{{ raise_exception('no') }}"])
def test_no_question_can_be_found(make_config: Make, model: Path, warnings: list[str], content: bytes | None) -> None:
    """A server for completions alone is right without a template; it is warned."""
    make_config(model=str(model))
    assert metok_warnings(warnings) == []
    path = model / "chat_template.jinja"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    other = shutil.copytree(model, model.parent / "other")  # vLLM keeps what it has loaded by its name
    make_config(model=str(other))
    (said,) = metok_warnings(warnings)
    assert said.startswith(WARNING)


@pytest.mark.parametrize("what", ["no such file", "no template"])
def test_a_server_template_that_cannot_be_read(make_config: Make, tmp_path: Path, what: str) -> None:
    path = tmp_path / "template.jinja"
    if what == "no template":
        path.write_text("{% for m in messages %}")
    sentence = refusal(make_config, additional_config={"metok": {"chat_template": str(path)}})
    assert sentence.startswith("METok: the chat template cannot be loaded: ")


# --- the places of the items ---


@pytest.mark.parametrize("has_settings", [True, False])
def test_a_prompt_that_lost_a_video(make_config: Make, has_settings: bool) -> None:
    """By `truncate_prompt_tokens`. vLLM meets it with an assertion, which METok does not rely on."""
    made = processor(make_config)
    frames = scene_video(1, 5)
    kwargs = {} if has_settings else {"metok": "off"}

    def apply(prompt: str, videos: int) -> Any:
        ids = made.info.get_tokenizer().encode(prompt)
        items = made.info.parse_mm_data({"video": [frames] * videos})
        return made.apply(ProcessorInputs(ids, items, {}, hf_processor_mm_kwargs=kwargs), TimingContext())

    assert len(apply("<video> and <video> Why?", 2)["mm_placeholders"]["video"]) == 2
    for prompt, videos in (("Why?", 1), ("<video> and Why?", 2)):
        with pytest.raises(ValueError, match="METok") as error:
            apply(prompt, videos)
        assert str(error.value) == "METok: the prompt has lost the place of a video or an image; do not truncate it."


# --- the question ---


def processor(make_config: Make, **settings: Any) -> Any:
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = make_config(additional_config={"metok": {"status_shows_questions": True, **settings}})
    assert config.model_config.architecture == METOK
    return MULTIMODAL_REGISTRY.create_processor(config.model_config)


CONVERSATION = [
    {"role": "system", "content": "Be terse."},
    {"role": "user", "content": "Tell me about elephants."},
    {"role": "assistant", "content": "They are big."},
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What was the digit?"}]},
]


def question(processor: Any, **kwargs: Any) -> str:
    """What METok takes for the question of `CONVERSATION`, rendered as vLLM's server renders it."""
    from vllm.renderers.hf import safe_apply_chat_template

    model_config = processor.info.ctx.model_config
    tokenizer = processor.info.get_tokenizer()
    prompt = safe_apply_chat_template(
        model_config, tokenizer, CONVERSATION, **{"add_generation_prompt": True, "tokenize": True, **kwargs}
    )
    return str(processor._question(prompt))


@pytest.mark.parametrize("given", ["file", "text"])
def test_the_servers_template_is_read(make_config: Make, tmp_path: Path, warnings: list[str], given: str) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(OTHER_TEMPLATE)
    made = processor(make_config, chat_template=str(path) if given == "file" else OTHER_TEMPLATE)
    assert question(made, chat_template=OTHER_TEMPLATE) == "What was the digit?"
    assert metok_warnings(warnings) == []


def test_another_template_is_said_once(make_config: Make, warnings: list[str]) -> None:
    """That of a request, or of `LLM.chat`: METok cannot know it."""
    made = processor(make_config)
    assert question(made) == "What was the digit?"
    assert metok_warnings(warnings) == []
    for _ in range(2):
        assert "elephants" in question(made, chat_template=OTHER_TEMPLATE)
        (said,) = metok_warnings(warnings)
        assert said.startswith("METok: a prompt was not rendered with this server's chat template")


def test_a_request_with_tools(make_config: Make, model: Path, warnings: list[str]) -> None:
    """vLLM renders it with the tokenizer's template, and all others with the processor's."""
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": OTHER_TEMPLATE}))
    usual = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    parts = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(parts | {"chat_template": usual}))

    from vllm.multimodal import MULTIMODAL_REGISTRY

    made = MULTIMODAL_REGISTRY.create_processor(make_config(model=str(model)).model_config)
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
    assert len(made._markers) == 2, "the templates must differ for this test to mean anything"  # type: ignore[attr-defined]
    assert question(made) == question(made, tools=[tool]) == "What was the digit?"
    assert metok_warnings(warnings) == []
