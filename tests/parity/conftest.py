"""Keeps the differences that the parity cases measured and prints the largest of them at the end of the run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_measured: dict[str, list[tuple[str, dict[str, float]]]] = {}


@pytest.fixture
def note_difference(request: pytest.FixtureRequest) -> Callable[[str, dict[str, float]], None]:
    """`note_difference("fp32", difference)` puts a case's figures into the table's summary."""
    return lambda precision, found: _measured.setdefault(precision, []).append((request.node.name, found))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for precision, cases in _measured.items():
        terminalreporter.section(f"parity in {precision}: {len(cases)} cases")
        for what in ("loss", "norm", "weight"):
            name, found = max(cases, key=lambda case: case[1][what])
            terminalreporter.write_line(f"largest difference of {what}: {found[what]:.2e} in {name}")
