"""`shardwise config`: the guide's questions, one by one, and the YAML file that they lead to.

The questions are a table. Each has a key of the schema, which has its words, a default, and a condition on the answers so
far. A flag answers its question beforehand; without a terminal flags must answer all that apply, or `--default` the
rest. An answer is checked when it is given, by the same schema that checks a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config.check import check
from ..config.machine import visible_gpus
from ..config.offloads import DEVICES, directories_of
from ..config.resolve import resolve
from ..config.rules import notes
from ..config.schema import Config, every_setting, key_of, value_of
from ..config.setting import Wording, setting_of
from ..config.yaml_file import default_file, write_yaml
from ..errors import ConfigError

Answers = dict[str, Any]
USE_ZERO = "use_zero"  # the one question that is not a key: it decides distributed_type
USE_JSON = "use_json"
CLIP = "clip"
_HELPERS = (USE_ZERO, USE_JSON, CLIP)


@dataclass(frozen=True)
class Question:
    """One question of the dialogue.

    name:    the setting that it answers, whose words are the schema's (or one of `_HELPERS`).
    default: from the answers so far.
    when:    does it apply to the answers so far?
    words:   text, help and choices; with choices it is answered with the arrow keys, else a bool default makes it yes or no,
             else a line is typed.
    """

    name: str
    default: Callable[[Answers], Any]
    when: Callable[[Answers], bool]
    words: Wording


def _several(answers: Answers) -> bool:
    return int(answers["num_machines"]) > 1


def _zero(answers: Answers) -> bool:
    return bool(answers[USE_ZERO])


def _by_hand(answers: Answers) -> bool:
    return _zero(answers) and not answers[USE_JSON]


def _stage(answers: Answers) -> int:
    return int(answers["zero_stage"]) if _by_hand(answers) else -1


def _one_for_each_gpu(answers: Answers) -> int:
    gpus = visible_gpus(answers.get("gpu_ids"))
    return int(answers["num_machines"]) * (1 if answers["use_cpu"] else gpus or 1)


def _question(
    name: str,
    default: Callable[[Answers], Any],
    when: Callable[[Answers], bool] = lambda answers: True,
    words: Wording | None = None,
) -> Question:
    words = words or _WORDS[name]
    assert words is not None, f"the schema has no question for {name}"
    return Question(name, default, when, words)


_WORDS = {key[-1]: setting_of(info).asked for key, info in every_setting()}

# The dialogue: its order, and what its answers so far mean for the next question.
QUESTIONS: tuple[Question, ...] = (
    _question("use_cpu", lambda answers: visible_gpus() == 0),
    _question("num_machines", lambda answers: 1),
    _question("machine_rank", lambda answers: 0, _several),
    _question("main_process_ip", lambda answers: "", _several),
    _question("main_process_port", lambda answers: 29500, _several),
    _question("same_network", lambda answers: True, _several),
    _question("rdzv_backend", lambda answers: "static", _several),
    _question("debug", lambda answers: False),
    _question(
        USE_ZERO,
        lambda answers: True,
        words=Wording(
            "Shard the training state over the processes (ZeRO)?",
            "Needed for models that do not fit; written as DEEPSPEED, the name that this schema has for it.",
        ),
    ),
    _question(
        USE_JSON,
        lambda answers: False,
        _zero,
        Wording(
            "Take the ZeRO settings from a DeepSpeed JSON file?",
            "Yes only if you have one; the questions that it answers are skipped.",
        ),
    ),
    _question("deepspeed_config_file", lambda answers: "", lambda answers: _zero(answers) and answers[USE_JSON]),
    _question("zero_stage", lambda answers: 3, _by_hand),
    _question("shard_group", lambda answers: "world", lambda answers: _several(answers) and _stage(answers) >= 1),
    _question("offload_optimizer_device", lambda answers: "none", lambda answers: _stage(answers) >= 1),
    _question(
        "offload_optimizer_nvme_path",
        lambda answers: "/local_nvme",
        lambda answers: _stage(answers) >= 1 and DEVICES[answers["offload_optimizer_device"]].on_disk,
    ),
    _question("offload_param_device", lambda answers: "none", lambda answers: _stage(answers) == 3),
    _question(
        "offload_param_nvme_path",
        lambda answers: ",".join(directories_of(answers.get("offload_optimizer_nvme_path"))) or "/local_nvme",
        lambda answers: _stage(answers) == 3 and DEVICES[answers["offload_param_device"]].on_disk,
    ),
    _question("gradient_accumulation_steps", lambda answers: 1, _by_hand),
    _question(
        CLIP,
        lambda answers: False,
        _by_hand,
        Wording("Clip gradients?", "Scales all gradients down when their global norm is above a value."),
    ),
    _question("gradient_clipping", lambda answers: 1.0, lambda answers: _by_hand(answers) and answers[CLIP]),
    _question("zero3_save_16bit_model", lambda answers: True, lambda answers: _stage(answers) == 3),
    _question("zero3_init_flag", lambda answers: False, lambda answers: _stage(answers) == 3),
    _question("gpu_ids", lambda answers: "all", lambda answers: not answers["use_cpu"]),
    _question("num_processes", _one_for_each_gpu),
    _question(
        "mixed_precision",
        lambda answers: "no" if answers["use_cpu"] else "bf16",
        lambda answers: not (_zero(answers) and answers[USE_JSON]),
    ),
)

Ask = Callable[[Question, Any, Callable[[Any], str | None]], Any]


def run_config(
    settings: Mapping[str, str | bool], *, config_file: str | None = None, take_defaults: bool = False
) -> None:
    """Ask, check, write. Raises ConfigError; KeyboardInterrupt (Ctrl-C) leaves the file as it was."""
    path = config_file or str(default_file())
    ask: Ask | None = None
    if not take_defaults and sys.stdin.isatty() and sys.stdout.isatty():
        ask = ask_in_terminal
    config = answer(settings, ask=ask, take_defaults=take_defaults)
    write_yaml(config, path)
    for note in notes(config):
        print(f"note: {note}", file=sys.stderr)
    print(f"configuration written to {path}")
    print(f"next: shardwise launch {f'--config_file {path} ' if config_file else ''}SCRIPT")


def answer(settings: Mapping[str, str | bool], *, ask: Ask | None, take_defaults: bool) -> Config:
    """The Config of the flags `settings` and, for what they do not say, of `ask` or of the defaults."""
    # A wrong flag is told before the first question, not after the last.
    flags = resolve(settings).config if settings else None
    answers: Answers = _implied(settings)
    missing: list[str] = []
    if flags is not None and flags.use_cpu:
        answers["use_cpu"] = True
    for question in QUESTIONS:
        name = question.name
        if name in answers or not question.when(answers):
            continue
        default = question.default(answers)
        if name in settings:
            answers[name] = _normal(flags, name, settings[name])
        elif ask is not None:
            answers[name] = ask(question, default, partial(problem_with, name))
        else:
            if not take_defaults and name not in _HELPERS:
                missing.append(f"--{name}")
            answers[name] = default
    if missing:
        raise ConfigError(
            f"there is no terminal to ask in; give {', '.join(missing)}, or add --default to take the default for these"
        )
    given = {name: value for name, value in answers.items() if name not in _HELPERS and value not in (None, "")}
    given.update(settings)
    if "distributed_type" not in given:
        several = int(given.get("num_processes", 1)) > 1
        plain = ("MULTI_CPU" if answers["use_cpu"] else "MULTI_GPU") if several else "NO"
        given["distributed_type"] = "DEEPSPEED" if answers[USE_ZERO] else plain
    if given.get("gpu_ids") == "all":
        del given["gpu_ids"]
    config = resolve(given).config
    return config if config.num_machines > 1 else config.model_copy(update={"machine_rank": 0})


def _implied(settings: Mapping[str, str | bool]) -> Answers:
    """The helper questions that flags answer in passing: `--zero_stage 3` says that ZeRO is wanted."""
    answers: Answers = {}
    kind = str(settings.get("distributed_type", "")).upper()
    if kind:
        answers[USE_ZERO] = kind == "DEEPSPEED"
        if kind in ("MULTI_CPU", "MULTI_GPU"):
            answers["use_cpu"] = settings.get("use_cpu", kind == "MULTI_CPU")
    if any(key_of(name)[0] == "deepspeed_config" and name != "gradient_accumulation_steps" for name in settings):
        answers.setdefault(USE_ZERO, True)
    if "deepspeed_config_file" in settings:
        answers[USE_JSON] = True
    elif "zero_stage" in settings:
        answers[USE_JSON] = False
    if "gradient_clipping" in settings:
        answers[CLIP] = True
    return answers


def _normal(flags: Config | None, name: str, typed: str | bool) -> Any:
    """A flag's value as the schema reads it: "3" is 3."""
    assert flags is not None
    found = value_of(flags, name)
    return typed if found is None else found


def problem_with(name: str, value: Any) -> str | None:
    """What is wrong with an answer by itself, or None."""
    if name in _HELPERS:
        return None
    if name in ("main_process_ip", "deepspeed_config_file") and not str(value).strip():
        return "an answer is needed here"
    key = key_of(name)
    values: dict[str, Any] = {key[0]: {key[1]: value} if len(key) > 1 else value}
    _, problems = check(values)
    return next((problem.text for problem in problems if problem.key == key and not problem.also), None)


def ask_in_terminal(question: Question, default: Any, wrong: Callable[[Any], str | None]) -> Any:
    """Put one question: arrow keys for choices, y or n, or a line of text that is asked again until it fits."""
    import questionary

    words = question.words
    print(f"\n  {words.help}")
    if words.choices:
        choices = [questionary.Choice(text, value=value) for value, text in words.choices.items()]
        first = next(choice for choice in choices if choice.value == default)
        return questionary.select(words.text, choices=choices, default=first).unsafe_ask()
    if isinstance(default, bool):
        return questionary.confirm(words.text, default=default).unsafe_ask()
    reply = questionary.text(words.text, default=str(default), validate=lambda text: wrong(text) or True).unsafe_ask()
    return reply.strip()
