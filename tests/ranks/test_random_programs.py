"""Whatever a legal script does, the numbers are torch's: random programs of verbs, once in plain torch and once under shardwise.

A failure prints its seed, and the shortest program that still fails, to be run by `_problem(world, setting, program)`.
"""

from __future__ import annotations

import tempfile

import pytest

from rig.drawing import Program, drawn
from rig.programs import play
from rig.settings import Setting
from rig.shrinking import shrunk


def _problem(world, setting: Setting, program: Program) -> str | None:
    """What is wrong with a program; a rank that dies or hangs is wrong too."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = world(setting.ranks).run(play, setting, program, folder, timeout_s=60)
        except Exception as error:
            return f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", []))
    return next((text for text in found if text), None)


def _kind_of(problem: str | None) -> str | None:
    """By what a shorter program is said to fail in the same way."""
    return None if problem is None else problem.split(": ")[0].split(",")[0][:4]


def _check(world, seed: int) -> None:
    setting, program = drawn(seed)
    problem = _problem(world, setting, program)
    if problem is None:
        return
    short = shrunk(program, lambda lines: _kind_of(_problem(world, setting, lines)) == _kind_of(problem))
    told = _problem(world, setting, short) or problem
    lines = "\n".join(f"    {line!r}," for line in short)
    pytest.fail(f"seed {seed}: {told}\nsetting = {setting!r}\nprogram = [\n{lines}\n]\nAt first: {problem}", pytrace=False)


@pytest.mark.parametrize("seed", range(20))
def test_a_program_has_the_numbers_of_torch(world, seed):
    _check(world, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20, 520))
def test_many_programs_have_the_numbers_of_torch(world, seed):
    _check(world, seed)
