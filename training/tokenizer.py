"""The tokenizer: byte-level BPE, so any text can be encoded,
trained so that the world's words are one token each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.questions import KINDS, questions
from training.seeds import seed_of
from training.world import COLOURS, SCENES, SHAPES, WORDS, make_video

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<image>", "<video>"
SPECIAL = (PAD, START, END, IMAGE, VIDEO)
VOCAB = 640
# a line break sticks to an option's letter ("\nA."); words keep their leading blank, digits stand alone
_SPLIT = r"\n[A-Z]\.| ?\p{L}+| ?\p{N}|[ ]?[^\s\p{L}\p{N}]+|\s+"


def corpus(videos: int = 800) -> Iterator[str]:
    """Prompts and answers of the first training videos."""
    for index in range(videos):
        video = make_video(seed_of("train", index))
        for q in questions(video, 12, random.Random(index), KINDS):
            yield f"user \n{q.prompt}"
            yield f"assistant\n{q.answer}"
            yield f"{q.answer} {q.answer.capitalize()}"
    yield from ("system assistant user",) * 50
    for word in (*COLOURS, *SHAPES, *SCENES, *WORDS):  # each alone, as an answer begins, and behind another word
        yield from (word, f"a {word}") * 20


def train_tokenizer(texts: Iterator[str] | None = None, vocab: int = VOCAB) -> Tokenizer:
    """Train on ``texts`` (default :func:`corpus`); ids of the special tokens come first, padding is 0."""
    tok = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(corpus() if texts is None else texts, trainer)
    return tok


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run folder; trained and saved there on first use."""
    path = folder / "tokenizer.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))
