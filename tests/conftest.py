"""What every test directory shares: the rank processes, and which tests run unless asked.

This file's directory is on sys.path, so `from rig import ...` works in every test.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rig import Worlds


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """`world(n)` is a pool of n joined gloo ranks, `world(n, "nccl")` of n CUDA ranks; see `rig`."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` looks for marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long runs unless `-m` names them: plain `pytest` is `make test`."""
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is not None and _is_thinned_out(item, *thinned.args):
            item.add_marker("full")
    if "full" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def _is_thinned_out(item: pytest.Item, share: int) -> bool:
    """Whether a case of a table of several axes is not among the one in `share` that `make test` has.

    Of every two axes a checkerboard stays: each value of each, and, where there is a third, each pair.
    """
    axes = [mark.args[0] for mark in item.iter_markers("parametrize")]
    indices = item.callspec.indices if axes else {}
    firsts = [(axis.split(",")[0] if isinstance(axis, str) else axis[0]).strip() for axis in axes]
    return len(axes) > 1 and sum(indices[first] for first in firsts) % share != 0
