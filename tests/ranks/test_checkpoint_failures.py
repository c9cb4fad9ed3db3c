"""Nothing is lost: whatever happens during a save, the next start finds the newest complete checkpoint and says why not
a newer one.

A save is a sequence of file operations (`files/disk.py`). Here a process is really killed before the n-th of them,
for every n; the disk is full at the n-th; files are cut, changed and deleted. The short form runs in `make test`; the long
one, marked `full`, kills single processes, one rank and all ranks at more than 200 points and prints its counts.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rig import RankCrashedError
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint.read import Checkpoint
from shardwise.errors import CheckpointError
from shardwise.files import disk
from shardwise.run.plugins import ProjectConfiguration
from shardwise.run.process import forget_run
from shardwise.zero.sharded import find_sharded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.blocks[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


class Run:
    """A run of a few numbers; `train` takes steps that depend on nothing but the step.

    A file "optimizer" in the folder says of which class of torch's it takes them; AdamW without one.
    """

    def __init__(self, folder: str, stage: int = 3, total_limit: int | None = None, **project: Any) -> None:
        forget_run()
        project_config = ProjectConfiguration(
            project_dir=folder, automatic_checkpoint_naming=True, total_limit=total_limit, **project
        )
        self.accelerator = Accelerator(
            cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage), project_config=project_config
        )
        self.model = Net()
        said = Path(folder) / "optimizer"
        make = getattr(torch.optim, said.read_text() if said.exists() else "AdamW")
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
        self.accelerator.prepare(self.model, self.optimizer)
        self.steps = 0
        self.accelerator.register_for_checkpointing(self)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.steps += 1
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.steps))
            self.accelerator.backward(self.model(x).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[float]:
        sharded = find_sharded(self.model)
        assert sharded is not None
        with sharded.gathered():
            return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).tolist()

    def close(self) -> None:
        self.accelerator.end_training()
        self.accelerator.free_memory()


def first_checkpoint(ranks: Any, folder: str) -> list[list[float]]:
    """Save after step 1; gives the weights after 0, 1, 2 steps, which later runs are held against."""
    run = Run(folder)
    expected = [run.weights()]
    run.train()
    run.accelerator.save_state()
    expected.append(run.weights())
    run.train()
    expected.append(run.weights())
    run.close()
    return expected


def resume(ranks: Any, folder: str) -> tuple[int, list[float], list[str]]:
    """What the next start finds: its step, its weights, what it said about others; and it can save."""
    with heard() as said:
        run = Run(folder)
        run.accelerator.load_state()
        found = run.steps, run.weights(), said
        run.accelerator.save_state()
        run.close()
    return found


class Failing:
    """Called before every file operation; at the `at`-th it does `what`. Without a number it counts them."""

    def __init__(self, at: int | None = None, what: Callable[[], None] | None = None) -> None:
        self.at, self.what = at, what
        self.seen: list[str] = []

    def __call__(self, operation: str, path: Path) -> None:
        if len(self.seen) == self.at and self.what is not None:
            self.what()
        self.seen.append(operation)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def second_save(folder: str, total_limit: int | None, failing: Failing, async_: bool = False) -> list[str]:
    """The newest checkpoint is loaded, one more step is taken, and saved, with failures. The operations that were made."""
    run = Run(folder, total_limit=total_limit)
    run.accelerator.load_state()
    run.train()
    with disk.watched(failing):
        run.accelerator.save_state(async_=async_)
        run.accelerator.finish_saving()
    run.close()
    return failing.seen


def check(folder: Path, found: tuple[int, list[float], list[str]], expected: list[list[float]]) -> int:
    """The step that a resume found, after making sure that its weights are that step's."""
    step, weights, _ = found
    assert weights == expected[step]
    assert not list(folder.glob("checkpoints/.staging-*")), "the next save cleans up"
    return step


# One process, killed at every operation. The children are forked by a rank of one: a fork costs milliseconds.


