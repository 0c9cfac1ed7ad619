"""Whatever is wrong with a dual tower's folder is one sentence at start, which names what is at fault."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metok_vllm.demo.checkpoint import build_checkpoint
from metok_vllm.frontend.aligner_choice import resolve_aligner
from metok_vllm.frontend.aligner_files import check_aligner
from metok_vllm.frontend.aligner_inputs import FOLDER
from metok_vllm.worker.dual_tower import DualTower

Break = Callable[[Path], Any]
LOADED = "METok: the aligner {} cannot be loaded: "


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("towers")
    return {kind: build_checkpoint(folder / kind, layers=4, aligner=kind) / FOLDER for kind in ("siglip", "clip")}  # type: ignore[arg-type]


@pytest.fixture
def tower(towers: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(towers["siglip"], tmp_path / FOLDER)


def refusal(tower: Path) -> str:
    with pytest.raises(ValueError, match="METok") as error:
        check_aligner(str(tower))
    said = str(error.value)
    assert "\n" not in said
    assert said.endswith(".")
    assert str(tower) in said
    return said.removeprefix(LOADED.format(tower))


def edit(name: str, *keys: str, value: Any) -> Break:
    """Set an entry of a JSON file."""

    def change(tower: Path) -> None:
        content = json.loads((tower / name).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (tower / name).write_text(json.dumps(content))

    return change


def write(name: str, content: bytes) -> Break:
    return lambda tower: (tower / name).write_bytes(content)


def remove(*names: str) -> Break:
    return lambda tower: [(tower / name).unlink() for name in names]


def header(tower: Path) -> tuple[dict[str, Any], bytes]:
    content = (tower / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rename_tensor(tower: Path) -> None:
    entries, data = header(tower)
    entries["other"] = entries.pop("logit_scale")
    written = json.dumps(entries).encode()
    (tower / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + data)


def cut(keep: float) -> Break:
    def shorten(tower: Path) -> None:
        content = (tower / "model.safetensors").read_bytes()
        (tower / "model.safetensors").write_bytes(content[: int(len(content) * keep)])

    return shorten


def sharded(tower: Path, missing: bool = False) -> None:
    names = [name for name in header(tower)[0] if name != "__metadata__"]
    (tower / "model.safetensors").rename(tower / "model-00001-of-00002.safetensors")
    where = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    if missing:
        where[names[0]] = "model-00002-of-00002.safetensors"
    (tower / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def pickled(tower: Path) -> None:
    (tower / "model.safetensors").unlink()
    torch.save({}, tower / "pytorch_model.bin")


SIDE = ("vision_config", "image_size")
FAULTS: dict[str, tuple[Break, str]] = {
    "no config": (remove("config.json"), "config.json: "),
    "config is no JSON": (write("config.json", b"{"), "config.json: "),
    "config is a list": (write("config.json", b"[]"), "config.json: "),
    "config is not text": (write("config.json", b"\xff\xfe{}"), "config.json: "),
    "config of no type": (write("config.json", b"{}"), "config.json: "),
    "a wrong type in it": (edit("config.json", "text_config", "hidden_size", value="x"), "config.json: "),
    "heads that do not fit": (edit("config.json", "vision_config", "num_attention_heads", value=7), "config.json: "),
    "patches above the image": (
        edit("config.json", "vision_config", "patch_size", value=96),
        "config.json: image_size 48 does not fit patch_size 96.",
    ),
    "no image": (edit("config.json", *SIDE, value=0), "config.json: image_size 0 does not fit patch_size 12."),
    "towers of two widths": (
        edit("config.json", "text_config", "projection_size", value=32),
        "config.json: its images come out in 64 dimensions and its texts in 32.",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer: "),
    "no tokenizer at all": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer: "),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), "tokenizer: "),
    "tokenizer of another model": (
        edit("config.json", "text_config", "vocab_size", value=10),
        "weights: text_model.embeddings.token_embedding.weight has the shape [384, 64], and config.json asks for [10, 64].",
    ),
    "no preprocessor": (remove("preprocessor_config.json"), "preprocessor_config.json: "),
    "preprocessor is no JSON": (write("preprocessor_config.json", b"x"), "preprocessor_config.json: "),
    "frames of another size": (
        edit("preprocessor_config.json", "size", value={"height": 30, "width": 40}),
        "preprocessor_config.json: it makes frames of 40 x 30 pixels, and config.json takes 48 x 48.",
    ),
    "no weights": (remove("model.safetensors"), "weights: there is no model.safetensors in it."),
    "weights without a byte": (
        write("model.safetensors", b""),
        "weights: model.safetensors is no whole safetensors file: ",
    ),
    "weights are something else": (
        write("model.safetensors", b"x" * 500),
        "weights: model.safetensors is no whole safetensors file: ",
    ),
    "half of the weights": (cut(0.5), "weights: model.safetensors is no whole safetensors file: "),
    "all but the last byte": (cut(0.999999), "weights: model.safetensors is no whole safetensors file: "),
    "one tensor less": (rename_tensor, "weights: logit_scale is missing."),
    "pickled weights": (
        pickled,
        "weights: its weights are pickled (pytorch_model.bin), which can run code; convert them to model.safetensors.",
    ),
    "a missing shard": (
        lambda tower: sharded(tower, missing=True),
        "weights: model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names.",
    ),
    "an index that is none": (
        lambda tower: (sharded(tower), (tower / "model.safetensors.index.json").write_text('{"a": 1}')),
        "weights: model.safetensors.index.json cannot be read: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_tower(tower: Path, fault: str) -> None:
    check_aligner(str(tower))
    damage, sentence = FAULTS[fault]
    damage(tower)
    assert refusal(tower).startswith(sentence)


def test_weights_in_several_files(tower: Path) -> None:
    sharded(tower)
    check_aligner(str(tower))


@pytest.mark.parametrize(
    "names", [["tokenizer.json"], ["tokenizer_config.json"], ["tokenizer.json", "tokenizer_config.json"]]
)
def test_a_clip_without_its_tokenizer(towers: dict[str, Path], tmp_path: Path, names: list[str]) -> None:
    """Without both files transformers makes a tokenizer that knows no word."""
    tower = shutil.copytree(towers["clip"], tmp_path / FOLDER)
    check_aligner(str(tower))
    remove(*names)(tower)
    assert refusal(tower).startswith("tokenizer: ")


def test_ids_beyond_the_vocabulary(tower: Path) -> None:
    content = json.loads((tower / "tokenizer.json").read_text())
    (end,) = [token for token in content["added_tokens"] if token["content"] == "</s>"]
    content["post_processor"]["special_tokens"]["</s>"]["ids"] = [end["id"] + 100]
    (tower / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(tower) == "tokenizer: it gives ids up to 483, and config.json has 384."


@pytest.mark.parametrize(("kind", "what"), [("file", "a file"), ("link", "a broken link")])
def test_what_is_no_folder(tmp_path: Path, kind: str, what: str) -> None:
    place = tmp_path / FOLDER
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to(tmp_path / "gone")
    sentence = f"METok: the aligner {place} is {what}; it must be a folder with a SigLIP or CLIP checkpoint."
    for ask in (lambda: check_aligner(str(place)), lambda: resolve_aligner(str(tmp_path), "auto", None)):
        with pytest.raises(ValueError, match="METok") as error:
            ask()
        assert str(error.value) == sentence


CODE = "raise SystemExit('code in the folder was run')"
AUTO_MAP = {
    "config.json": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    "preprocessor_config.json": {"AutoImageProcessor": "evil.Images"},
}


def test_code_in_the_folder_is_not_run(tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anybody asked whether to run it, which is what transformers does at a terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question at the terminal"))
    (tower / "evil.py").write_text(CODE)
    for name, auto_map in AUTO_MAP.items():
        edit(name, "auto_map", value=auto_map)(tower)
    check_aligner(str(tower))
    DualTower(str(tower), torch.float32, torch.device("cpu"))
    edit("config.json", "model_type", value="of_its_own")(tower)
    assert refusal(tower).startswith("config.json: ")


def test_the_worker_loads_all_or_says_what_is_missing(tower: Path) -> None:
    """Of a name on the hub, only the worker sees the weights."""
    rename_tensor(tower)
    with pytest.raises(ValueError, match="METok") as error:
        DualTower(str(tower), torch.float32, torch.device("cpu"))
    assert str(error.value) == LOADED.format(tower) + "its weights have no logit_scale."
    cut(0.5)(tower)
    with pytest.raises(ValueError, match=r"^METok: the aligner .* cannot be loaded: .*\.$"):
        DualTower(str(tower), torch.float32, torch.device("cpu"))
