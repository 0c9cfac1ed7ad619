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
A file of ``--config`` may ask for METok as well (``plugin: metok``, `frontend/config_file.py`).
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from metok_vllm.contract.advice import tell_processes
from metok_vllm.frontend.config_file import ConfigFile, config_file
from metok_vllm.frontend.model_files import check_settings_files
from metok_vllm.frontend.programs import WORKS_WITH, Program, program_of, vllm_command
from metok_vllm.frontend.reasons import reason
from metok_vllm.frontend.shadow import refuse_shadow
from metok_vllm.log import metok_logger
from metok_vllm.media.request_limits import leave_room
from metok_vllm.models.registry import FORMAT, SUPPORTED, metok_architecture, read_own_format

OPTION, NAME = "--plugin", "metok"
MIDDLEWARE = "metok_vllm.serve.routes.MetokRoutes"
OVERRIDES = "--hf-overrides"
ADDITIONAL = "--additional-config"
CONFIG_FORMAT, TOKENIZER_MODE = "--config-format", "--tokenizer-mode"
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
            # The benchmarks have no such option: they make their requests themselves.
            tell_processes(getattr(options, "trust_request_mm_kwargs", True))
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


def was_asked() -> bool:
    """Whether this process was started by a command line that `apply_plugin_option` has rewritten."""
    names = [f'"{supported.metok}"' for supported in SUPPORTED]
    return program_of(sys.argv) is not None and any(name in word for word in sys.argv for name in names)


def _read(argv: Sequence[str]) -> tuple[list[str], Namespace | None]:
    """The command line as `rewritten`, and what vLLM reads in it where it asks for METok, else None.

    Raises:
        ValueError: the model on the command line is not one that METok can serve, its config cannot be read,
            there are settings for METok without the option, or the option where it means nothing.
        SystemExit: vLLM's parser refuses the command line.
    """
    arguments = list(argv)
    program = program_of(arguments)
    if program is None:
        _refuse_elsewhere(arguments)
        return arguments, None
    is_asked = _take_option(arguments, program.options)
    file = config_file(arguments[program.options :], strict=is_asked)
    if file is not None and file.asks_for(OPTION.removeprefix("--"), NAME):
        is_asked = True
        arguments = _with_file(arguments, program, file)
    if not is_asked:
        _refuse_lonely_settings(arguments, file)
        return arguments, None
    options: Namespace = program.parser().parse_args(arguments[program.first :])
    overrides = options.hf_overrides
    if not isinstance(overrides, dict):
        raise ValueError(f"{OVERRIDES} takes a JSON object, not {overrides!r}.")
    model: str = getattr(options, "model_tag", None) or options.model
    check_settings_files(model)
    where = options.hf_config_path or model
    config = _stated_config(where, options.revision)
    architecture = metok_architecture(config.get("architectures"), model)
    # One JSON object with all that the user gave, in whatever form: of several forms vLLM lets one replace
    # the others.
    arguments = _with_config_format(arguments, options, {**config, **overrides}, where)
    overrides = {**overrides, "architectures": [architecture]}
    arguments = [*_without(arguments, OVERRIDES), OVERRIDES, json.dumps(overrides)]
    arguments = _with_chat_template(arguments, options)
    if program.serves:
        arguments += ["--middleware", MIDDLEWARE]
    else:
        refuse_shadow(options.additional_config)
    return arguments, options


def _refuse_elsewhere(arguments: Sequence[str]) -> None:
    """Say what works, where a program of vLLM's would call the option an unknown one."""
    called = vllm_command(arguments)
    if called is not None and _take_option(list(arguments), 1):
        raise ValueError(f"{called} does not take {OPTION} {NAME}; it works with {WORKS_WITH}.")


def _with_file(arguments: Sequence[str], program: Program, file: ConfigFile) -> list[str]:
    """What a file says in place of the file, in the order in which vLLM would put it
    (vllm/utils/argparse_utils.py, `_pull_args_from_config`), but for `plugin`.
    """
    words = list(arguments[program.options :])
    del words[file.index : file.index + 2]
    stated = list(program.parser().load_config_file(file.path))
    _take_option(stated, 0)
    front: list[str] = []
    if program.first < program.options and words and not words[0].startswith("-"):
        front = [words.pop(0)]  # `vllm serve MODEL`
    if front or any(word.partition("=")[0] == "--model" for word in words):
        stated = _without(stated, "--model")  # vLLM would take the first, and the command line wins
    return [*arguments[: program.options], *front, *stated, *words]


