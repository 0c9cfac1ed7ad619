"""The model that comes along: what it is on disk,
and that transformers and stock vLLM load it unchanged and answer right.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from metok_vllm.demo.model_choice import SAMPLE, TRAINED
from metok_vllm.demo.questions import load_questions
from metok_vllm.demo.video import load_video
from tests.support.demo.stock_vllm import run_stock

MOST_BYTES = 15 * 2**20
PROGRAM = """
import json, sys
import numpy as np
from vllm import LLM, SamplingParams

def main(folder, video, prompts):
    llm = LLM(folder, dtype="float32", max_model_len=4096, block_size=32, enforce_eager=True)
    frames = np.load(video)
    params = SamplingParams(temperature=0, max_tokens=48)
    for prompt in prompts:
        request = {"prompt_token_ids": prompt, "multi_modal_data": {"video": frames}}
        print("RESULT", json.dumps(llm.generate(request, params, use_tqdm=False)[0].outputs[0].text))

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
"""


def test_it_is_small_and_has_a_card() -> None:
    files = [f for f in TRAINED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < MOST_BYTES
    assert (TRAINED / "metok_aligner" / "config.json").is_file()
    card = (TRAINED / "README.md").read_text()
    assert "## How it was trained" in card
    assert "## What it cannot do" in card
    config = json.loads((TRAINED / "config.json").read_text())
    assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
    text = config["text_config"]
    assert text["num_hidden_layers"] >= 12
    assert text["num_key_value_heads"] < text["num_attention_heads"]


def test_transformers_and_stock_vllm_answer_the_sample(tmp_path: Any) -> None:
    pytest.importorskip("vllm")
    import numpy as np
    from transformers import AutoProcessor, LlavaOnevisionForConditionalGeneration

    path, questions = load_questions(SAMPLE, None)
    frames = load_video(path, 64).thumbnails
    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(TRAINED, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(TRAINED)
    prompts, texts = [], []
    for question in questions:
        content = [{"type": "video"}, {"type": "text", "text": question.prompt}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompts.append(processor.tokenizer(chat).input_ids)
        inputs = processor(text=chat, videos=[frames], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(out, skip_special_tokens=True))
    np.save(tmp_path / "frames.npy", frames)
    done = run_stock(PROGRAM, str(TRAINED), str(tmp_path / "frames.npy"), json.dumps(prompts))
    served = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert served == texts, done.stderr[-3000:]
    right = [text == question.answer for text, question in zip(texts, questions, strict=True)]
    assert sum(right) >= 0.8 * len(right)
