"""The file that ``--config`` names, as far as METok has to look into it before vLLM does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metok_vllm.frontend.reasons import reason

CONFIG = "--config"


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of options, keys without dashes in front."""

    path: str
    index: int  # of `--config` among the words that were looked through
    entries: Mapping[str, Any]

    def asks_for(self, option: str, name: str) -> bool:
        """Whether `option` stands there with the value `name`.

        Raises:
            ValueError: with that value among others.
        """
        value = self.entries.get(option)
        if isinstance(value, list) and name in value and len(value) > 1:
            raise ValueError(f"{CONFIG} {self.path}: '{option}' takes {name} alone, not {value}.")
        return value in (name, [name])

    def has_settings(self, option: str, name: str) -> bool:
        """Whether the object `option` has an entry `name`."""
        return any(
            str(key).replace("_", "-") == option and isinstance(value, Mapping) and name in value
            for key, value in self.entries.items()
        )


def config_file(words: Sequence[str], strict: bool) -> ConfigFile | None:
    """The file that a command line names, or None.

    Args:
        words: the command line, from its first option on. vLLM knows the form in two words alone.
        strict: whether a file that cannot be read is METok's to refuse; if not, vLLM has its own answer.

    Raises:
        ValueError: it cannot be read, and `strict`.
    """
    import yaml

    if CONFIG not in words:
        return None
    index = words.index(CONFIG)
    path = words[index + 1] if index + 1 < len(words) else ""
    if not path.endswith((".yaml", ".yml")):
        return None  # vLLM refuses it by its name
    try:
        if words.count(CONFIG) > 1:
            raise ValueError("it may be given once")
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file)
        if not isinstance(entries, dict):
            raise ValueError("there are no keys and values in it")
    except (OSError, ValueError, yaml.YAMLError) as error:
        if not strict:
            return None
        raise ValueError(f"{CONFIG} {path}: {reason(error)}.") from None
    return ConfigFile(path, index, entries)