def _killed_everywhere(ranks: Any, folder: str, total_limit: int | None, async_: bool) -> Counter[int]:
    expected = first_checkpoint(ranks, f"{folder}/start")
    shutil.copytree(f"{folder}/start", f"{folder}/count")
    count = len(second_save(f"{folder}/count", total_limit, Failing(), async_))
    outcomes: Counter[int] = Counter()
    for at in range(count):
        place = Path(folder) / f"at{at}"
        shutil.copytree(f"{folder}/start", place)
        child = os.fork()
        if child == 0:
            try:
                second_save(str(place), total_limit, Failing(at, die), async_)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"operation {at} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        outcomes[check(place, resume(ranks, str(place)), expected)] += 1
        shutil.rmtree(place)
    return outcomes


@pytest.mark.parametrize(("total_limit", "async_"), [(None, False), (1, False), (1, True)])
def test_a_process_killed_before_any_file_operation_of_a_save_loses_nothing(world, tmp_path, total_limit, async_):
    outcomes = world(1).run(_killed_everywhere, str(tmp_path), total_limit, async_)[0]
    assert set(outcomes) <= {1, 2}
    assert sum(outcomes.values()) >= 20
    assert outcomes[1] > 5
    assert outcomes[2] > 0  # after the rename the new one counts


def _killed_while_replacing(ranks: Any, folder: str) -> Counter[int]:
    """A checkpoint of a name of its own is saved anew, and the process killed at every operation of that."""
    run = Run(f"{folder}/start", stage=1)
    expected = [run.weights()]
    for _ in range(2):
        run.train()
        expected.append(run.weights())
        if run.steps == 1:
            run.accelerator.save_state(f"{folder}/start/state")
    run.close()

    def replace(place: str, failing: Failing) -> None:
        again = Run(place, stage=1)
        again.accelerator.load_state(f"{place}/state")
        again.train()
        with disk.watched(failing):
            again.accelerator.save_state(f"{place}/state")

    outcomes: Counter[int] = Counter()
    at = 0
    while True:
        place = f"{folder}/at{at}"
        shutil.copytree(f"{folder}/start", place)
        child = os.fork()
        if child == 0:
            try:
                replace(place, Failing(at, die))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return outcomes
        for path in (f"{place}/state", f"{place}/latest"):
            found = Run(place, stage=1)
            found.accelerator.load_state(path)
            assert found.weights() == expected[found.steps]
            found.accelerator.free_memory()
        outcomes[found.steps] += 1
        at += 1


def test_a_checkpoint_that_is_being_replaced_is_never_missing(world, tmp_path):
    outcomes = world(1).run(_killed_while_replacing, str(tmp_path))[0]
    assert outcomes[1] > 5
    assert outcomes[2] > 0
    assert sum(outcomes.values()) >= 15


# Several ranks.


def _operations(ranks: Any, folder: str, total_limit: int | None, async_: bool) -> list[str]:
    return second_save(folder, total_limit, Failing(), async_)


def _save_and_fail(
    ranks: Any, folder: str, at: int, who: int | None, what: str, total_limit: int | None = 1, async_: bool = False
) -> str | None:
    mine = who is None or ranks.rank == who
    failing = Failing(at if mine else None, die if what == "die" else full_disk)
    try:
        second_save(folder, total_limit, failing, async_)
    except CheckpointError as error:
        return str(error)
    return None


def _save_and_be_killed(ranks: Any, folder: str, after_s: float, who: int | None) -> None:
    """A timer kills the process, wherever it is: inside a write, in a rename, in a collective."""
    run = Run(folder, total_limit=1)
    run.accelerator.load_state()
    run.train()
    if who is None or ranks.rank == who:
        threading.Thread(target=lambda: (time.sleep(after_s), die()), daemon=True).start()
    while True:
        run.accelerator.save_state()
        run.train()


