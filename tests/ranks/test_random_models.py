"""Whatever a model is made of, its numbers are torch's: random models, in plain torch and under shardwise.

A failure prints its seed, and the shortest model that still fails, to be run by `problem_of(world, training, tokens)`.
"""

from __future__ import annotations

import os

import pytest

from rig.model_runs import drawn, problem_of
from rig.shrinking import shrunk

# `SHARDWISE_SEEDS=1000-1500 pytest -m full ...` draws others than the test does.
FIRST, LAST = map(int, os.environ.get("SHARDWISE_SEEDS", "10-310").split("-"))


def _kind_of(problem: str | None) -> str | None:
    """By what a shorter model is said to fail in the same way."""
    return None if problem is None else problem.split(": ")[1][:12] if ": " in problem else problem[:12]


def _check(world, seed: int) -> None:
    training, tokens = drawn(seed)
    problem = problem_of(world, training, tokens)
    if problem is None:
        return
    short = shrunk(tokens, lambda fewer: _kind_of(problem_of(world, training, fewer)) == _kind_of(problem))
    told = problem_of(world, training, short) or problem
    lines = "\n".join(f"    {token!r}," for token in short)
    pytest.fail(f"seed {seed}: {told}\n{training!r}\ntokens = [\n{lines}\n]\nAt first: {problem}", pytrace=False)


@pytest.mark.parametrize("seed", range(10))
def test_a_model_has_the_numbers_of_torch(world, seed):
    _check(world, seed)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(FIRST, LAST))
def test_many_models_have_the_numbers_of_torch(world, seed):
    _check(world, seed)
