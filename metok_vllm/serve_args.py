"""`--plugin metok` on vLLM's command line.

vLLM loads general plugins while it builds its option parser, before it reads `sys.argv`, and offers a plugin no way to add an
option to that parser. So the option is taken off `sys.argv` here and what it stands for is put in its place, as options that
vLLM has: the architecture override and the middleware that adds METok's routes. Everything else METok needs is set when the
configuration is built (`engine/checks.py`). This is the one place that touches the command line; it goes once vLLM has a hook for
plugin options.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metok_vllm.models.registry import SUPPORTED, metok_architecture

OPTION, NAME = "--plugin", "metok"
MIDDLEWARE = "metok_vllm.serve.routes.MetokRoutes"
COMMANDS = ("serve", "run-batch")


def apply_plugin_option() -> None:
    """Rewrite `sys.argv` in place where it asks for METok; leave it alone everywhere else.

    Raises:
        SystemExit: METok cannot serve the model; vLLM then does not start, and the message names what it can serve.
    """
    try:
        sys.argv[:] = rewritten(sys.argv)
    except ValueError as error:
        raise SystemExit(f"vllm: error: {error}") from None


def rewritten(argv: Sequence[str]) -> list[str]:
    """The command line without `--plugin metok`, and with the options that it stands for.

    Raises:
        ValueError: the model on the command line is not one that METok can serve.
    """
    arguments = list(argv)
    command = arguments[1] if len(arguments) > 1 else ""
    if command not in COMMANDS or not _take_option(arguments):
        return list(argv)
    model = _model(arguments)
    architecture = SUPPORTED[0].metok if model is None else metok_architecture(_architectures(model), model)
    _merge_json(arguments, "--hf-overrides", {"architectures": [architecture]})
    if command == "serve":
        arguments += ["--middleware", MIDDLEWARE]
    return arguments


def _take_option(arguments: list[str]) -> bool:
    """Remove every `--plugin metok` and `--plugin=metok`; whether there was one."""
    found = False
    i = 2
    while i < len(arguments):
        if arguments[i : i + 2] == [OPTION, NAME]:
            del arguments[i : i + 2]
            found = True
        elif arguments[i] == f"{OPTION}={NAME}":
            del arguments[i]
            found = True
        else:
            i += 1
    return found


def _value(arguments: Sequence[str], option: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{option}="):
            return argument.split("=", 1)[1]
    return None


def _model(arguments: Sequence[str]) -> str | None:
    """The model on the command line or in its config file; None where only vLLM's parser could tell."""
    stated = _value(arguments, "--model")
    if stated is not None:
        return stated
    if arguments[1] == "serve" and len(arguments) > 2 and not arguments[2].startswith("-"):
        return arguments[2]
    config = _value(arguments, "--config")
    if config is not None and Path(config).is_file():
        import yaml

        entries = yaml.safe_load(Path(config).read_text()) or {}
        model = entries.get("model") if isinstance(entries, dict) else None
        return str(model) if model else None
    return None


def _architectures(model: str) -> list[str] | None:
    """What a checkpoint's config names.

    Raises:
        ValueError: the config cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"METok cannot read the config of {model}: {reason}") from None
    return config.get("architectures")


def _merge_json(arguments: list[str], option: str, update: dict[str, Any]) -> None:
    """Merge `update` into an option that takes a JSON object, whatever form the user gave it in."""
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            arguments[i + 1] = _merged(arguments[i + 1], update)
            return
        if argument.startswith(f"{option}="):
            arguments[i] = f"{option}={_merged(argument.split('=', 1)[1], update)}"
            return
    if any(argument.startswith(f"{option}.") for argument in arguments):
        # vLLM gathers dotted options into one object of its own, which a second JSON object would replace.
        for key, value in update.items():
            arguments += [f"{option}.{key}", json.dumps(value)]
        return
    arguments += [option, json.dumps(update)]


def _merged(text: str, update: dict[str, Any]) -> str:
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        return text  # vLLM's own parser has the right message for this
    return json.dumps({**given, **update}) if isinstance(given, dict) else text
