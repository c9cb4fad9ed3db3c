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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long runs unless `-m` names them: plain `pytest` is `make test`."""
    if "full" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("full")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
