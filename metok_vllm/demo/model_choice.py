"""Which checkpoint the demo serves: the user's, the trained one that comes along,
or a random one built on the spot.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from metok_vllm.demo.errors import DemoError

HERE = Path(__file__).parent
TRAINED = HERE / "model"
"""A trained model, where this installation has one."""
CLIP = HERE / "assets" / "big-buck-bunny-30s.mp4"
SAMPLE = HERE / "assets" / "toy-world.jsonl"
"""Questions about a generated clip beside it, of the world that the trained model knows."""
QUESTION = "What happens in this video, and who is in it?"

PROFILED_FRAMES = 32
"""The server has room for a video of this many frames by itself."""
_TOKENS_PER_FRAME = 210  # at most, of the published checkpoints without METok: 27 x 27 patches pooled by 2, newlines
_LABEL = 12  # tokens that number a frame, and more than enough
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class DemoModel:
    """A checkpoint and how to serve it."""

    checkpoint: str  # folder, or name on the Hugging Face hub
    flags: tuple[str, ...] = ()  # for `vllm serve`, beside those that every model gets
    kv_gib: int = 4  # KV cache on a CPU
    note: str = ""  # what the user must know before reading the answers
    frames: int = PROFILED_FRAMES  # sampled from a video where the user states no number
    sample: Path | None = None  # questions that it can answer, where some come along

    @property
    def local(self) -> bool:
        """Whether nothing needs to be downloaded."""
        return Path(self.checkpoint).is_dir()

    def step_tokens(self, frames: int) -> int | None:
        """Tokens that a step must hold for a video of `frames` frames with METok off;
        None if any server's do.

        vLLM refuses a video that has more tokens than a step may have.
        """
        if frames <= PROFILED_FRAMES:
            return None
        return max(8192, frames * self._tokens_per_frame() + 1024)

    def _tokens_per_frame(self) -> int:
        try:
            vision = json.loads((Path(self.checkpoint) / "config.json").read_text())["vision_config"]
            side = _side(vision["image_size"]) // _side(vision["patch_size"])
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
            return _TOKENS_PER_FRAME
        return int((-(-side // 2)) ** 2) + _LABEL


def _side(stated: int | list[int]) -> int:
    """Of a square that a config states by its side, or by both."""
    return int(stated[0] if isinstance(stated, list) else stated)


def choose_model(stated: str | None, out: Path) -> DemoModel:
    """The model to serve; `out` is where a random stand-in is built.

    Raises:
        DemoError: the stated folder does not exist or holds no checkpoint.
    """
    if stated is not None:
        return _stated(stated)
    if (TRAINED / "config.json").is_file():
        return DemoModel(
            str(TRAINED),
            flags=("--dtype", "float32", "--max-model-len", "4096"),
            kv_gib=1,
            frames=64,
            sample=SAMPLE,
            note="The model is a small one that was trained on generated videos of a toy world: "
            "it answers questions about those, and cannot know what a real clip shows.",
        )
    from metok_vllm.demo.checkpoint import build_checkpoint

    folder = build_checkpoint(out / "random-model")
    return DemoModel(
        str(folder),
        flags=("--dtype", "float32", "--max-model-len", "32768"),
        kv_gib=1,
        note="A small model with RANDOM weights stands in, so the words of its answers mean nothing. "
        "Everything else is real: the server, the video, the events, the tokens and the memory.",
    )


def _stated(stated: str) -> DemoModel:
    folder = Path(stated).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DemoError(f"The folder {stated} holds no checkpoint: it has no config.json.")
        return DemoModel(str(folder))
    if folder.exists():
        raise DemoError(f"The model {stated} is a file; name the folder of a checkpoint.")
    if not _HUB_NAME.fullmatch(stated):
        raise DemoError(f"There is no model folder {stated}.")
    return DemoModel(stated)
