"""Training goes on from an exported model: the inverse of :mod:`training.export`.

The repository keeps the model that came of training, not the runs. This makes a folder of runs of the model,
which ``train_lm``, ``train_aligner``, ``train_tower``, ``evaluate`` and ``export`` take like what they wrote
themselves. Usage::

    python -m training.start --out runs/start

The weights are the exported bfloat16 ones as fp32; an export at once gives the same again, bit for bit. What
an export does not carry is started anew: optimisers, steps and minutes, how well each kind is answered, and
the read-outs of stages 1 and 2. The tower's copy of the projector's last layer is the one that stage 2 left:
stage 1's own is lost.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from training.export import model_weights
from training.lm import LMConfig
from training.tower import Tower, TowerConfig
from training.train_aligner import build
from training.train_lm import STAGES, Model
from training.train_tower import Heads

SHIPPED = Path(__file__).parents[1] / "metok_vllm" / "demo" / "model"
BEGINNING = {"step": 0, "spent": 0.0}
"""Without ``optim``: the optimisers have no momenta yet."""


def tower_config(config: dict[str, Any]) -> TowerConfig:
    """The tower's shape, from the exported config; the inverse of its part of
    :func:`training.export.hf_config`.
    """
    vision = config["vision_config"]
    return TowerConfig(
        hidden=vision["hidden_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        intermediate=vision["intermediate_size"],
        patch=vision["patch_size"],
        out=config["text_config"]["hidden_size"],
    )


def lm_config(config: dict[str, Any]) -> LMConfig:
    """The language model's shape, likewise."""
    text = config["text_config"]
    return LMConfig(
        vocab=text["vocab_size"],
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
        intermediate=text["intermediate_size"],
        rope_theta=text["rope_parameters"]["rope_theta"],
        eps=text["rms_norm_eps"],
    )


@torch.no_grad()
def read_model(folder: Path) -> tuple[Tower, Model]:
    """Tower and model with an exported folder's weights, fp32.

    Raises:
        ValueError: the folder holds other tensors than :mod:`training.export` writes for its config.
    """
    config = json.loads((folder / "config.json").read_text())
    tower = Tower(tower_config(config))
    model = Model(lm_config(config), tower)
    found, own = load_file(folder / "model.safetensors"), model_weights(tower, model)
    # The names are the export's own, and what it returns are views of the parameters: filling them fills the
    # model.
    odd = sorted(found.keys() ^ own.keys())
    odd += [name for name in found.keys() & own.keys() if found[name].shape != own[name].shape]
    if odd:
        raise ValueError(f"{folder} is no model of training.export: {', '.join(odd)}")
    for name, parameter in own.items():
        parameter.copy_(found[name])
    tower.linear_2.load_state_dict(model.last.state_dict())
    return tower, model


def read_aligner(folder: Path, tower: TowerConfig) -> nn.Module:
    """The paired text/image tower with an exported folder's weights, fp32."""
    config = json.loads((folder / "config.json").read_text())
    model: nn.Module = build(config["text_config"]["vocab_size"], tower)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def read_tokenizer(folder: Path) -> Tokenizer:
    """An exported folder's tokenizer as training wrote it:
    transformers adds a post-processor that does nothing.
    """
    plain = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    return Tokenizer.from_str(json.dumps(plain))


def start(folder: Path, out: Path) -> None:
    """Write ``tower/tower.pt``, ``lm/last.pt``, ``lm/tokenizer.json`` and,
    where the model has one, ``aligner/aligner.pt``.

    Raises:
        FileExistsError: one of these is there already; nothing is written then.
        ValueError: see :func:`read_model`.
    """
    paths = [out / name for name in ("tower/tower.pt", "lm/last.pt", "lm/tokenizer.json", "aligner/aligner.pt")]
    for path in paths:
        if path.exists():
            raise FileExistsError(f"{path} is there already")
    at_tower, at_lm, at_tokenizer, at_aligner = paths
    torch.manual_seed(0)
    tower, model = read_model(folder)
    both = nn.ModuleList([tower, Heads(tower.c.out)])
    # A trained model needs no short videos first: the last stage of the curriculum.
    place = {"stage": len(STAGES) - 1, "entered": 0, "match": {}, "next": 0, "config": asdict(model.lm.c)}
    states = {
        at_tower: {"model": both.state_dict(), **BEGINNING},
        at_lm: {"model": model.state_dict(), **place, **BEGINNING},
    }
    aligner = folder / "metok_aligner"
    if aligner.exists():
        states[at_aligner] = {"model": read_aligner(aligner, tower.c).state_dict(), **BEGINNING}
    for path, state in states.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
    read_tokenizer(folder).save(str(at_tokenizer))


def main() -> None:
    """Command line."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, default=SHIPPED, help="a folder of training.export (the shipped model)")
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    try:
        start(args.model, args.out)
    except (FileExistsError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(*sorted(path for path in args.out.rglob("*") if path.is_file()), sep="\n")


if __name__ == "__main__":
    main()
