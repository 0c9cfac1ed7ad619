"""Writes docs/options.md from the settings' own descriptions.

.venv/bin/python scripts/options.py            # writes the page
.venv/bin/python scripts/options.py --check    # ends with 1 where the page is not what the settings say
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from metok_vllm.contract.settings import SERVER_ONLY, MetokSettings, RequestSettings
from metok_vllm.media.settings import VideoSettings

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"

INTRODUCTION = """\
# Options

This page is made by `scripts/options.py` from the settings' own descriptions; a test keeps it true.

| Where | How |
|---|---|
| the server | `--additional-config '{"metok": {"preset": "balanced"}}'` |
| Python | `vllm.LLM(model, **metok_vllm.enable(preset="balanced"))` |
| one request | `extra_body={"mm_processor_kwargs": {"metok": {"preset": "balanced"}}}` |
| one request, METok off | `extra_body={"mm_processor_kwargs": {"metok": "off"}}` |

- A request overrides the server, if the server was started with `--trust-request-mm-kwargs`. Without it vLLM
  answers a request that states settings with HTTP 400; all others use the server's.
- In `mm_processor_kwargs` a request may state `metok` and nothing else. With Qwen's models it may state `fps`,
  `num_frames` and `size` too, as in stock vLLM.
- An unknown key, a wrong type or an impossible value is answered with one sentence: HTTP 400, or the server
  does not start.

## Settings
"""

ALIGNERS = """\
## Aligners

| `aligner` | What tells how well a frame fits the question |
|---|---|
| `dual-tower` | the paper's: a paired image and text tower, SigLIP or CLIP |
| `embedding` | needs no second model: frames against the question, in the language model's embedding space |
| `none` | the events alone |
| `auto` | `dual-tower` if there is a tower, else `embedding`; the log says which |

A tower in the folder `metok_aligner/` inside the model's own folder wins over `aligner_model`.

## Video loader

The plugin has a video loader of its own (PyAV). Its keys go into `--media-io-kwargs '{"video": {...}}'`.
The key `video_backend` chooses another loader. vLLM samples 32 frames unless `num_frames` or `fps` says otherwise.
"""

LOADER_END = """\

A video with more tokens than vLLM's encoder cache holds is answered with 400: raise `--max-num-batched-tokens`
for long videos.

## Environment

| Variable | What it does |
|---|---|
| `METOK_KERNELS` | `auto` (the default: by device), `torch`, or `triton`: which code runs METok's tensor operations |
"""


def shown(value: Any) -> str:
    """A default as a user writes it in JSON."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def taken(schema: dict[str, Any]) -> str:
    """What a setting takes, from its JSON schema."""
    kinds = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    first = kinds[0]
    if first.get("type") == "array":
        named = [f"`{kind['const']}`" for kind in kinds if "const" in kind]
        numbers = {2: "two numbers", 3: "three numbers"}[first["maxItems"]]
        return " or ".join([numbers, *named])
    if first.get("type") == "boolean":
        return "`true`, `false`"
    if first.get("type") == "string":
        return "text"
    stated = {**first, **schema}
    # pydantic states a bound of a union under its own short name.
    lowest = next(stated[key] for key in ("minimum", "exclusiveMinimum", "ge", "gt") if key in stated)
    highest = next((stated[key] for key in ("maximum", "le") if key in stated), None)
    low = f"{'above' if {'exclusiveMinimum', 'gt'} & set(stated) else 'from'} {lowest}"
    return low if highest is None else f"{low} to {highest}"


def table() -> str:
    """The settings, one row each."""
    properties = RequestSettings.model_json_schema()["properties"]
    rows = ["| Key | Default | Takes | What it does | Where |", "|---|---|---|---|---|"]
    for name, field in RequestSettings.model_fields.items():
        where = "server, request" if name in MetokSettings.model_fields else "request"
        where = "server" if name in SERVER_ONLY else where
        rows.append(
            f"| `{name}` | {shown(field.default)} | {taken(properties[name])} | {field.description} | {where} |"
        )
    return "\n".join(rows) + "\n"


def loader_table() -> str:
    """The video loader's keys, one row each."""
    rows = ["| Key | Default | What it does |", "|---|---|---|"]
    rows += [f"| `{f.name}` | {shown(f.default)} | {f.metadata['description']} |" for f in fields(VideoSettings)]
    return "\n".join(rows) + "\n"


def page() -> str:
    """The whole page."""
    return f"{INTRODUCTION}\n{table()}\n{ALIGNERS}\n{loader_table()}{LOADER_END}"


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    if arguments == ["--check"]:
        if PAGE.read_text() == page():
            return 0
        print("docs/options.md is not what the settings say; run scripts/options.py", file=sys.stderr)
        return 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
