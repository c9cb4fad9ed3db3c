"""Whatever lies in the place of a checkpoint: it is skipped or refused by one sentence, the same on all ranks, soon, in little
memory, with nothing written outside; and the good one beside it is used.

The short form draws each kind once and some more; the long one, marked `full`, 500.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ranks.spoiling import Spoiling, drawn, one_of_each
from ranks.test_checkpoint_failures import Run
from rig.heard import heard
from shardwise.errors import CheckpointError

LIMIT_S = 10.0
LIMIT_BYTES = 1 << 30
NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A directory that other users may enter, as pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="shardwise-files-"))
    folder.chmod(0o755)
    yield folder
    for root, names, _ in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                os.chmod(os.path.join(root, name), 0o700)
    shutil.rmtree(folder)


@contextmanager
def as_another_user(wanted: bool) -> Iterator[None]:
    """Root may read everything, so it takes another user's rights meanwhile; others are other users to a mode of 000."""
    drop = wanted and os.geteuid() == 0
    if drop:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if drop:
            os.seteuid(0)


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything below `folder`: kinds, sizes, times, modes, links."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _two(ranks: Any, folder: str) -> list[list[float]]:
    """Two checkpoints in folder/start, of the steps 1 and 2; the weights after 0, 1 and 2 steps."""
    run = Run(f"{folder}/start")
    expected = [run.weights()]
    for _ in range(2):
        run.train()
        run.accelerator.save_state()
        expected.append(run.weights())
    run.close()
    return expected


class Trial:
    """Spoiled checkpoints, one after another, in the place of the run's own."""

    def __init__(self, ranks: Any, folder: str, expected: list[list[float]]) -> None:
        self.ranks, self.expected = ranks, expected
        self.folder = Path(folder)
        self.place = self.folder / "here" / "checkpoints"
        self.run = Run(str(self.folder / "here"), total_limit=1)
        self.outcomes: Counter[str] = Counter()
        self.run.accelerator.load_state(self.folder / "start/checkpoints/checkpoint_0")  # imports what loading needs
        self.before = peak_bytes()

    def one(self, spoiling: Spoiling, named: bool, save: bool) -> None:
        ranks = self.ranks
        ranks.barrier()  # nobody still looks at the last one
        if ranks.rank == 0:
            shutil.rmtree(self.place.parent, ignore_errors=True)
            shutil.copytree(self.folder / "start/checkpoints", self.place)
            for path in (self.place.parent, self.place, *self.place.iterdir()):
                path.chmod(0o755)
            spoiling(self.place / "checkpoint_1", self.place / "checkpoint_0")
        ranks.barrier()
        outside = snapshot(self.folder)
        with heard() as lines, as_another_user(spoiling.by_others):
            began = time.monotonic()
            there = self.run.accelerator.has_checkpoint()
            outcome, words = self._load(named)
            took = time.monotonic() - began
        facts = ranks.gather_objects((there, outcome, words))
        assert facts[0] == facts[1], f"{spoiling.words}: {facts}"
        assert there, spoiling.words
        assert took < LIMIT_S, f"{spoiling.words}: {took:.1f} s"
        assert peak_bytes() - self.before < LIMIT_BYTES, spoiling.words
        assert snapshot(self.folder) == outside, spoiling.words
        for line in [*lines, words]:
            assert "\n" not in line, (spoiling.words, line)
            assert "\x1b" not in line, (spoiling.words, line)
            assert len(line) < 2500, (spoiling.words, line)
            assert "Traceback" not in line
        # What is no directory is not meant as a checkpoint, and a forged order may be an older one's.
        meant = "it is" not in spoiling.words and "forged manifest" not in spoiling.words
        if outcome == "the good one" and ranks.rank == 0 and meant:
            assert any("Skipped" in line and "checkpoint_1" in line for line in lines), spoiling.words
        self.outcomes[outcome] += 1
        if save and not spoiling.by_others:
            self._save(spoiling)

    def _load(self, named: bool) -> tuple[str, str]:
        path = self.place / "checkpoint_1" if named else None
        try:
            self.run.accelerator.load_state(path)
        except CheckpointError as error:
            return "refused", str(error)
        weights = self.run.weights()
        if weights == self.expected[1]:
            return "the good one", ""
        # Whatever else was changed, nobody takes other numbers for the weights.
        assert weights == self.expected[2]
        return "unharmed", ""

    def _save(self, spoiling: Spoiling) -> None:
        """The next automatic save works beside it; its limit removes nothing outside."""
        start = snapshot(self.folder / "start")
        with heard():
            path = Path(self.run.accelerator.save_state())
            assert path.parent == self.place, spoiling.words
            self.run.accelerator.load_state(path)
        assert snapshot(self.folder / "start") == start, spoiling.words

    def close(self) -> tuple[Counter[str], int]:
        self.run.close()
        return self.outcomes, peak_bytes() - self.before


def _spoiled(ranks: Any, folder: str, expected: list[list[float]], draws: list[int], first: int | None) -> Any:
    trial = Trial(ranks, folder, expected)
    spoilings = [*(one_of_each(first) if first is not None else []), *map(drawn, draws)]
    for number, spoiling in enumerate(spoilings):
        trial.one(spoiling, named=number % 3 == 2, save=number % 7 == 0)
    return trial.close()


def _report(results: list[Any], count: int, capsys: Any) -> None:
    outcomes, grew = results[0][0], max(grew for _, grew in results)
    with capsys.disabled():
        print(f"\n{count} spoiled checkpoints: {dict(sorted(outcomes.items()))}; grew by {grew >> 20} MiB at most")
    assert sum(outcomes.values()) == count
    assert outcomes["the good one"] > count / 3


def test_a_spoiled_checkpoint_is_skipped_or_refused_and_the_good_one_is_used(world, open_folder, capsys):
    expected = world(2).run(_two, str(open_folder))[0]
    kinds = len(one_of_each(0))
    results = world(2).run(_spoiled, str(open_folder), expected, list(range(20)), 1)
    _report(results, kinds + 20, capsys)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_five_hundred_spoiled_checkpoints(world, open_folder, capsys):
    expected = world(2).run(_two, str(open_folder))[0]
    results = world(2).run(_spoiled, str(open_folder), expected, list(range(1000, 1500)), None, timeout_s=1000)
    _report(results, 500, capsys)
