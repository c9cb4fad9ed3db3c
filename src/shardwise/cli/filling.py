"""The way through the form: question by question, back again, and the last page, until it is agreed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.drives import not_nvme
from ..config.machine import visible_gpus
from ..config.offloads import DEVICES, directories_of
from ..config.schema import Key, key_of
from ..config.yaml_file import parse_yaml
from ..errors import ConfigError
from .asking import LEAVE, WRITE, Asker, Back, EndOfInput, Line, shown
from .form import Form, at, problem_with
from .questions import MODEL, OF_THE_PLAN, QUESTIONS, Answers, Question, as_text

_BY_NAME = {question.name: question for question in QUESTIONS}
_PLACES = {"offload_optimizer_nvme_path": "offload_optimizer_device", "offload_param_nvme_path": "offload_param_device"}
_REMOVE = "remove"


class Interrupted(Exception):  # noqa: N818 (as KeyboardInterrupt)
    """A Ctrl-C, and where it came: `at question 3 (zero_stage)`."""


def fill(form: Form, asker: Asker, path: Path) -> None:
    """Ask until the last page is agreed to. Raises Interrupted, EndOfInput where the input is over."""
    where = "before the first question"
    told: set[str] = set()
    try:
        while True:
            found = form.open()
            if found is None:
                where = "on the last page"
                if _last_page(form, asker, path):
                    return
                continue
            question, before, wrong = found
            place = _place(form, question)
            where = f"at question {place} ({question.name})"
            if wrong is not None:
                asker.say(f"! {question.name}: {wrong}", indent="")
            if question.name == "zero_stage":
                _tell_plan(form, before, asker, told)
            _ask(form, asker, question, before, place)
    except KeyboardInterrupt:
        raise Interrupted(where) from None


def _ask(form: Form, asker: Asker, question: Question, before: Answers, place: str) -> None:
    default = form.answers.get(question.name, form.default(question, before))

    def wrong(value: Any) -> str | None:
        return form.problem(question, before, value)

    try:
        value = asker.ask(question, default, wrong, place)
    except Back:
        if not form.back(question):
            asker.say("! this is the first question", indent="   ")
        return
    form.give(question, value)
    if question.name in _PLACES and (said := _about(value)):
        for text in said:
            asker.say(f"! {text}", indent="   ")


def _place(form: Form, question: Question) -> str:
    """`3/21`: of the questions that apply as things are."""
    names = [found.name for found, _ in form.walk()]
    return f"{names.index(question.name) + 1}/{len(names)}"


def _tell_plan(form: Form, before: Answers, asker: Asker, told: set[str]) -> None:
    plan = form.plan(before)
    for text in plan.said if plan else ():
        if text not in told:
            asker.say()
            asker.say(text)
            told.add(text)


def _last_page(form: Form, asker: Asker, path: Path) -> bool:
    """Show everything; change what is chosen. True if it is to be written."""
    problems = form.problems()
    asker.say()
    for problem in problems:
        asker.say(f"! {'.'.join(problem.key)}: {problem.text}")
    for text in remarks(form):
        asker.say(f"note: {text}")
    try:
        chosen = asker.review(lines_of(form), str(path), writable=not problems)
    except Back:
        form.back(None)
        return False
    if chosen == WRITE:
        return True
    if chosen == LEAVE:
        raise KeyboardInterrupt
    try:
        _change(form, asker, chosen)
    except Back:
        pass
    return False


def _change(form: Form, asker: Asker, name: str) -> None:
    """One line of the last page. What it opens or contradicts is asked next."""
    question = _BY_NAME.get(name)
    if question is not None:
        before = next(before for found, before in form.walk(name) if found.name == name)
        form.free(name)
        value = asker.ask(question, form.answers[name], lambda value: form.problem(question, before, value), "change")
        form.give(question, value)
        return
    key: Key = tuple(name.split("."))

    def wrong(text: str) -> str | None:
        return None if text == _REMOVE else problem_with_key(key, _read(text))

    value = at(form.kept, key)
    typed = asker.line(f"{name} (or {_REMOVE})", as_text(value), wrong)
    form.keep(key, None if typed == _REMOVE else value if typed == as_text(value) else _read(typed))


def problem_with_key(key: Key, value: Any) -> str | None:
    """What is wrong with a kept setting by itself; one below a section of a section has no name of its own."""
    try:
        named = key_of(key[-1]) == key
    except KeyError:
        named = False
    if named:
        return problem_with(key[-1], value)
    from ..config.check import sound
    from .form import put

    return next((problem.text for problem in sound(put({}, key, value))[1]), None)


def _read(text: str) -> Any:
    """A value as a file would have it."""
    try:
        return parse_yaml(f"value: {text}", "").values["value"]
    except ConfigError:
        return text


def lines_of(form: Form) -> list[Line]:
    """The last page: each answer, then what is kept of the file."""
    lines = []
    for question, _ in form.walk():
        name = question.name
        value = form.answers.get(name)
        lines.append(Line(name, shown(question, value), "flag" if name in form.typed else ""))
    return lines + [Line(".".join(key), as_text(value), "kept") for key, value in _leaves(form.kept)]


def _leaves(values: dict[str, Any], above: Key = ()) -> list[tuple[Key, Any]]:
    found: list[tuple[Key, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value and len(above) < 2:
            found += _leaves(value, (*above, name))
        else:
            found.append(((*above, name), value))
    return found


def remarks(form: Form) -> list[str]:
    """What this machine says to the answers, and what of a recommended plan is not followed."""
    state = form.state()
    found: list[str] = []
    for name, device in _PLACES.items():
        tier = DEVICES.get(str(state.get(device)))
        if name in state and tier is not None and tier.on_disk:
            found += [text for text in _about(state[name]) if text not in found]
    gpus = visible_gpus(state.get("gpu_ids"))
    processes, machines = str(state.get("num_processes")), str(state.get("num_machines"))
    if gpus is not None and not state["use_cpu"] and processes.isdigit() and machines.isdigit():
        here = -(-int(processes) // max(1, int(machines)))
        if here > gpus:
            found.append(f"{here} processes on a machine need as many GPUs; this one has {gpus}")
    plan = form.plan(state) if state.get(MODEL) else None
    differ = [
        name for name in OF_THE_PLAN if plan and name in state and plan.defaults.get(name, state[name]) != state[name]
    ]
    if plan and differ:
        found.append(f"{plan.said[0]} The answers differ in {', '.join(differ)}.")
    return found


def _about(said: Any) -> list[str]:
    """What is to be said of directories for offloading, as a file or a user names them."""
    paths = [part.strip() for part in said.split(",")] if isinstance(said, str) else directories_of(said)
    return [text for path in paths if path and (text := not_nvme(path)) is not None]


__all__ = ["EndOfInput", "Interrupted", "fill", "lines_of", "remarks"]