def _resume_after(world: Any, start: Path, place: Path, kill: Callable[[], Any]) -> tuple[int, list[float], list[str]]:
    """Copy `start`, have its run killed by `kill`, and start it again."""
    shutil.copytree(start, place)
    with pytest.raises(RankCrashedError) as crash:
        kill()
    assert crash.value.exitcode == -signal.SIGKILL
    found: tuple[int, list[float], list[str]] = world(2).run(resume, str(place))[0]
    assert not list(place.glob("checkpoints/.staging-*")), "the next save cleans up"
    shutil.rmtree(place)
    return found


def _points(world: Any, tmp_path: Path, total_limit: int | None, async_: bool) -> list[tuple[int | None, int]]:
    """Every operation of rank 0, of rank 1, and of both."""
    world(2).run(first_checkpoint, str(tmp_path / "count"))
    counts = [len(seen) for seen in world(2).run(_operations, str(tmp_path / "count"), total_limit, async_)]
    shutil.rmtree(tmp_path / "count")
    found: list[tuple[int | None, int]] = [(rank, at) for rank in (0, 1) for at in range(counts[rank])]
    return found + [(None, at) for at in range(min(counts))]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("optimizer", "async_"), [("AdamW", False), ("Adafactor", False), ("AdamW", True)])
def test_ranks_killed_during_a_save_lose_nothing(world, tmp_path, optimizer, async_):
    points = _points(world, tmp_path, 1, async_)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "optimizer").write_text(optimizer)
    expected = world(2).run(first_checkpoint, str(tmp_path / "start"))[0]
    for number, (who, at) in enumerate(points[3 :: len(points) // 5]):
        place = tmp_path / f"point{number}"
        step, weights, _ = _resume_after(
            world,
            tmp_path / "start",
            place,
            lambda: world(2).run(_save_and_fail, str(place), at, who, "die", 1, async_),  # noqa: B023
        )
        assert step in (1, 2)
        assert weights == expected[step]


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("total_limit", "async_"), [(None, False), (1, False), (1, True)])
def test_ranks_killed_at_every_operation_lose_nothing(world, tmp_path, capsys, total_limit, async_):
    points = _points(world, tmp_path, total_limit, async_)
    expected = world(2).run(first_checkpoint, str(tmp_path / "start"))[0]
    outcomes: Counter[int] = Counter()
    for number, (who, at) in enumerate(points):
        place = tmp_path / f"point{number}"
        step, weights, _ = _resume_after(
            world,
            tmp_path / "start",
            place,
            lambda: world(2).run(_save_and_fail, str(place), at, who, "die", total_limit, async_),  # noqa: B023
        )
        assert weights == expected[step]
        outcomes[step] += 1
    with capsys.disabled():
        print(f"\n{len(points)} kills at file operations of 2 ranks; resumed at step: {dict(outcomes)}")
    assert outcomes[1] + outcomes[2] == len(points)


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_ranks_killed_at_any_instant_lose_nothing(world, tmp_path, capsys):
    world(2).run(first_checkpoint, str(tmp_path / "start"))
    chance = random.Random(17)
    outcomes: Counter[int] = Counter()
    points = 70
    for number in range(points):
        place = tmp_path / f"point{number}"
        after_s, who = chance.uniform(0.0, 0.12), chance.choice([0, 1, None])
        step, weights, _ = _resume_after(
            world,
            tmp_path / "start",
            place,
            lambda: world(2).run(_save_and_be_killed, str(place), after_s, who),  # noqa: B023
        )
        assert step >= 1
        assert weights == world(1).run(_weights_after, step)[0]
        outcomes[step] += 1
    with capsys.disabled():
        print(f"\n{points} kills of 2 ranks at random instants; resumed at step: {dict(sorted(outcomes.items()))}")


def _weights_after(ranks: Any, steps: int) -> list[float]:
    run = Run("unused")
    run.train(steps)
    found = run.weights()
    run.accelerator.free_memory()
    return found


def _full_disk_everywhere(ranks: Any, folder: str) -> tuple[int, Counter[int]]:
    expected = first_checkpoint(ranks, folder)
    run = Run(folder)
    run.accelerator.load_state()
    run.train()
    at, outcomes = 0, Counter[int]()
    while True:
        failing = Failing(at, full_disk)
        try:
            with disk.watched(failing):
                run.accelerator.save_state()
        except CheckpointError as error:
            assert "No space left" in str(error)  # noqa: PT017 - some points succeed
        if len(failing.seen) < at:
            break
        found = sorted(Path(folder, "checkpoints").glob("checkpoint_*"))
        for path in found:
            Checkpoint(path).verify()
        outcomes[len(found)] += 1
        for path in found[1:]:
            shutil.rmtree(path)
        at += 1
        run.accelerator._ranks.barrier()
    # The run has survived all of them, and goes on with what it had.
    assert run.weights() == expected[2]
    run.close()
    return at, outcomes


def test_a_full_disk_is_one_error_and_the_run_goes_on(world, tmp_path):
    points, outcomes = world(1).run(_full_disk_everywhere, str(tmp_path))[0]
    assert points > 15
    assert min(outcomes) >= 1


def test_an_error_of_one_rank_is_the_same_error_on_all(world, tmp_path):
    world(2).run(first_checkpoint, str(tmp_path))
    for who, at in ((1, 2), (0, 3)):
        words = world(2).run(_save_and_fail, str(tmp_path), at, who, "full")
        assert words[0] == words[1]
        assert f"rank {who}" in words[0]
        assert "No space left" in words[0]
    assert world(2).run(resume, str(tmp_path))[0][0] == 1


# Damage.


def _damage(folder: Path, what: str) -> None:
    newest = folder / "checkpoints" / "checkpoint_1"
    tensors = newest / "rank-00001.safetensors"
    if what == "truncated":
        os.truncate(tensors, tensors.stat().st_size - 8)
    elif what == "flipped":
        data = bytearray(tensors.read_bytes())
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif what == "flipped index":
        index = newest / "rank-00000.json"
        index.write_text(index.read_text().replace("exp_avg", "exp_avg", 1).replace("0", "1", 1))
    elif what == "deleted":
        tensors.unlink()
    elif what == "no manifest":
        (newest / "manifest.json").unlink()
    elif what == "other manifest":
        (newest / "manifest.json").write_text('{"model": "bert"}')
    elif what == "flipped manifest":
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"step": 2', '"step": 3'))
    elif what == "foreign":
        shutil.rmtree(newest)
        newest.mkdir()
        (newest / "pytorch_model.bin").write_bytes(b"x")


def _two_checkpoints(ranks: Any, folder: str) -> None:
    second_save(folder, None, Failing())


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated", "bytes instead of"),
        ("flipped", "damaged between bytes"),
        ("flipped index", "checksum differs"),
        ("deleted", "is missing"),
        ("no manifest", "has no manifest.json"),
        ("other manifest", "does not say"),
        ("flipped manifest", "checksum differs"),
        ("foreign", "not a checkpoint of shardwise"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_its_reason(world, tmp_path, what, reason):
    expected = world(2).run(first_checkpoint, str(tmp_path))[0]
    world(2).run(_two_checkpoints, str(tmp_path))
    _damage(tmp_path, what)
    step, weights, said = world(2).run(resume, str(tmp_path))[0]
    assert step == 1
    assert weights == expected[1]
    assert any("Skipped" in words and reason in words for words in said), said


def _load(ranks: Any, folder: str, path: str) -> str:
    run = Run(folder)
    try:
        run.accelerator.load_state(path)
    except CheckpointError as error:
        return str(error)
    finally:
        run.accelerator.free_memory()
    return "loaded"


def test_a_damaged_checkpoint_that_is_asked_for_is_an_error_on_every_rank(world, tmp_path):
    world(2).run(first_checkpoint, str(tmp_path))
    world(2).run(_two_checkpoints, str(tmp_path))
    _damage(tmp_path, "flipped")
    words = world(2).run(_load, str(tmp_path), str(tmp_path / "checkpoints" / "checkpoint_1"))
    assert words[0] == words[1]
    assert "damaged" in words[0]
    words = world(2).run(_load, str(tmp_path), str(tmp_path / "nowhere"))
    assert "no such directory" in words[1]
