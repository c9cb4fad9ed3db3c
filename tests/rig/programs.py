"""Runs a random program in both ways, verb by verb, and says where they part. See `rig.drawing` for what is drawn."""

from __future__ import annotations

import gc
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor

from rig import Worlds
from rig.drawing import Program
from rig.refused import is_refused
from rig.scripts import Plain, Prepared, Script, rebuild
from rig.settings import Setting
from rig.verbs import VERBS
from shardwise.errors import ShardwiseError
from shardwise.ranks.agreeing import attempt


def problem_of(world: Worlds, setting: Setting, program: Program) -> str | None:
    """How a program goes wrong, in words; None if it does not. A rank that dies or hangs is wrong too."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = world(setting.ranks).run(play, setting, program, folder, timeout_s=60)
        except Exception as error:
            return f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", []))
    return next((text for text in found if text), None)


def play(ranks: Any, setting: Setting, program: Program, folder: str) -> str | None:
    """How the program's numbers are not plain torch's, in one sentence on every rank; None if they are."""
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # a script may do it in either order
    warnings.filterwarnings("ignore", message=".*non-full backward hook.*")
    # A script that thaws nothing of what it recomputes is told so by torch.
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
    try:
        return _Play(ranks, setting, folder).run(program)
    finally:
        gc.collect()


class _Play:
    def __init__(self, ranks: Any, setting: Setting, folder: str) -> None:
        self.ranks = ranks
        self.setting = setting
        self.prepared = Prepared(setting, ranks, folder)
        self.plain = Plain(setting, ranks.world_size, ranks.rank)

    def run(self, program: Program) -> str | None:
        for place, (name, *args) in enumerate(program):
            problem = self._line(name, args)
            said = self.ranks.gather_objects(problem)
            if any(said):
                first = next(rank for rank, text in enumerate(said) if text)
                whose = "all ranks" if all(said) else f"rank {first}"
                return f"line {place}, {name}{tuple(args)}: on {whose}: {said[first]}"
        problem = self._weights_differ() or self._states_differ()
        return next((f"at the end: {text}" for text in self.ranks.gather_objects(problem) if text), None)

    def _line(self, name: str, args: list[Any]) -> str | None:
        """What is wrong with one verb."""
        self.prepared.seen, self.plain.seen = [], []
        _, error = attempt(lambda: VERBS[name](self.prepared, *args))
        if isinstance(error, ShardwiseError):
            if is_refused(name, args, error, self.plain):
                if name == "backward":
                    self.plain.count(quiet=args[2:] == [True])
                if name == "load" and args[1]:  # its objects were built again before that
                    rebuild(self.plain)
                for script in (self.prepared, self.plain):  # a script that meets an error throws its batch away
                    script.model.zero_grad()
                return None
            return f"{type(error).__name__}: {error}"
        _, expected = attempt(lambda: VERBS[name](self.plain, *args))
        if type(error) is not type(expected):
            return f"raised {_said(error)}, torch {_said(expected)}"
        if expected is not None:
            for script in (self.prepared, self.plain):
                script.model.zero_grad()
            return None
        problem = self._seen_differs()
        if problem is None and name == "step" and self.setting.looks:
            problem = self._weights_differ()
        return problem

    def _seen_differs(self) -> str | None:
        found, wanted = self.prepared.seen, self.plain.seen
        if [what for what, _ in found] != [what for what, _ in wanted]:
            return f"saw {[what for what, _ in found]}, torch {[what for what, _ in wanted]}"
        for (what, value), (_, expected) in zip(found, wanted, strict=True):
            problem = differs(value, expected, self.setting.tolerance)
            if problem:
                return f"{what}: {problem}"
        return None

    def _weights_differ(self) -> str | None:
        found, wanted = self.prepared.weights(), self.plain.weights()
        for name, value in wanted.items():
            problem = differs(found[name], value, self.setting.tolerance)
            if problem:
                return f"{name}: {problem}"
        return _gradients_differ(self.prepared, self.plain)

    def _states_differ(self) -> str | None:
        for found, wanted in zip(self.prepared.states(), self.plain.states(), strict=True):
            for group, expected in zip(found["param_groups"], wanted["param_groups"], strict=True):
                problem = differs(group, {**expected, "fused": group.get("fused")}, 1e-9)
                if problem:
                    return f"group of the optimizer: {problem}"
            if found["state"].keys() != wanted["state"].keys():
                return f"states of {sorted(found['state'])}, torch of {sorted(wanted['state'])}"
            for number, state in wanted["state"].items():
                problem = differs(found["state"][number], state, 10 * self.setting.tolerance)
                if problem:
                    return f"state of parameter {number}: {problem}"
        return None


def _gradients_differ(prepared: Script, plain: Script) -> str | None:
    """Whether parameters have a gradient, and require one, as in torch."""
    for (name, found), (_, wanted) in zip(prepared.chosen(""), plain.chosen(""), strict=True):
        if found.requires_grad != wanted.requires_grad:
            return f"{name}.requires_grad is {found.requires_grad}"
        if (found.grad is None) != (wanted.grad is None):
            return f"{name}.grad is {'None' if found.grad is None else 'a tensor'}, in torch it is not"
    return None


def _said(error: Exception | None) -> str:
    return "nothing" if error is None else f"{type(error).__name__}: {error}"


def differs(found: Any, wanted: Any, tolerance: float) -> str | None:
    """How two values differ, tensors by more than the tolerance relative to max(1, |wanted|); None if they do not."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            return f"{list(found) if isinstance(found, dict) else found} is not {list(wanted)}"
        pairs = [(f"{key}: ", found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, (list, tuple)):
        if len(found) != len(wanted):
            return f"{len(found)} items instead of {len(wanted)}"
        pairs = [("", *pair) for pair in zip(found, wanted, strict=True)]
    elif isinstance(wanted, Tensor):
        if found.shape != wanted.shape:
            return f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        off = (found.to(wanted.dtype) - wanted).abs() / wanted.abs().clamp(min=1)
        largest = off.max().item() if off.numel() else 0.0
        if not largest <= tolerance:  # NaN too
            index = int(torch.nan_to_num(off, nan=torch.inf).argmax())
            return f"off by {largest:.3g}: {found.reshape(-1)[index].item()!r} instead of {wanted.reshape(-1)[index].item()!r}"
        return None
    elif isinstance(wanted, float):
        return None if abs(found - wanted) <= tolerance * max(1.0, abs(wanted)) else f"{found!r} instead of {wanted!r}"
    else:
        return None if found == wanted else f"{found!r} instead of {wanted!r}"
    for before, one, other in pairs:
        problem = differs(one, other, tolerance)
        if problem:
            return before + problem
    return None
