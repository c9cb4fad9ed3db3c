"""From flags, a file and defaults to one checked Config that knows where each of its values came from.

Precedence is flag, then YAML (with the DeepSpeed JSON that it may name), then default. A flag's default never counts as
given, and a given flag is never dropped: where it contradicts the rest, that is an error in the flag's own name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import usage
from .check import check
from .deepspeed_json import DeepSpeedFile, find_json, read_deepspeed_json
from .rules import Problem, notes
from .schema import Config, Key, key_of
from .yaml_file import SettingsFile, read_yaml

# A flag for one of these asks for ZeRO, whatever the file says; the others of deepspeed_config fit any run.
_ZERO_FLAGS = ("zero_stage", "offload_optimizer_device", "offload_param_device", "deepspeed_config_file")


# Why a run that nobody has given a kind has one of several processes.
SEVERAL = "because num_processes is more than 1"


@dataclass(frozen=True)
class Resolution:
    """A Config and its story.

    origins: dotted key -> "--zero_stage", "run.yaml:8", "ds.json:3: zero_optimization.stage", "because --use_cpu";
             a key that is not there has its default.
    notes:   sentences for the user: settings without effect, and the like.
    """

    config: Config
    origins: dict[Key, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def origin(self, key: Key) -> str:
        return self.origins.get(key, "default")


def resolve(
    flags: Mapping[str, Any],
    file: str | Path | SettingsFile | None = None,
    *,
    use_zero: bool = False,
    as_deepspeed: bool = False,
) -> Resolution:
    """Put `flags` over `file` over the defaults, and check the whole.

    flags:    setting name -> value, only those that were given; `{"zero_stage": "3", "use_cpu": True}`.
    file:     a YAML file or its path.
    use_zero: `--use_deepspeed`: a ZeRO run even if no zero flag and no file says so.
    as_deepspeed: the script's own accelerate reads the DeepSpeed JSON too, and builds what only it builds here.
    Raises ConfigError with one line for each thing that is wrong: `run.yaml:12: deepspeed_config.zero_stage: 5 is ...`.
    """
    if isinstance(file, (str, Path)):
        file = read_yaml(file)
    build = _Build(file or SettingsFile("", {}, {}), as_deepspeed)
    build.read_json(flags)
    build.put_flags(flags, use_zero)
    build.derive(flags)
    return build.finish()


class _Build:
    """The values as they come together, with the place of each."""

    def __init__(self, file: SettingsFile, as_deepspeed: bool) -> None:
        self.file = file
        self.as_deepspeed = as_deepspeed
        self.json: DeepSpeedFile | None = None
        self.values: dict[str, Any] = {
            key: dict(value) if isinstance(value, dict) else value for key, value in file.values.items()
        }
        # Legacy spellings become today's before a flag is laid over them.
        if isinstance(self.values.get("fp16"), bool):
            legacy = self.values.pop("fp16")
            if legacy and "mixed_precision" not in self.values:
                self.values["mixed_precision"] = "fp16"
        self.origins: dict[Key, str] = {key: f"{file.path}:{line}" for key, line in file.lines.items()}
        if ("fp16",) in self.origins:
            self.origins.setdefault(("mixed_precision",), self.origins[("fp16",)])
        self.problems: list[str] = []
        self.notes: list[str] = []

    def get(self, key: Key) -> Any:
        value: Any = self.values
        for part in key:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def put(self, key: Key, value: Any, origin: str) -> None:
        section = self.values
        for part in key[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key[-1]] = value
        self.origins[key] = origin

    def read_json(self, flags: Mapping[str, Any]) -> None:
        """Lay the DeepSpeed JSON, if one is named, under the flags. It must not contradict the YAML."""
        key = ("deepspeed_config", "deepspeed_config_file")
        name = flags.get("deepspeed_config_file") or self.get(key)
        if not isinstance(name, str) or name.lower() in ("none", ""):
            return
        beside = None if flags.get("deepspeed_config_file") else self.file.path or None
        try:
            aside = ("optimizer", "scheduler", "shardwise") if self.as_deepspeed else ()
            read = self.json = read_deepspeed_json(find_json(name, beside), aside=aside)
        except ConfigError as error:
            origin = "--deepspeed_config_file" if beside is None else self.origins[key]
            self.problems.append(f"{origin}: {error}")
            return
        self.problems += read.problems
        self.notes += read.notes
        for ours in _leaves(read.values, read.places):
            value = read.values
            for part in ours:
                value = value[part]
            theirs = read.places.get(ours, "")
            if ours in self.file.lines and self.get(ours) is not None and not _same(ours, self.get(ours), value):
                if theirs:
                    self.problems.append(
                        f"{self.origins[ours]}: {'.'.join(ours)}: {self.get(ours)!r} contradicts {value!r} of "
                        f"{theirs}; remove one of them"
                    )
                continue
            self.put(ours, value, theirs or f"{name}, where it is absent")

    def put_flags(self, flags: Mapping[str, Any], use_zero: bool) -> None:
        for name, value in flags.items():
            self.put(key_of(name), value, f"--{name}")
        kind = self.get(("distributed_type",))
        asked = next((f"--{name}" for name in _ZERO_FLAGS if name in flags), "--use_deepspeed" if use_zero else None)
        if "distributed_type" in flags:
            return
        if asked and str(kind).upper() != "DEEPSPEED":
            self.put(("distributed_type",), "DEEPSPEED", f"because {asked} was given")
            if not use_zero and self.get(("deepspeed_config", "zero_stage")) is None:
                self.put(("deepspeed_config", "zero_stage"), 0, "default without a file")
        elif kind is None and self.file.path and self.values.get("deepspeed_config"):
            self.put(("distributed_type",), "DEEPSPEED", "because there is a deepspeed_config")
        elif isinstance(self.values.get("deepspeed_config"), dict) and str(kind).upper() != "DEEPSPEED":
            section = self.values["deepspeed_config"]
            if section and "zero_stage" not in section:
                self.put(("deepspeed_config", "zero_stage"), 0, "default of a run without ZeRO")

    def derive(self, flags: Mapping[str, Any]) -> None:
        """What follows from what was given."""
        self.derive_zero(flags)
        cpu = str(self.get(("use_cpu",))).lower() in ("true", "yes", "on", "1")
        kind = str(self.get(("distributed_type",))).upper()
        if kind == "MULTI_GPU" and cpu and "use_cpu" in flags:
            self.put(("distributed_type",), "MULTI_CPU", "because --use_cpu was given")
        elif kind == "MULTI_CPU" and not cpu:
            if "use_cpu" in flags:
                self.put(("distributed_type",), "MULTI_GPU", "because --no_use_cpu was given")
            else:
                self.put(("use_cpu",), True, "because distributed_type is MULTI_CPU")
                cpu = True
        several = str(self.get(("num_processes",))).strip()
        unsaid = kind == "NONE" or (kind in ("NO", "FALSE") and "num_processes" in flags)
        if unsaid and several.isdigit() and int(several) > 1:
            self.put(("distributed_type",), "MULTI_CPU" if cpu else "MULTI_GPU", SEVERAL)

    def derive_zero(self, flags: Mapping[str, Any]) -> None:
        """What accelerate and DeepSpeed would make of it."""
        if self.json is not None and usage.word(self.get(("mixed_precision",))) == "fp16":
            for name, value in self.json.loss_scale.items():
                key = ("shardwise_config", "loss_scale", name)
                self.put(key, value, self.json.places[key])
        described = self.json is not None or bool(self.file.values.get("deepspeed_config"))
        for put in usage.defaults(self.get, described=described):
            self.put(*put)
        for put, note in usage.without_effect(self.get, flags):
            self.put(*put)
            self.notes.append(note)
        if self.file.values.get("deepspeed_config") and self.json is None:
            clipping = usage.clipping_note(self.get, self.file.path)
            if clipping is not None and usage.word(self.get(("distributed_type",))) == "deepspeed":
                self.notes.append(clipping)

    def finish(self) -> Resolution:
        config, problems = check(self.values)
        # In the order of the file, and those of flags before them.
        typed = [key for key, origin in self.origins.items() if origin.startswith("--")]
        problems.sort(key=lambda problem: 0 if problem.key in typed else self.file.lines.get(problem.key, 0))
        self.problems += [self.line(problem) for problem in problems]
        if config is None or self.problems:
            raise ConfigError("\n".join(dict.fromkeys(self.problems)))
        # Under DeepSpeed's name a program gets what DeepSpeed would do, and is told so when it starts.
        if config.zero.gradient_clipping is not None or self.as_deepspeed:
            self.notes = [note for note in self.notes if "gradient_clipping" not in note]
        return Resolution(config, self.origins, [*self.notes, *notes(config)])

    def line(self, problem: Problem) -> str:
        """The problem in one line, led by the flag or the file and line that it comes from."""
        if problem.key == ("distributed_type",) and usage.word(self.get(problem.key)) == "fsdp":
            problem = replace(problem, text=problem.text + usage.of_fsdp(self.get(("fsdp_config",))))
        name = ".".join(problem.key)
        candidates = [problem.key, *problem.also, problem.key[:1]]
        origin = next((self.origins[key] for key in candidates if key in self.origins), None)
        if origin is None:
            return (
                f"{self.file.path}: {name}: {problem.text}"
                if self.file.path
                else f"--{problem.key[-1]}: {problem.text}"
            )
        if origin.startswith("--"):
            # The flag is named as it was typed; its key says the same word.
            return (
                f"{origin}: {problem.text}"
                if origin[2:] == problem.key[-1]
                else f"{origin}: {problem.key[-1]}: {problem.text}"
            )
        if origin.count(": "):
            return f"{origin}: {problem.text}"  # a place in a JSON file, which names the key there
        return f"{origin}: {name}: {problem.text}"


def _leaves(values: Mapping[str, Any], placed: Container[Key], above: Key = ()) -> list[Key]:
    """The keys that have none below them, and those that have a place of their own: a section is one value then."""
    found: list[Key] = []
    for name, value in values.items():
        key = (*above, name)
        found += _leaves(value, placed, key) if isinstance(value, dict) and key not in placed else [key]
    return found


def _same(key: Key, one: Any, other: Any) -> bool:
    """Do two spellings of a value mean the same (`"2"` and 2, 1 and 1.0)? Wrong ones are left to the check."""
    if str(one).lower() == str(other).lower() or bool(one == other):
        return True
    if str(one).lower() == "auto":
        return True
    if key == ("mixed_precision",) and one in (False, "no"):
        return str(other) == "no"
    return False
