"""Calibration of the second witness: what it is given to see and asked, and how its answers are counted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.witness import calibrated
from benchmarks.witness.calibrated import KINDS, as_few_frames, asked_about, right, template, write_video
from benchmarks.witness.world import Prompt
from metok_vllm.demo.checkpoint import make_tokenizer
from metok_vllm.demo.questions import load_lines
from metok_vllm.frontend.question import last_user_text, turn_markers
from metok_vllm.media.decoder import decode_video
from metok_vllm.media.settings import VideoSettings


def test_a_file_loses_no_bit(tmp_path: Path) -> None:
    """A low byte of a word's embedding is a pixel."""
    frames = np.random.default_rng(1).integers(0, 256, (5, 24, 36, 3), dtype=np.uint8)
    write_video(frames, tmp_path / "a.mkv")
    read = decode_video((tmp_path / "a.mkv").read_bytes(), VideoSettings(num_frames=5))
    assert (read.frames == frames).all()


def test_the_template_writes_the_prompt() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template()
    question = "What is the code?"
    content = [{"type": "text", "text": question}, {"type": "video"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    asked = f"<|im_start|>user\n<video>\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert text == Prompt.beginning() + asked
    assert last_user_text(text, turn_markers(tokenizer), ("<video>",)) == question


def test_the_set_has_the_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[Any] = []

    def write(frames: Any, path: Path) -> None:
        painted.append((frames, path.name))
        path.write_bytes(b"there")

    monkeypatch.setattr(calibrated, "write_video", write)
    monkeypatch.setattr(calibrated.checkpoint, "paint", lambda rows, words, side: rows)
    prompt: Any = SimpleNamespace(frame=lambda caption: [len(caption)] * 8, line_end=[0])
    words = np.arange(100, dtype=np.float32)[:, None] * np.ones((1, 4), dtype=np.float32)
    sheet = calibrated.write_set(tmp_path, prompt, torch.from_numpy(words), 5, 2)
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    assert [row["kind"] for row in rows] == [*KINDS, *KINDS]
    assert [(row["question"], row["answer"]) for row in rows[:3]] == [(q.text, q.answer) for q in asked_about(0, 5)]
    assert [name for _, name in painted] == ["5-0.mkv", "5-1.mkv"] == sorted({row["video"] for row in rows})
    captions = calibrated.make_video(1, 5).captions
    assert painted[1][0].shape == (len(captions), 9, 4)
    assert painted[1][0][:, 0, 0].tolist() == [len(caption) for caption in captions]
    assert painted[1][0][:, 8].max() == 0
    assert [question for _, question in load_lines(sheet)] == [row["question"] for row in rows]
    stood = sheet.read_bytes()
    assert calibrated.write_set(tmp_path, prompt, torch.from_numpy(words), 5, 2).read_bytes() == stood
    assert len(painted) == 2, "a file that is there is left alone: finished work is known by its time"


def test_an_answer_counts_only_word_for_word(tmp_path: Path) -> None:
    answers = ["The car is red.", "The code is 123."]
    sheet = tmp_path / "questions.jsonl"
    sheet.write_text("\n".join(json.dumps({"video": "a.mkv", "question": a[:7], "answer": a}) for a in answers))
    prompt: Any = SimpleNamespace(ids=lambda text: [ord(c) for c in text])
    heard: list[Any] = []

    def chat(messages: Any, params: Any, **more: Any) -> list[Any]:
        heard.append((messages, params, more))
        said = [answers[0], "The code is 124."]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(prompt.ids(text)))]) for text in said]

    llm = SimpleNamespace(chat=chat)
    assert right(llm, prompt, sheet, {"preset": "paper"}) == [True, False]
    messages, params, more = heard[0]
    assert [one.max_tokens for one in params] == [len(a) for a in answers]
    assert all(one.temperature == 0 for one in params)
    assert more["mm_processor_kwargs"] == {"metok": {"preset": "paper"}}
    video, text = messages[1][0]["content"]
    assert video["video_url"]["url"] == (tmp_path / "a.mkv").as_uri()
    assert text["text"] == "The cod"


@pytest.mark.parametrize(("tokens", "frames"), [(144.0, 16), (288.0, 32), (3.0, 1)])
def test_fewer_frames_are_as_many_tokens(tokens: float, frames: int) -> None:
    found: Any = SimpleNamespace(measured=SimpleNamespace(tokens=tokens, tokens_stock=288.0))
    assert as_few_frames(found) == frames
