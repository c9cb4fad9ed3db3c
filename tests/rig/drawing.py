"""Random programs: lists of verbs and their plain arguments, over a number of steps."""

from __future__ import annotations

import random
from typing import Any

from rig.settings import Setting
from rig.verbs import CHANGES, READS, WRITES

Line = tuple[Any, ...]  # a verb's name and its arguments
Program = list[Line]

STEPS = 12


class Drawing:
    """Draws the lines of one program."""

    def __init__(self, seed: int, setting: Setting) -> None:
        self.source = random.Random(f"program {seed}")
        self.setting = setting
        self._batches = 0
        self._saved: list[str] = []

    # Verbs by where scripts have them. Each is (weight, function).

    def program(self) -> Program:
        lines: Program = []
        for _ in range(STEPS):
            lines += self._some(self._before, [0, 0, 1, 2])
            lines += self._micro_batches()
            lines += self._some(self._between, [0, 0, 1, 2, 3])
            lines += self._steps()
            lines += self._some(self._after, [0, 0, 1, 1])
        return lines

    def _some(self, draw: Any, counts: list[int]) -> Program:
        return [line for _ in range(self.source.choice(counts)) for line in draw()]

    def _pick(self, *ways: tuple[float, Any]) -> Program:
        weights = [weight for weight, _ in ways]
        (chosen,) = self.source.choices([way for _, way in ways], weights)
        return chosen()

    def part(self) -> str:
        return self.source.choice(self.setting.parts)

    def factor(self) -> float:
        return self.source.choice([0.25, 0.5, 0.9, 1.1, 1.5])

    def number(self) -> int:
        return self.source.randrange(2)

    def batch(self) -> int:
        self._batches += 1
        return self._batches

    def _before(self) -> Program:
        pick = self.source.choice
        adapters = 4 if self.setting.model == "lora" else 0
        return self._pick(
            (2, lambda: [("freeze", self.part())]),
            (3, lambda: [("thaw", self.part())]),
            (adapters, lambda: [("set_adapter", pick(["default", "other"]))]),
            (1.5, lambda: [("add_group", self.number(), self.part(), pick([0.01, 0.002]))]),
            (1, lambda: [("set_rate", self.number(), self.factor())]),
            (1, lambda: [("evaluate", self.batch(), pick([False, False, True]))]),
            (0.5, lambda: [("forward_only", self.batch())]),
            (1, self._write),
        )

    def _micro_batches(self) -> Program:
        source = self.source
        if self.setting.accumulate > 1:
            count = self.setting.accumulate if source.random() < 0.9 else source.choice([0, 1, 2])
            lines: Program = []
            for _ in range(count):
                lines += [("backward", self.batch(), self._kind())]
                if source.random() < 0.3:
                    lines += self._between()
                if source.random() < 0.5:  # they do nothing yet, as in accelerate
                    lines += [("step", 0), ("zero", 0)]
            return lines
        count = source.choice([1, 1, 1, 1, 2, 3, 0])
        quiet = source.random() < 0.5
        lines = []
        for left in range(count, 0, -1):
            lines += [("backward", self.batch(), self._kind(), quiet and left > 1)]
            if left > 1 and source.random() < 0.3:
                lines += self._between()
        return lines

    def _kind(self) -> str:
        names = ["retained", "two_forwards", "two_losses", "in_an_object", "caught", "penalised", "regularised"]
        names += ["input_gradients", "caught_alone", "interrupted", "interrupted_backward"]
        return self.source.choice(["plain"] * 12 + names)

    def _between(self) -> Program:
        pick = self.source.choice
        return self._pick(
            (3, lambda: [("read", self.part(), pick(list(READS)))]),
            (3, lambda: [("change", self.part(), pick(list(CHANGES)), self.factor())]),
            (1, lambda: [("scale_by_a_list", self.part(), self.factor())]),
            (1, lambda: [("give", self.part(), pick([0.01, -0.02]))]),
            (1, lambda: [("add_noise", self.part(), self.source.randrange(99))]),
            (1, lambda: [("drop", self.part())]),
            (0.4, lambda: [("zero_model", pick([True, False]))]),
            (0.4, lambda: [("zero", self.number(), pick([True, False]))]),
            (2, lambda: [("clip", self.part(), pick(["2.0", "1.0", "inf", "value"]), pick([0.05, 0.01, 5.0]))]),
            (
                2,
                lambda: [("clip_by_torch", self.part(), pick(["2.0", "1.0", "inf", "value"]), pick([0.05, 0.01, 5.0]))],
            ),
            (0.5, self._write),
            (0.3, lambda: [("evaluate", self.batch(), False)]),
            (0.3, lambda: [("look", self.part())]),
            (0.3, lambda: [("freeze", self.part())]),
            (0.3, lambda: [("thaw", self.part())]),
        )

    def _steps(self) -> Program:
        source = self.source
        lines: Program = []
        if source.random() < 0.92:
            lines += [("step", 0)]
            if source.random() < 0.08:
                lines += [("step", 0)]
            if len(self.setting.optimizers) > 1 and source.random() < 0.8:
                lines += [("step", 1)]
        if self.setting.scheduler != "none" and source.random() < 0.9:
            lines += [("schedule",)]
        drawn = source.random()
        if drawn < 0.6:
            lines += [("zero", 0), *([("zero", 1)] if len(self.setting.optimizers) > 1 else [])]
        elif drawn < 0.8:
            lines += [("zero_model", True)]
        elif drawn < 0.86:
            lines += [("zero", 0, False)]
        elif drawn < 0.92:
            lines += [("drop", "")]
        return lines

    def _write(self) -> Program:
        pick = self.source.choice
        return [("write", self.part(), pick(list(WRITES)), self.factor(), pick([False, False, True]))]

    def _after(self) -> Program:
        pick = self.source.choice
        generating = 2 if self.setting.model == "lora" else 0
        return self._pick(
            (1, lambda: [("evaluate", self.batch(), pick([False, True]))]),
            (1, lambda: [("look", self.part())]),
            (2, self._write),
            (1, lambda: [("load_weights", self.source.randrange(99))]),
            (1, lambda: [("average",)]),
            (1, lambda: [("evaluate_average", self.batch())]),
            (generating, lambda: [("generate", self.batch())]),
            (generating / 2, lambda: [("evaluate_without_adapter", self.batch())]),
            (1.5, lambda: [("save", pick("ab"), pick([True, True, False]))]),
            (1.5, lambda: [("load", pick("ab"), pick([False, False, True]))]),
            (1, lambda: [("keep_states", self.number())]),
            (1, lambda: [("restore_states", self.number())]),
        )


def drawn(seed: int) -> tuple[Setting, Program]:
    """The setting and the program of a seed."""
    setting = Setting.drawn(seed)
    return setting, Drawing(seed, setting).program()
