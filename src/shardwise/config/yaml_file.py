"""The YAML file of a run: read with the line of every key, written in the guide's schema with a comment for each key.

Reading gives plain values and places; whether they make sense is asked of `check.check` by `front/settings.py`. Writing leaves
out what accelerate does not know (`shardwise_config`) while it is all default, so that both tools can read the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
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
    """A file's values and the line (from 1) of every key: {("deepspeed_config", "zero_stage"): 8}.

    comments: what somebody wrote above a key, and beside it, but for what `to_yaml` writes there; at () what the file begins
              with.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[Key, int] = field(default_factory=dict)
    comments: dict[Key, tuple[list[str], str]] = field(default_factory=dict)

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
        comments = dict(_comments(node, (), text.splitlines()))
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
    return SettingsFile(path, {str(key): value for key, value in values.items()}, lines, comments)


def _keys(node: yaml.MappingNode, above: Key) -> Iterator[tuple[Key, int]]:
    """Every key of a mapping and of the mappings in it, with its line; an alias is followed once."""
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        key = (*above, key_node.value)
        yield key, key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode) and len(above) < 4:
            yield from _keys(value_node, key)


def _comments(node: yaml.MappingNode, above: Key, text: list[str]) -> Iterator[tuple[Key, tuple[list[str], str]]]:
    """Every key that has comments, with the lines above it and the text beside it."""
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        key = (*above, key_node.value)
        line = first = key_node.start_mark.line
        while first > 0 and text[first - 1].strip().startswith("#"):
            first -= 1
        before = [found.strip() for found in text[first:line] if not found.strip().startswith(_HEAD)]
        beside = ""
        if isinstance(value_node, yaml.ScalarNode) and value_node.end_mark.line < len(text):
            rest = text[value_node.end_mark.line][value_node.end_mark.column :].strip()
            beside = rest.removeprefix("#").strip() if rest.startswith("#") else ""
        if beside == _COMMENTS.get(key[-1]):
            beside = ""
        if first == 0 and before:
            yield (), (before, "")
            before = []
        if before or beside:
            yield key, (before, beside)
        if isinstance(value_node, yaml.MappingNode) and len(above) < 4:
            yield from _comments(value_node, key, text)


# What each key does, in a few words, beside those that are written.
_COMMENTS = {key[-1]: said for key, info in every_setting() if (said := setting_of(info).comment) is not None}

_HEAD = "# Settings of one run"

_ALWAYS = (
    *("compute_environment", "debug", "distributed_type", "machine_rank", "main_training_function", "mixed_precision"),
    *("num_machines", "num_processes", "rdzv_backend", "same_network", "use_cpu"),
)


def to_file_values(config: Config, also: Iterable[Key] = ()) -> dict[str, Any]:
    """What a file of this Config holds: the guide's keys, sorted, and others where they differ from the default.

    also: keys that it has in any case, where they have a value.
    """
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
    for key in also:
        _add(values, full, key, config.zero.deepspeed_config_file is not None)
    return dict(sorted(values.items()))


def _add(values: dict[str, Any], full: Mapping[str, Any], key: Key, beside_json: bool) -> None:
    """Put the value of `key` in `full` into `values`, where it has one and is not to be said elsewhere."""
    said_there = beside_json and key[0] in ("deepspeed_config", "mixed_precision")
    found: Any = full
    for part in key:
        found = found.get(part) if isinstance(found, Mapping) else None
    if found in (None, {}, []) or isinstance(found, dict) or len(key) > 2 or said_there:
        return
    section = values.setdefault(key[0], {}) if len(key) > 1 else values
    section.setdefault(key[-1], found)


def to_yaml(config: Config, also: SettingsFile | None = None) -> str:
    """The text of a file of this Config; with the keys and comments of another, in whose place it comes."""
    values = to_file_values(config, also.lines if also else ())
    both = "" if "shardwise_config" in values else " (accelerate reads this schema too)"
    lines = [f"{_HEAD}, for `shardwise launch --config_file`{both}."]
    said = also.comments if also else {}
    lines += said.get((), ([], ""))[0]
    for key, value in values.items():
        if isinstance(value, dict):
            above, beside = said.get((key,), ([], ""))
            lines += [*above, f"{key}:" + (f"  # {beside}" if beside else "")]
            for name, inner in sorted(value.items()):
                lines += [f"  {line}" for line in _entry(name, inner, *said.get((key, name), ([], "")))]
        else:
            lines += _entry(key, value, *said.get((key,), ([], "")))
    return "\n".join(lines) + "\n"


def _entry(key: str, value: Any, above: list[str], beside: str) -> list[str]:
    text = yaml.safe_dump({key: value}, default_flow_style=False, width=1000).rstrip("\n").split("\n")
    comment = beside or _COMMENTS.get(key)
    if comment and len(text) == 1:
        text[0] = f"{text[0]}  # {comment}"
    return [*above, *text]


def write_yaml(config: Config, path: str | Path, also: SettingsFile | None = None) -> None:
    """Write the file, and the directory above it, in one piece: a reader sees the old text or the new one.

    also: a file whose keys and comments it has too.
    Raises ConfigError where that cannot be done.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(to_yaml(config, also), encoding="utf-8")
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
