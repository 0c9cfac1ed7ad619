"""`--plugin metok` on vLLM's command line.

vLLM loads general plugins while it builds its option parser, before it reads `sys.argv`, and offers a plugin
no way to add an option to that parser. So the option is taken off `sys.argv` here and what it stands for is
put in its place, as options that vLLM has: the architecture override and the middleware that adds METok's
routes (and, by environment variables, the media connector and room for its videos). Everything else METok
needs is set when the configuration is built (`frontend/startup.py`). This is the one place that touches the
command line; it goes once vLLM has a hook for plugin options.

The model's name decides the architecture, and only vLLM's own parser can tell it from the value of some
option, or find it in the file that ``--config`` names. So the rest of the command line is read with that
parser; what it refuses or answers by itself (``--help``), it refuses and answers here as it would have.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from metok_vllm.contract.advice import tell_processes
from metok_vllm.media.request_limits import leave_room
from metok_vllm.models.registry import metok_architecture

OPTION, NAME = "--plugin", "metok"
MIDDLEWARE = "metok_vllm.serve.routes.MetokRoutes"
COMMANDS = ("serve", "run-batch")
OVERRIDES = "--hf-overrides"
ADDITIONAL = "--additional-config"
CONNECTOR_VARIABLE, CONNECTOR = "VLLM_MEDIA_CONNECTOR", "metok"


def apply_plugin_option() -> bool:
    """Rewrite `sys.argv` in place where it asks for METok, choose its media connector and leave room for its
    videos; change nothing everywhere else.

    Returns:
        Whether it asked.

    Raises:
        SystemExit: METok cannot serve the model, or is given settings but not asked for; vLLM then does not
            start.
    """
    try:
        arguments, options = _read(sys.argv)
        if options is not None:
            # vLLM has no options for these. This process and those that it starts serve nothing but METok; an
            # operator's wish holds.
            os.environ.setdefault(CONNECTOR_VARIABLE, CONNECTOR)
            leave_room(options.media_io_kwargs)
            tell_processes(options.trust_request_mm_kwargs)
    except ValueError as error:
        raise SystemExit(f"vllm: error: {error}") from None
    sys.argv[:] = arguments
    return options is not None


def rewritten(argv: Sequence[str]) -> list[str]:
    """The command line without `--plugin metok`, and with the options that it stands for.

    Raises:
        ValueError, SystemExit: as `_read`.
    """
    return _read(argv)[0]


def _read(argv: Sequence[str]) -> tuple[list[str], Namespace | None]:
    """The command line as `rewritten`, and what vLLM reads in it where it asks for METok, else None.

    Raises:
        ValueError: the model on the command line is not one that METok can serve, its config cannot be read,
            or there are settings for METok without the option.
        SystemExit: vLLM's parser refuses the command line.
    """
    arguments = list(argv)
    command = arguments[1] if len(arguments) > 1 else ""
    if command not in COMMANDS:
        return arguments, None
    if not _take_option(arguments):
        _refuse_lonely_settings(arguments)
        return arguments, None
    options = _parsed(arguments[1:])
    overrides = options.hf_overrides
    if not isinstance(overrides, dict):
        raise ValueError(f"{OVERRIDES} takes a JSON object, not {overrides!r}.")
    model: str = getattr(options, "model_tag", None) or options.model
    architecture = metok_architecture(_architectures(options.hf_config_path or model, options.revision), model)
    # One JSON object with all that the user gave, in whatever form: of several forms vLLM lets one replace
    # the others.
    overrides = {**overrides, "architectures": [architecture]}
    arguments = [*_without_overrides(arguments), OVERRIDES, json.dumps(overrides)]
    if command == "serve":
        arguments += ["--middleware", MIDDLEWARE]
    return arguments, options


def _refuse_lonely_settings(arguments: Sequence[str]) -> None:
    """vLLM ignores what it does not know in its additional config,
    so settings for METok would be ignored without a word.
    """
    if any("METok" in argument for argument in arguments):
        return  # asked for by its architecture, as `metok_vllm.enable` does it
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, is_joined, joined = option.partition("=")
        given = joined if is_joined else value
        if (name.replace("_", "-") == ADDITIONAL and '"metok"' in given) or name == f"{ADDITIONAL}.metok":
            raise ValueError(f"{ADDITIONAL} has settings for METok, which is off: add {OPTION} {NAME}.")


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


def _parsed(arguments: list[str]) -> Namespace:
    """What vLLM reads in a command line, from the command on.

    Its parser is built the way its `main` builds it.
    """
    from vllm.entrypoints.cli.run_batch import RunBatchSubcommand
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")  # type: ignore[no-untyped-call]
    commands = parser.add_subparsers()
    command = ServeSubcommand() if arguments[0] == "serve" else RunBatchSubcommand()
    command.subparser_init(commands)
    options: Namespace = parser.parse_args(arguments)
    return options


def _without_overrides(arguments: Sequence[str]) -> list[str]:
    """The command line without `--hf-overrides`, in all its forms: underscores, dotted keys, `=`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        option, is_joined, _ = argument.partition("=")
        if skip:
            skip = False
        elif option.split(".")[0].replace("_", "-") == OVERRIDES:
            skip = not is_joined
        else:
            kept.append(argument)
    return kept


def _architectures(model: str, revision: str | None) -> list[str] | None:
    """What a checkpoint's config names.

    Raises:
        ValueError: the config cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"METok cannot read the config of {model}: {reason}") from None
    if not config:
        raise ValueError(f"METok cannot read the config of {model}: there is no config.json.")
    return config.get("architectures")
