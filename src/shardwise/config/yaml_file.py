"""The YAML file of a run: read with the line of every key, written in the guide's schema with a comment for each key.

Reading gives plain values and places; whether they make sense is asked of `check.check` by `front/settings.py`. Writing leaves
out what accelerate does not know (`shardwise_config`) while it is all default, so that both tools can read the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..files.documents import SETTINGS_NBYTES, read_text
from .schema import Config, Key, every_setting
from .setting import setting_of
from .yaml_loader import Loader, check_expansion


@dataclass(frozen=True)
class SettingsFile:
    """A file's values and the line (from 1) of every key: {("deepspeed_config", "zero_stage"): 8}."""

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)

    def place(self, key: Key) -> str | None:
        """`run.yaml:8`, or None for a key that the file does not have."""
        line = self.lines.get(key)
        return None if line is None else f"{self.path}:{line}"


def read_yaml(path: str | Path) -> SettingsFile:
    """Raises ConfigError: no file, broken YAML (one line), not a mapping, or keys that occur twice (all of them)."""
    return parse_yaml(read_text(path, ConfigError, SETTINGS_NBYTES), str(path))


def parse_yaml(text: str, path: str) -> SettingsFile:
    """`read_yaml` of a text; `path` is what the errors call it."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise ConfigError(f"{path}: is empty")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: the file is not a mapping of keys to values")
        check_expansion(node)
        lines: dict[Key, int] = {}
        twice: list[str] = []
        for key, line in _keys(node, ()):
            if key in lines:
                twice.append(f"{path}:{line}: {'.'.join(key)}: occurs twice; first in line {lines[key]}")
            lines.setdefault(key, line)
        if twice:
            raise ConfigError("\n".join(twice))
        values = loader.construct_document(node)
    except ConfigError:  # which is a ValueError
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else path
        column = f" (column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{place}: is not YAML: {error.problem or error.context}{column}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    return SettingsFile(path, {str(key): value for key, value in values.items()}, lines)


def _keys(node: yaml.MappingNode, above: Key) -> Iterator[tuple[Key, int]]:
    """Every key of a mapping and of the mappings in it, with its line; an alias is followed once."""
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        key = (*above, key_node.value)
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode) and len(above) < 4:
            yield from _keys(value_node, key)


# What each key does, in a few words, beside those that are written.
_COMMENTS = {key[-1]: setting_of(info).comment for key, info in every_setting()}

_ALWAYS = (
    *("compute_environment", "debug", "distributed_type", "machine_rank", "main_training_function", "mixed_precision"),
    *("num_machines", "num_processes", "rdzv_backend", "same_network", "use_cpu"),
)


def to_file_values(config: Config) -> dict[str, Any]:
    """What a file of this Config holds: the guide's keys, sorted, and others where they differ from the default."""
    full = config.model_dump(mode="json")
    values = {**config.to_values(), **{key: full[key] for key in _ALWAYS}, "downcast_bf16": "no"}
    values = {key: value for key, value in values.items() if value not in (None, {})}
    if config.distributed_type == "DEEPSPEED" or config.deepspeed_config is not None:
        zero = config.zero
        section = zero.model_dump(mode="json", exclude_defaults=True)
        section["zero_stage"] = zero.zero_stage
        if zero.deepspeed_config_file is None:
            section["gradient_accumulation_steps"] = config.gradient_accumulation_steps
            # Said in full, because an absent key means 1.0 to accelerate.
            section["gradient_clipping"] = zero.gradient_clipping or 0.0
            section["offload_optimizer_device"] = zero.offload_optimizer_device
            section["offload_param_device"] = zero.offload_param_device
            section["zero3_init_flag"] = zero.zero3_init_flag
            section["zero3_save_16bit_model"] = zero.zero3_save_16bit_model
        else:
            # accelerate refuses a file that repeats what the JSON says.
            section = {"deepspeed_config_file": zero.deepspeed_config_file, "zero3_init_flag": zero.zero3_init_flag}
            values.pop("mixed_precision", None)
        values["deepspeed_config"] = section
    return dict(sorted(values.items()))


def to_yaml(config: Config) -> str:
    """The text of a file of this Config."""
    lines = ["# Settings of one run, for `shardwise launch --config_file` (accelerate reads this schema too)."]
    for key, value in to_file_values(config).items():
        if isinstance(value, dict):
            lines.append(f"{key}:")
            lines += [f"  {line}" for name, inner in sorted(value.items()) for line in _entry(name, inner)]
        else:
            lines += _entry(key, value)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any) -> list[str]:
    text = yaml.safe_dump({key: value}, default_flow_style=False, width=1000).rstrip("\n").split("\n")
    comment = _COMMENTS.get(key)
    if comment is not None and len(text) == 1:
        text[0] = f"{text[0]}  # {comment}"
    return text


def write_yaml(config: Config, path: str | Path) -> None:
    """Write the file, and the directory above it, in one piece: a reader sees the old text or the new one.

    Raises ConfigError where that cannot be done.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(to_yaml(config), encoding="utf-8")
        part.replace(target)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def default_file() -> Path:
    """Where `shardwise config` writes and `launch` looks when no file is named: in the user's Hugging Face cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(home).expanduser() / "shardwise" / "default_config.yaml"
