"""From plain values to a Config that is checked whole, or to every problem at once.

Where a key is wrong by itself it is set aside, and the rules look at the rest; so one run of the launcher shows a wrong type,
an unknown key and an illegal pair together. The other ways to a Config are here too: what the launcher left in the
environment, and the keywords of a script over it.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from ..files.documents import parse_json
from .environment import RankEnvironment
from .rules import Problem, conflicts
from .schema import ENVIRONMENT_KEY, SECTIONS, Config, Key, key_of

# Keys of a DeepSpeed JSON that people put into a YAML's deepspeed_config, where accelerate does not look at them.
_OF_THE_JSON = {
    *(
        "bf16",
        "fp16",
        "zero_optimization",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "optimizer",
        "scheduler",
    ),
    *("steps_per_print", "wall_clock_breakdown", "activation_checkpointing", "aio", "communication_data_type"),
}


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean zero_stage?`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check(values: Mapping[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The Config of `values` and no problem, or None and every problem found."""
    config, problems = sound(values)
    set_aside = {key for problem in problems for key in (problem.key, *problem.also)}
    for problem in conflicts(config):
        if not {problem.key, *problem.also} & set_aside:
            problems.append(problem)
    return (None, problems) if problems else (config, [])


def sound(values: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    """The Config of those of `values` that are right by themselves, and what is wrong with the others.

    Whether they go together is not asked. Of an unknown key `also` names the known one that is near: what was to be said of
    that is not known either.
    """
    values = _without_legacy(values)
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        problems = _problems(error)
    for problem in problems:
        values = _dropped(values, problem.key)
    return Config.model_validate(values), problems


def _without_legacy(values: Mapping[str, Any]) -> dict[str, Any]:
    """Old files say `fp16: true` where new ones say `mixed_precision: fp16`."""
    plain = dict(values)
    if isinstance(plain.get("fp16"), bool) and plain.pop("fp16"):
        plain.setdefault("mixed_precision", "fp16")
    return plain


def _problems(error: ValidationError) -> list[Problem]:
    found = []
    for detail in error.errors(include_url=False, include_context=False):
        # Positions in a list say nothing to a reader of the file; the key of the list does.
        key = tuple(part for part in detail["loc"] if isinstance(part, str))
        also: tuple[Key, ...] = ()
        if detail["type"] == "extra_forbidden":
            section = SECTIONS.get(key[:-1])
            known = sorted(section.model_fields) if section else []
            text = f"unknown key{nearest(key[-1], known) or _section_of(key[-1])}"
            also = _meant(key, known)
            if key[:-1] == ("deepspeed_config",) and key[-1] in _OF_THE_JSON:
                text = (
                    "is a key of DeepSpeed's JSON: put it into the file that deepspeed_config_file names, or write "
                    "mixed_precision, zero_stage and the like here"
                )
        elif detail["type"] == "model_type":
            text = f"{detail['input']!r} is not a section with keys of its own"
        else:
            text = detail["msg"]
        found.append(Problem(key, text, also))
    return found


def _meant(key: Key, known: list[str]) -> tuple[Key, ...]:
    """The keys that an unknown one may stand for: the near one of its section, or that of its name in another."""
    close = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.6)
    if close:
        return ((*key[:-1], close[0]),)
    return tuple((*path, key[-1]) for path, model in SECTIONS.items() if key[-1] in model.model_fields)


def _section_of(word: str) -> str:
    """For a key in the wrong section: the section that has one of that name."""
    for path, model in SECTIONS.items():
        if word in model.model_fields:
            return f"; it belongs into {'.'.join(path) or 'the top level'}"
    for path, model in SECTIONS.items():
        close = difflib.get_close_matches(word, sorted(model.model_fields), n=1, cutoff=0.75)
        if close:
            return f"; did you mean {close[0]} of {'.'.join(path) or 'the top level'}?"
    return ""


def _dropped(values: Mapping[str, Any], key: Key) -> dict[str, Any]:
    rest = dict(values)
    if len(key) > 1 and isinstance(rest.get(key[0]), dict):
        rest[key[0]] = _dropped(rest[key[0]], key[1:])
    elif key:
        rest.pop(key[0], None)
    return rest


def checked(values: Mapping[str, Any], where: Callable[[Key], str] | None = None) -> Config:
    """A Config of plain `values`, or one ConfigError that lists everything wrong, one line each.

    where: what to put before the text of a problem with a key, such as `run.yaml:12: zero_stage`; by default the
           dotted key.
    """
    config, problems = check(values)
    if config is None:
        name = where or ".".join
        raise ConfigError("\n".join(f"{name(problem.key)}: {problem.text}" for problem in problems))
    return config


def from_environment(environ: Mapping[str, str] | None = None) -> Config:
    """The launcher's Config; the default one (no sharding) in a process that `shardwise launch` did not start.

    Raises ConfigError if the variable holds something else than a Config.
    """
    text = (os.environ if environ is None else environ).get(ENVIRONMENT_KEY)
    if not text:
        return Config()
    values = parse_json(text, f"{ENVIRONMENT_KEY} in the environment (unset it)", ConfigError, infinities=True)
    if not isinstance(values, dict):
        raise ConfigError(f"{ENVIRONMENT_KEY} in the environment is not a JSON object. Unset it.")
    return checked(values, lambda key: f"{ENVIRONMENT_KEY} in the environment: {'.'.join(key)}")


def merged(config: Config, *, on_note: Callable[[str], None] | None = None, **keywords: Any) -> Config:
    """`config` with the keywords of an Accelerator over it; a keyword of None was not given.

    Any key of Config, ZeroConfig or EngineConfig is a keyword, and `cpu` is `use_cpu` (False there means: not
    said). A keyword wins, except that `gradient_accumulation_steps` of the file or launcher wins over the
    script's, as it does in accelerate; that is said once through `on_note` (default: a log line on rank 0).
    `zero_stage` turns the run into a ZeRO run. Raises ConfigError, also for an unknown keyword.
    """
    say = on_note or _log_on_first_rank
    given = {key: value for key, value in keywords.items() if value is not None}
    if given.pop("cpu", False):
        given["use_cpu"] = True
    steps = given.get("gradient_accumulation_steps")
    said = config.zero.gradient_accumulation_steps
    if steps is not None and said is not None:
        # 1 is the Accelerator's default: it does not show that the script asked for it.
        if steps not in (said, 1, "auto"):
            say(
                f"gradient_accumulation_steps: the configuration's {said} is used, not the script's {steps}. "
                "Remove it from one of the two, or start with --gradient_accumulation_steps auto."
            )
        del given["gradient_accumulation_steps"]
    values = config.to_values()
    for key, value in given.items():
        try:
            *above, name = key_of(key)
        except KeyError:
            above, name = [], key  # the schema's own error names the nearest key
        section = values.setdefault(above[0], {}) if above else values
        section[name] = value
    if "deepspeed_config" in values and config.distributed_type != "DEEPSPEED":
        values["deepspeed_config"].setdefault("zero_stage", 0)
        if "zero_stage" in given:
            values["distributed_type"] = given.get("distributed_type", "DEEPSPEED")
    if values.get("use_cpu") and values.get("distributed_type") == "MULTI_GPU":
        values["distributed_type"] = "MULTI_CPU"
    return checked(values, lambda key: f"Accelerator: {key[-1]}")


def _log_on_first_rank(text: str) -> None:
    if RankEnvironment.read().rank == 0:
        logging.getLogger("shardwise").warning(text)
