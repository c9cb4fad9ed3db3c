"""What has been answered so far, and what that makes of a file: the questionnaire without a terminal.

    existing file --> defaults, and keys that no question asks for (kept)
    flags ---------> answers                                              `values`: what a file would hold
    the user ------> answers, each checked with those before it

A question is open while it applies and has no answer, or one that the answers before it contradict. So going back takes an
answer away (it becomes the default), and changing one opens those that it contradicts, or that apply only now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..config.check import check, sound
from ..config.deepspeed_json import find_json, read_deepspeed_json
from ..config.rules import Problem
from ..config.schema import Config, Key, key_of
from ..config.yaml_file import SettingsFile
from ..errors import ConfigError
from .questions import CLIP, HELPERS, LENGTH, MODEL, OF_THE_PLAN, QUESTIONS, ROWS, USE_JSON, USE_ZERO, Answers, Question

_ASKED: dict[Key, str] = {key_of(question.name): question.name for question in QUESTIONS if not question.is_helper}
_KIND: Key = ("distributed_type",)
_NEEDED = ("main_process_ip", "deepspeed_config_file")
# What a plan's bytes depend on beside the model.
_OF_A_RUN = ("use_cpu", "num_machines", "gpu_ids", "num_processes", "mixed_precision", "gradient_accumulation_steps")
# Beside whole copies, where the other keys of deepspeed_config have nothing to act on.
_WITHOUT_ZERO = ("gradient_accumulation_steps", "gradient_clipping")


class Plan(Protocol):
    """What was recommended for a model. defaults: by question. said: lines for the user."""

    @property
    def defaults(self) -> Mapping[str, Any]: ...

    @property
    def said(self) -> tuple[str, ...]: ...


class Recommend(Protocol):
    """What knows models. plan: from the answers that are known or assumed, and the Config that they make."""

    def problem(self, model: str) -> str | None: ...

    def plan(self, answers: Answers, config: Config) -> Plan: ...


@dataclass(frozen=True)
class Existing:
    """A file that is there. settings: what of it is right by itself. problems: what is not, a line each."""

    settings: SettingsFile
    problems: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, file: SettingsFile) -> Existing:
        """Whether its settings go together is asked where they are answered."""
        _, problems = sound(file.values)
        told = [f"{file.place(p.key) or file.path}: {'.'.join(p.key)}: {p.text}" for p in problems]
        values = file.values
        for problem in problems:
            values = without(values, problem.key)
        return cls(replace(file, values=values), told)

    def answers(self) -> Answers:
        """What the file says to each question."""
        config, _ = sound(self.settings.values)
        found, default = config.model_dump(), Config().model_dump()
        said: Answers = {}
        for key, name in _ASKED.items():
            value = at(found, key)
            # An older spelling, as `fp16: true`, says it too.
            if value is not None and (at(self.settings.values, key) is not None or value != at(default, key, value)):
                said[name] = value
        if at(self.settings.values, _KIND) is not None or config.deepspeed_config is not None:
            said[USE_ZERO] = config.distributed_type == "DEEPSPEED" or at(self.settings.values, _KIND) is None
        if config.distributed_type == "MULTI_CPU":
            said["use_cpu"] = True
        if said.get(USE_ZERO):
            said[USE_JSON] = "deepspeed_config_file" in said
            said[CLIP] = "gradient_clipping" in said
        return said

    def kept(self) -> dict[str, Any]:
        """The values that no question asks for."""
        values = self.settings.values
        for key in (*_ASKED, _KIND, ("fp16",)):
            values = without(values, key)
        return values


class Form:
    """The answers. flags: of questions, and of other settings, which are put over the file's."""

    def __init__(
        self,
        existing: Existing | None = None,
        flags: Mapping[str, Any] | None = None,
        recommend: Recommend | None = None,
    ) -> None:
        self.existing = existing
        self.file = existing.answers() if existing else {}
        self.kept = existing.kept() if existing else {}
        self.answers: Answers = {}
        self.before: Answers = {}  # taken back, or of this file by other means: they are defaults
        self.recommend = recommend
        self.kind: str | None = None
        asked = set(_ASKED.values()) | set(HELPERS)
        for name, value in (flags or {}).items():
            if name == "distributed_type":
                self.kind = str(value).upper()
            elif name in asked:
                self.answers[name] = value
            else:
                self.kept = put(self.kept, key_of(name), value)
        self.typed = set(flags or {})

    def walk(self, until: str | None = None) -> Iterator[tuple[Question, Answers]]:
        """Every question that applies, with the answers before it; where there is none, its default stands for it."""
        state: Answers = {}
        for question in QUESTIONS:
            if not question.when(state):
                continue
            yield question, dict(state)
            if question.name == until:
                return
            state[question.name] = (
                self.answers[question.name] if question.name in self.answers else self.default(question, state)
            )

    def state(self) -> Answers:
        """An answer or default to each question that applies."""
        found: Answers = {}
        for question, before in self.walk():
            found = {**before, question.name: self.answers.get(question.name, None)}
            if question.name not in self.answers:
                found[question.name] = self.default(question, before)
        return found

    def default(self, question: Question, state: Answers) -> Any:
        """What Enter answers: what was answered before, was recommended, is in the file, or is right for most."""
        name = question.name
        if name in self.before:
            return self.before[name]
        if name in OF_THE_PLAN and (plan := self.plan(state)) is not None and name in plan.defaults:
            return plan.defaults[name]
        return self.file[name] if name in self.file else question.default(state)

    def plan(self, state: Answers) -> Plan | None:
        """What is recommended for the model, with the answers so far and what is assumed for those to come."""
        if self.recommend is None or not state.get(MODEL):
            return None
        assumed = {name: value for name, value in state.items() if name in (*HELPERS, *_OF_A_RUN)}
        for question in QUESTIONS:
            # Those to come are answered as the file does, or by their defaults.
            if question.name in _OF_A_RUN and question.name not in assumed and question.when({**_NOTHING, **assumed}):
                known = {**self.file, **self.answers}
                assumed[question.name] = known.get(question.name, question.default({**_NOTHING, **assumed}))
        config, _ = sound(self.values(assumed))
        return self.recommend.plan(assumed, config)

    def open(self) -> tuple[Question, Answers, str | None] | None:
        """The first question to ask, the answers before it, and what is wrong with the answer that it has."""
        for question, before in self.walk():
            if question.name not in self.answers:
                return question, before, None
            wrong = self.problem(question, before, self.answers[question.name])
            if wrong is not None and question.name not in self.typed:
                return question, before, wrong
        return None

    def give(self, question: Question, value: Any) -> None:
        """Answer it; the value is one that `problem` has nothing against."""
        self.answers[question.name] = value
        self.before.pop(question.name, None)

    def free(self, name: str) -> None:
        """What a flag said may be asked again: the user has chosen its line."""
        self.typed.discard(name)

    def keep(self, key: Key, value: Any) -> None:
        """Another value for a setting that no question asks for; None leaves it out."""
        self.kept = without(self.kept, key) if value is None else put(self.kept, key, value)
        if self.existing is not None and value is None:
            file = self.existing.settings
            lines = {other: line for other, line in file.lines.items() if other[: len(key)] != key}
            self.existing = replace(
                self.existing, settings=replace(file, values=without(file.values, key), lines=lines)
            )

    def settle(self) -> None:
        """Let answers that contradict those before them be defaults again, where the form ends early."""
        while (found := self.open()) is not None and found[0].name in self.answers:
            self.before[found[0].name] = self.default(found[0], found[1])
            del self.answers[found[0].name]

    def back(self, question: Question | None) -> bool:
        """Open the question before this one (None: the last of all) again; False where there is none."""
        earlier = [found for found, _ in self.walk(question.name if question else None)]
        earlier = [found for found in earlier if question is None or found.name != question.name]
        earlier = [found for found in earlier if found.name in self.answers and found.name not in self.typed]
        if not earlier:
            return False
        name = earlier[-1].name
        self.before[name] = self.answers.pop(name)
        return True

    def problem(self, question: Question, before: Answers, value: Any) -> str | None:
        """What is wrong with an answer, by itself or beside those before it; None if nothing is."""
        if question.name in _NEEDED and not str(value).strip():
            return "an answer is needed here"
        if question.is_helper:
            return self.problem_of_helper(question.name, value)
        own = problem_with(question.name, value)
        if own is not None:
            return own
        if question.name == "deepspeed_config_file":
            return self.problem_of_json(str(value))
        state = {**before, question.name: value}
        free = {key for key, name in _ASKED.items() if name not in state}
        for found in self.problems(state):
            # What a question to come may still answer is not wrong yet; a key that is kept is told on the last page.
            keys = {found.key, *found.also}
            if not keys & free and key_of(question.name) in keys and not self.is_kept(found):
                return found.text if found.key == key_of(question.name) else f"{'.'.join(found.key)}: {found.text}"
        return None

    def problem_of_helper(self, name: str, value: Any) -> str | None:
        """Of an answer that is no setting."""
        text = str(value).strip()
        if name in (LENGTH, ROWS) and (not text.isdigit() or int(text) < 1):
            return f"{text!r} is not a whole number of 1 or more"
        if name == MODEL and text and self.recommend is not None:
            return self.recommend.problem(text)
        return None

    def problem_of_json(self, name: str) -> str | None:
        """Why a DeepSpeed JSON cannot be taken."""
        try:
            read = read_deepspeed_json(find_json(name.strip(), self.existing.settings.path if self.existing else None))
        except ConfigError as error:
            return str(error)
        return read.problems[0] if read.problems else None

    def is_kept(self, found: Problem) -> bool:
        """Whether a key that no question asks for has a part in this problem."""
        return any(at(self.kept, key) is not None for key in (found.key, *found.also))

    def problems(self, state: Answers | None = None) -> list[Problem]:
        """What is wrong with the file that the answers make; by default, with defaults for the open ones."""
        return check(self.values(self.state() if state is None else state))[1]

    def values(self, state: Answers) -> dict[str, Any]:
        """What a file of these answers holds, section by section."""
        values = dict(self.kept)
        zero = bool(state.get(USE_ZERO))
        if not zero:
            values = without(values, ("deepspeed_config",))
            for name in _WITHOUT_ZERO:
                if self.file.get(name) not in (None, 1) and USE_ZERO in state:
                    values = put(values, key_of(name), self.file[name])
                    values = put(values, ("deepspeed_config", "zero_stage"), 0)
        for name, value in state.items():
            if name not in HELPERS and value not in (None, "") and (name, value) != ("gpu_ids", "all"):
                values = put(values, key_of(name), value)
        processes = str(state.get("num_processes", 1)).strip()
        several = processes.isdigit() and int(processes) > 1
        plain = ("MULTI_CPU" if state.get("use_cpu") else "MULTI_GPU") if several else "NO"
        if self.kind not in (None, "DEEPSPEED"):
            plain = str(self.kind)
        return put(values, _KIND, "DEEPSPEED" if zero else plain)

    def left_out(self, config: Config) -> list[str]:
        """The keys that the file has, and that its answers now leave without a meaning."""
        if self.existing is None:
            return []
        applying = {question.name for question, _ in self.walk()}
        had, _ = sound(self.existing.settings.values)
        before, written, default = (of.model_dump() for of in (had, config, Config()))
        found = []
        for key in self.existing.settings.lines:
            value = at(before, key)
            if isinstance(value, dict) or key == _KIND or _ASKED.get(key) in applying:
                continue
            if value not in (None, at(default, key), at(written, key)):
                found.append(".".join(key))
        return found