def _with_config_format(arguments: list[str], options: Namespace, config: Mapping[str, Any], model: str) -> list[str]:
    """Let vLLM read a checkpoint that transformers cannot read (`frontend/checkpoint_format.py`).

    Raises:
        ValueError: METok cannot read it either, or another format is asked for, or an override that vLLM
            would put where nobody looks.
    """
    if read_own_format(config, model) is None:
        return arguments
    for key, value in options.hf_overrides.items():
        if isinstance(value, dict) and key not in ("text_config", "vision_config"):
            raise ValueError(f"{OVERRIDES}: {key!r} does nothing for {model}; state it inside 'text_config'.")
    for option, stated in ((CONFIG_FORMAT, options.config_format), (TOKENIZER_MODE, options.tokenizer_mode)):
        if stated not in ("auto", FORMAT):
            raise ValueError(f"METok reads the format of {model} by itself: leave {option} at auto.")
        arguments = [*_without(arguments, option), option, FORMAT]
    return arguments


def _with_chat_template(arguments: list[str], options: Namespace) -> list[str]:
    """Let METok know of the server's chat template: vLLM tells it to the HTTP server alone.

    Raises:
        ValueError: there is no such template.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import validate_chat_template

    if getattr(options, "trust_request_chat_template", False):
        metok_logger(__name__).warning(
            "METok finds the question through the server's chat template: a request that brings another one "
            "(--trust-request-chat-template) should state its question as 'query'."
        )
    template = getattr(options, "chat_template", None)
    if template is None:
        return arguments
    try:
        validate_chat_template(template)
    except (OSError, ValueError, VLLMValidationError) as error:
        raise ValueError(f"--chat-template: {reason(error)}") from None
    additional: Any = options.additional_config
    settings = additional.get("metok") or {} if isinstance(additional, Mapping) else None
    if not isinstance(settings, Mapping) or "chat_template" in settings:
        return arguments
    additional = {**additional, "metok": {**settings, "chat_template": template}}
    return [*_without(arguments, ADDITIONAL), ADDITIONAL, json.dumps(additional)]


def _refuse_lonely_settings(arguments: Sequence[str], file: ConfigFile | None) -> None:
    """vLLM ignores what it does not know in its additional config,
    so settings for METok would be ignored without a word.
    """
    if any("METok" in argument for argument in arguments):
        return  # asked for by its architecture, as `metok_vllm.enable` does it
    is_lonely = file is not None and file.has_settings(ADDITIONAL.removeprefix("--"), "metok")
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, is_joined, joined = option.partition("=")
        given = joined if is_joined else value
        is_lonely |= name.replace("_", "-") == ADDITIONAL and '"metok"' in given
        is_lonely |= name.split(".")[:2] == [ADDITIONAL, "metok"]
    if is_lonely:
        raise ValueError(f"{ADDITIONAL} has settings for METok, which is off: add {OPTION} {NAME}.")


def _take_option(arguments: list[str], start: int) -> bool:
    """Remove every `--plugin metok` and `--plugin=metok`; whether there was one."""
    found = False
    i = start
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


def _without(arguments: Sequence[str], name: str) -> list[str]:
    """The command line without an option, in all its forms: underscores, dotted keys, `=`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        option, is_joined, _ = argument.partition("=")
        if skip:
            skip = False
        elif option.split(".")[0].replace("_", "-") == name:
            skip = not is_joined
        else:
            kept.append(argument)
    return kept


def _stated_config(model: str, revision: str | None) -> dict[str, Any]:
    """What a checkpoint's config.json says.

    Raises:
        ValueError: it cannot be read.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"METok cannot read the config of {model}: {reason(error)}") from None
    if not config:
        raise ValueError(f"METok cannot read the config of {model}: there is no config.json.")
    stated: dict[str, Any] = config
    return stated
