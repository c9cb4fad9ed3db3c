"""`shardwise config`: the guide's questions, one by one, and the YAML file that they lead to.

The questions are a table. Each has a key of the schema, a condition on the answers so far, a default, and one line of
help. A flag answers its question beforehand; without a terminal flags must answer all that apply, or `--default` the
rest. An answer is checked when it is given, by the same schema that checks a file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..config.machine import visible_gpus
from ..config.resolve import key_of, resolve
from ..config.rules import check
from ..config.schema import Config
from ..config.yaml_file import default_file, write_yaml
from ..errors import ConfigError

Answers = dict[str, Any]
USE_ZERO = "use_zero"  # the one question that is not a key: it decides distributed_type
USE_JSON = "use_json"
CLIP = "clip"
_HELPERS = (USE_ZERO, USE_JSON, CLIP)


@dataclass(frozen=True)
class Choice:
    value: Any
    text: str


@dataclass(frozen=True)
class Question:
    """One question.

    name:    the setting that it answers (or one of `_HELPERS`).
    text:    what is asked; help: one line on what it means.
    choices: for a question answered with the arrow keys; a bool default makes it yes or no; else a line is typed.
    default: from the answers so far.
    when:    does it apply to the answers so far?
    """

    name: str
    text: str
    help: str
    default: Callable[[Answers], Any]
    choices: tuple[Choice, ...] = ()
    when: Callable[[Answers], bool] = lambda answers: True


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


QUESTIONS: tuple[Question, ...] = (
    Question(
        "use_cpu",
        "What will you train on?",
        "On GPUs the ranks talk through NCCL, on CPUs through gloo.",
        lambda answers: visible_gpus() == 0,
        (Choice(False, "GPUs"), Choice(True, "CPU only")),
    ),
    Question("num_machines", "How many machines?", "1, unless the run spans several hosts.", lambda answers: 1),
    Question(
        "machine_rank",
        "Which of them is this one?",
        "From 0; machine 0 is where the others connect to.",
        lambda answers: 0,
        when=_several,
    ),
    Question(
        "main_process_ip",
        "Address of machine 0?",
        "An IP address or host name that every machine can reach.",
        lambda answers: "",
        when=_several,
    ),
    Question(
        "main_process_port",
        "Port on machine 0?",
        "A port that is free there and open to the other machines.",
        lambda answers: 29500,
        when=_several,
    ),
    Question(
        "same_network",
        "Are all machines in one network?",
        "No for hosts of different networks, such as two clouds.",
        lambda answers: True,
        when=_several,
    ),
    Question(
        "rdzv_backend",
        "How do the machines find each other?",
        "static: ranks follow machine_rank. c10d: they are given out as machines arrive.",
        lambda answers: "static",
        (Choice("static", "static"), Choice("c10d", "c10d")),
        when=_several,
    ),
    Question(
        "debug",
        "Check every collective over the ranks while running?",
        "Finds ranks that went different ways; slower.",
        lambda answers: False,
    ),
    Question(
        USE_ZERO,
        "Shard the training state over the processes (ZeRO)?",
        "Needed for models that do not fit; written as DEEPSPEED, the name that this schema has for it.",
        lambda answers: True,
    ),
    Question(
        USE_JSON,
        "Take the ZeRO settings from a DeepSpeed JSON file?",
        "Yes only if you have one; the questions that it answers are skipped.",
        lambda answers: False,
        when=_zero,
    ),
    Question(
        "deepspeed_config_file",
        "Path of the JSON file?",
        "As seen from where you launch, or from this YAML file.",
        lambda answers: "",
        when=lambda answers: _zero(answers) and answers[USE_JSON],
    ),
    Question(
        "zero_stage",
        "Which ZeRO stage?",
        "A higher stage needs less memory and more traffic. With LoRA most of the memory is parameters: take 3.",
        lambda answers: 3,
        (
            Choice(0, "0  nothing sharded"),
            Choice(1, "1  optimizer states"),
            Choice(2, "2  optimizer states and gradients"),
            Choice(3, "3  optimizer states, gradients and parameters"),
        ),
        when=_by_hand,
    ),
    Question(
        "offload_optimizer_device",
        "Where do the optimizer states rest?",
        "cpu and nvme free GPU memory; the states then visit the GPU in every step.",
        lambda answers: "none",
        (Choice("none", "on the device"), Choice("cpu", "cpu"), Choice("nvme", "nvme")),
        when=lambda answers: _stage(answers) >= 1,
    ),
    Question(
        "offload_optimizer_nvme_path",
        "Directory on the drive, for optimizer states?",
        "A fast local drive; the files of a run are removed when it ends.",
        lambda answers: "/local_nvme",
        when=lambda answers: _stage(answers) >= 1 and answers["offload_optimizer_device"] == "nvme",
    ),
    Question(
        "offload_param_device",
        "Where do the parameters rest?",
        "cpu, nvme: each block is copied to the GPU when it is used.",
        lambda answers: "none",
        (Choice("none", "on the device"), Choice("cpu", "cpu"), Choice("nvme", "nvme")),
        when=lambda answers: _stage(answers) == 3,
    ),
    Question(
        "offload_param_nvme_path",
        "Directory on the drive, for parameters?",
        "A fast local drive; the files of a run are removed when it ends.",
        lambda answers: answers.get("offload_optimizer_nvme_path") or "/local_nvme",
        when=lambda answers: _stage(answers) == 3 and answers["offload_param_device"] == "nvme",
    ),
    Question(
        "gradient_accumulation_steps",
        "How many micro-batches for each optimizer step?",
        "Gradient accumulation: more, for a larger batch in the same memory.",
        lambda answers: 1,
        when=_by_hand,
    ),
    Question(
        CLIP,
        "Clip gradients?",
        "Scales all gradients down when their global norm is above a value.",
        lambda answers: False,
        when=_by_hand,
    ),
    Question(
        "gradient_clipping",
        "Clip above which norm?",
        "1.0 is common.",
        lambda answers: 1.0,
        when=lambda answers: _by_hand(answers) and answers[CLIP],
    ),
    Question(
        "zero3_save_16bit_model",
        "Save whole 16-bit weights under stage 3?",
        "The saved model can then be loaded without shardwise.",
        lambda answers: True,
        when=lambda answers: _stage(answers) == 3,
    ),
    Question(
        "zero3_init_flag",
        "Construct the model sharded?",
        "For models that no process can hold; this version still builds them whole and says so.",
        lambda answers: False,
        when=lambda answers: _stage(answers) == 3,
    ),
    Question(
        "gpu_ids",
        "Which GPUs of this machine?",
        "all, or numbers with commas such as 0,1.",
        lambda answers: "all",
        when=lambda answers: not answers["use_cpu"],
    ),
    Question(
        "num_processes",
        "How many processes in total?",
        "One for each GPU, over all machines.",
        _one_for_each_gpu,
    ),
    Question(
        "mixed_precision",
        "Mixed precision?",
        "What the model computes in. bf16 needs no loss scale; fp16 is for older GPUs.",
        lambda answers: "no" if answers["use_cpu"] else "bf16",
        (Choice("no", "no  (fp32)"), Choice("bf16", "bf16"), Choice("fp16", "fp16")),
        when=lambda answers: not (_zero(answers) and answers[USE_JSON]),
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
    for note in config.notes():
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
    section: Any = flags
    for part in key_of(name)[:-1]:
        section = getattr(section, part)
    found = getattr(section, name, None) if section is not None else None
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

    print(f"\n  {question.help}")
    if question.choices:
        choices = [questionary.Choice(choice.text, value=choice.value) for choice in question.choices]
        first = next(choice for choice in choices if choice.value == default)
        return questionary.select(question.text, choices=choices, default=first).unsafe_ask()
    if isinstance(default, bool):
        return questionary.confirm(question.text, default=default).unsafe_ask()
    reply = questionary.text(
        question.text, default=str(default), validate=lambda text: wrong(text) or True
    ).unsafe_ask()
    return reply.strip()