_NOTHING: Answers = {question.name: None for question in QUESTIONS}


def problem_with(name: str, value: Any) -> str | None:
    """What is wrong with a setting by itself, or None."""
    key = key_of(name)
    _, problems = sound(put({}, key, value))
    return next((problem.text for problem in problems if problem.key == key), None)


def normal(name: str, value: Any) -> Any:
    """A value as the schema reads it: "3" is 3. Where it is wrong, as it is."""
    if name in HELPERS or value in (None, ""):
        return value
    config, problems = sound(put({}, key_of(name), value))
    return value if problems else at(config.model_dump(), key_of(name))


def at(values: Mapping[str, Any], key: Key, otherwise: Any = None) -> Any:
    """The value under a key, or another one where there is no such key."""
    found: Any = values
    for part in key:
        if not isinstance(found, Mapping) or part not in found:
            return otherwise
        found = found[part]
    return found


def put(values: Mapping[str, Any], key: Key, value: Any) -> dict[str, Any]:
    """`values` with one more; nothing is changed in place."""
    found = dict(values)
    if len(key) == 1:
        found[key[0]] = value
    else:
        section = found.get(key[0])
        found[key[0]] = put(section if isinstance(section, Mapping) else {}, key[1:], value)
    return found


def without(values: Mapping[str, Any], key: Key) -> dict[str, Any]:
    """`values` without a key, and without a section that it leaves empty."""
    found = dict(values)
    if len(key) > 1 and isinstance(found.get(key[0]), Mapping):
        section = without(found[key[0]], key[1:])
        found[key[0]] = section
        if not section:
            del found[key[0]]
    elif len(key) == 1:
        found.pop(key[0], None)
    return found
