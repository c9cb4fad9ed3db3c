"""`shardwise config`: a form of the guide's questions, and the YAML file that it fills in.

A flag answers its question beforehand, and a file that is there answers it by default. Without a terminal the same questions
come line by line, and what is read are lines of the input. Nothing is written before the last page was agreed to, or, after
a Ctrl-C, the offer to write what was answered.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from ..config.check import checked, sound
from ..config.machine import (
    gpu_memory_bytes,
    gpu_names,
    usable_cores,
    usable_memory_bytes,
    visible_gpus,
)
from ..config.resolve import Resolution, resolve
from ..config.rules import notes
from ..config.schema import Config, Key, every_setting, key_of
from ..config.yaml_file import SettingsFile, default_file, read_yaml, write_yaml
from ..errors import ConfigError
from .asking import Asker, EndOfInput, InLines, InTerminal, has_terminal, wrapped
from .filling import Interrupted, fill, remarks
from .form import Existing, Form, at, normal, problem_with
from .questions import CLIP, USE_JSON, USE_ZERO, Answers, Typed, as_text
from .recommending import Recommender

_NOBODY = Typed()


def run_config(
    settings: Mapping[str, str | bool],
    *,
    config_file: str | None = None,
    take_defaults: bool = False,
    update: bool = False,
    typed: Typed = _NOBODY,
) -> None:
    """Ask, check, write. Raises ConfigError; after a Ctrl-C KeyboardInterrupt, unless what was answered is written."""
    if take_defaults and update:
        raise ConfigError(
            "--default and --update contradict each other: one begins anew, the other keeps what is there"
        )
    if update and not settings and typed.model is None:
        raise ConfigError("--update: nothing to put into the file; give what changes as flags, such as --zero_stage 3")
    path = Path(config_file) if config_file else default_file()
    existing = Existing.of(read_yaml(path)) if path.is_file() and not take_defaults else None
    if update and existing is None:
        raise ConfigError(f"{path}: there is no such file to update; leave out --update to make it")
    form = form_of(settings, existing, typed)
    if take_defaults or update:
        config = finished(form, path)
        plan = form.plan(form.state())
        print("".join(f"{text}\n" for text in (plan.said if plan else ())), end="")
        _write(form, config, path)
        return
    asker: Asker = InTerminal() if has_terminal() else InLines()
    try:
        _begin(asker, form, path)
        fill(form, asker, path)
    except EndOfInput:
        raise ConfigError(_unanswered(form)) from None
    except Interrupted as stop:
        if not _offer(form, asker, path, stop):
            raise KeyboardInterrupt from None
        return
    _write(form, finished(form, path), path)


def form_of(settings: Mapping[str, str | bool], existing: Existing | None = None, typed: Typed = _NOBODY) -> Form:
    """The form with its flags filled in. Raises ConfigError for flags that are wrong or contradict one another."""
    wrong = [f"--{name}: {text}" for name, value in settings.items() if (text := problem_with(name, value))]
    if typed.model is None and any((typed.lora_r, typed.quantize, typed.sequence_length)):
        wrong.append("--lora_r, --quantize and --sequence_length are of the model that --model names; add it")
    else:
        try:
            typed.asked().check()
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    flags = {name: normal(name, value) for name, value in settings.items()}
    recommender = Recommender(typed.lora_r, typed.quantize)
    form = Form(existing, {**_implied(settings), **flags, **typed.answers()}, recommender)
    told = []
    for problem in form.problems({name: form.answers[name] for name in form.answers}):
        # What a question may still answer is not wrong yet.
        if all(key[-1] in settings for key in (problem.key, *problem.also)):
            told.append(f"--{problem.key[-1]}: {problem.text}")
    if told:
        raise ConfigError("\n".join(told))
    if typed.model is not None and (why := recommender.problem(typed.model)):
        raise ConfigError(f"--model: {why}")
    return form


def _implied(settings: Mapping[str, str | bool]) -> Answers:
    """The helper questions that flags answer in passing: `--zero_stage 3` says that ZeRO is wanted."""
    answers: Answers = {}
    kind = str(settings.get("distributed_type", "")).upper()
    if kind:
        answers[USE_ZERO] = kind == "DEEPSPEED"
        if kind in ("MULTI_CPU", "MULTI_GPU") and "use_cpu" not in settings:
            answers["use_cpu"] = kind == "MULTI_CPU"
    if any(key_of(name)[0] == "deepspeed_config" and name != "gradient_accumulation_steps" for name in settings):
        answers.setdefault(USE_ZERO, True)
    if "deepspeed_config_file" in settings:
        answers[USE_JSON] = True
    elif "zero_stage" in settings:
        answers[USE_JSON] = False
    if "gradient_clipping" in settings:
        answers[CLIP] = normal("gradient_clipping", settings["gradient_clipping"]) is not None
    return answers


def finished(form: Form, path: Path) -> Config:
    """The Config of the answers, and of defaults for the others. Raises ConfigError with a line for each problem."""
    state = form.state()
    values = form.values(state)

    def name(key: Key) -> str:
        return f"--{key[-1]}" if key[-1] in form.typed else f"{path}: {'.'.join(key)}"

    if not state.get(USE_JSON):
        config = checked(values, name)
    else:
        lines = form.existing.settings.lines if form.existing else {}
        kept = {key: line for key, line in lines.items() if at(form.kept, key) is not None}
        config = resolve({}, SettingsFile(str(path), values, kept)).config
    return config if config.num_machines > 1 else config.model_copy(update={"machine_rank": 0})


def _begin(asker: Asker, form: Form, path: Path) -> None:
    asker.say(machine_text())
    if form.existing is not None:
        asker.say(f"{path} is there: its values are the defaults, and what no question asks for is kept.")
        for problem in form.existing.problems:
            asker.say(f"! not taken over: {problem}")
    asker.say("Enter takes the default, `back` (or Esc) the question before; nothing is written before the last page.")


def machine_text() -> str:
    """What this machine has, in one sentence."""
    count, memory, names = visible_gpus(), gpu_memory_bytes(), gpu_names()
    kind = f" ({names[0].split(': ', 1)[-1].split(' (UUID')[0]}" if names else ""
    size = f"{', ' if kind else ' ('}{memory / 2**30:.0f} GiB" if memory else ""
    gpus = f"{count} GPU(s){kind}{size}{')' if kind or size else ''}" if count else "no GPU"
    if count is None:
        gpus = "GPUs that only torch can count"
    host = usable_memory_bytes()
    hosted = "" if host is None else f", {host / 2**30:.0f} GiB of memory"
    return f"This machine: {gpus}{hosted}, {usable_cores()} cores."


def _write(form: Form, config: Config, path: Path, left: list[str] | None = None) -> None:
    """Write the file, and say what was done and what it means."""
    there = path.is_file()
    gone = form.left_out(config)
    if there and form.existing is None:
        old = path.with_name(f"{path.name}.old")
        try:
            shutil.copyfile(path, old)
        except OSError as error:
            raise ConfigError(f"{old}: cannot be written: {error.strerror}") from None
        print(f"note: {path} was there; what it said is in {old}", file=sys.stderr)
    write_yaml(config, path, also=form.existing.settings if form.existing else None)
    for text in (f"left out, because it has no meaning beside these answers: {name}" for name in gone):
        print(f"note: {text}", file=sys.stderr)
    for note in [*remarks(form), *notes(config)]:
        print(f"note: {note}", file=sys.stderr)
    print(f"configuration written to {path}")
    for text in left or ():
        print(wrapped(f"missing: {text}"), file=sys.stderr)
    if not left:
        named = f"--config_file {path} " if path != default_file() else ""
        print(f"next: shardwise launch {named}SCRIPT")


def _unanswered(form: Form) -> str:
    """Which flags say what the input did not."""
    open_ones = [f"--{q.name}" for q, _ in form.walk() if q.name not in form.answers and q.needed and not q.is_helper]
    return (
        f"the input ended before all was answered, and nothing was written; give {', '.join(open_ones)}, or add --default to "
        "take the defaults"
        if open_ones
        else "the input ended on the last page, and nothing was written; add --default to write without it"
    )


def _offer(form: Form, asker: Asker, path: Path, stop: Interrupted) -> bool:
    """After a Ctrl-C: say where it came and that nothing is written, and offer what was answered. True if it is written."""
    asker.say()
    state = "as it was" if path.is_file() else "not written"
    asker.say(f"Interrupted {stop}; {path} is {state}.")
    answered = [name for name in form.answers if name not in form.typed]
    if not answered:
        return False
    form.settle()
    config, _ = sound(form.values(form.state()))
    missing = [f"{'.'.join(problem.key)}: {problem.text}" for problem in form.problems()]
    rest = "what the file said" if form.existing else "the defaults"
    try:
        asker.say(f"It could have the {len(answered)} answer(s) so far, and {rest} for the others.")
        for text in missing:
            asker.say(f"! launch will refuse it: {text}")
        if not asker.agrees(f"Write {path} so?", default=False):
            return False
    except (KeyboardInterrupt, EndOfInput):
        return False
    _write(form, config, path, missing)
    return True


def show(file: str | None) -> None:
    """Print what a file says, key by key with its line, and how many keys have their defaults. Raises ConfigError."""
    path = Path(file) if file else default_file()
    if not file and not path.is_file():
        raise ConfigError(f"{path}: there is no such file; `shardwise config` makes it")
    found: Resolution = resolve({}, path)
    full = found.config.model_dump(mode="json")
    # What a DeepSpeed JSON says, or what follows from something else, has that in the place of a line.
    rows = [(found.origins[key].removeprefix(f"{path}:"), key) for key, _ in every_setting() if key in found.origins]
    print(f"{path}: line, setting, value")
    for line, key in sorted(rows, key=lambda row: (not row[0].isdigit(), int(row[0]) if row[0].isdigit() else 0)):
        print(f"{line:>4}  {'.'.join(key)} = {as_text(at(full, key))}")
    rest = len(list(every_setting())) - len(rows)
    print(f"{rest} others have their defaults; `shardwise launch --dry_run` shows all.")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
