"""What every test directory shares: the rank processes, and which tests run unless asked.

This file's directory is on sys.path, so `from rig import ...` works in every test.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Sequence

import pytest

# As ranks of the rig have it, for this process and those that it starts. Threads of OpenMP spin while they wait for one
# another: where test files run side by side a small product takes ten times as long with two as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from rig import Worlds
from rig.settled import settled

# With it, print writes a text and the end of its line one after the other, and what two ranks print runs together.
os.environ.pop("PYTHONUNBUFFERED", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-data", action="store_true", help="write what tests pin into tests/data anew")


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """`world(n)` is a pool of n joined gloo ranks, `world(n, "nccl")` of n CUDA ranks; see `rig`."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(autouse=True)
def levels_of_logging() -> Iterator[None]:
    """A test leaves the levels of the log as they were: `get_logger(name, "ERROR")` sets the root one, too."""
    names = ("", "shardwise")
    before = [logging.getLogger(name).level for name in names]
    yield
    for name, level in zip(names, before, strict=True):
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test, or a launcher's variables that it has read, put into the environment is gone with it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """A test leaves torch's settings as they were, as functions on ranks do."""
    with settled():
        yield


@pytest.hookimpl(tryfirst=True)  # before `-m` looks for marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long runs unless `-m` names them: plain `pytest` is `make test`."""
    for item in _thinned_out(items):
        item.add_marker("full")
    if "full" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_collection_finish() -> None:
    """Thousands of tests and their imports are no garbage: without this each `gc.collect()` of a test walks them, for 2 s."""
    gc.collect()
    gc.freeze()


def _thinned_out(items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """Of tables marked `thinned(n)`, the cases that are not among the one in n that `make test` has.

    Of every two axes a checkerboard stays: each value of each, and, where there is a third, each pair. A table of one axis is
    whole, for its cases are alike in nothing, but for `thinned(n, rows=True)`.
    """
    seen: dict[str, list[dict[tuple[int, ...], int]]] = {}  # of a test: the values of each axis, numbered
    places: list[
        tuple[pytest.Item, str, int, int]
    ] = []  # an item, its test, one in how many stays, the sum of its places
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is None:
            continue
        axes = [mark.args[0] for mark in item.iter_markers("parametrize")]
        if len(axes) < (1 if thinned.kwargs.get("rows") else 2):
            continue
        test = item.nodeid.partition("[")[0]
        known = seen.setdefault(test, [{} for _ in axes])
        at = 0
        for axis, values in zip(axes, known, strict=True):
            names = [name.strip() for name in axis.split(",")] if isinstance(axis, str) else list(axis)
            at += values.setdefault(tuple(id(item.callspec.params[name]) for name in names), len(values))
        places.append((item, test, thinned.args[0], at))
    for item, test, each, at in places:
        steps = [len(values) - 1 for values in seen[test]]
        # No more than that each value of each axis meets one of the others that stays.
        most = min(sum(steps) - own + 1 for own in steps) if len(steps) > 1 else each
        if at % min(each, most):
            yield item
