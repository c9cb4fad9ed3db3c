"""A save writes to its target alone and removes nothing that automatic naming did not make, whatever lies around it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ranks.test_checkpoint_failures import Net, Run
from ranks.test_checkpoint_files import as_another_user, snapshot
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint.directory import sweep
from shardwise.checkpoint.read import Checkpoint, read_manifest
from shardwise.errors import CheckpointError
from shardwise.files import disk, documents
from shardwise.run.process import forget_run
from shardwise.run.tracking import GeneralTracker

OLD = Path(__file__).resolve().parents[1] / "data" / "checkpoint_version_1"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _on_first(ranks: Any, action: Any) -> None:
    ranks.barrier()
    if ranks.rank == 0:
        action()
    ranks.barrier()


# What the limits remove.


def _copies_and_names(ranks: Any, folder: str) -> list[str]:
    place = Path(folder) / "checkpoints"
    run = Run(folder, total_limit=2, keep_best=1)
    for _ in range(3):
        run.train()
        run.accelerator.save_state()

    def copy() -> None:
        shutil.copytree(place / "checkpoint_2", place / "best_model")
        shutil.copytree(place / "checkpoint_2", place / "checkpoint_50")
        shutil.copytree(OLD, place / "checkpoint_40")
        (place / "checkpoint_41").symlink_to("checkpoint_2")
        (place / "notes").mkdir()
        (place / "notes" / "a.txt").write_text("precious")

    _on_first(ranks, copy)
    run.accelerator.save_state(place / "final_by_name")
    for _ in range(4):
        run.train()
        run.accelerator.save_state(metric=1.0 / run.steps)
    ranks.barrier()
    run.close()
    return names(place)


def test_copies_and_what_a_script_has_named_are_never_removed(world, tmp_path):
    found = world(2).run(_copies_and_names, str(tmp_path))[0]
    mine = ["best_model", "checkpoint_40", "checkpoint_41", "checkpoint_50", "final_by_name", "notes"]
    assert found == sorted([*mine, "checkpoint_53", "checkpoint_54"])
    for name in ("best_model", "checkpoint_40", "checkpoint_50", "final_by_name"):
        Checkpoint(tmp_path / "checkpoints" / name).verify()


def _save_some(folder: str, count: int, resume: str | None, limit: int | None = 1) -> None:
    run = Run(folder, total_limit=limit)
    if resume is not None:
        run.accelerator.load_state(resume)
    for _ in range(count):
        run.train()
        run.accelerator.save_state()
    run.close()


def _runs(ranks: Any, folder: str) -> tuple[list[list[str]], list[str]]:
    place, found, said_of_others = Path(folder) / "checkpoints", [], []
    for count, resume, limit in (
        (2, None, None),  # A: 0, 1
        (2, f"{place}/checkpoint_1", None),  # B goes on with A: 2, 3
        (1, f"{place}/checkpoint_0", 1),  # C goes on with A too: 4; A's go, B's stay
        (1, None, 1),  # D begins anew: 5; all others stay
        (1, f"{place}/checkpoint_3", 1),  # E goes on with B, and so with A: 6; B's go
    ):
        with heard() as lines:
            _save_some(folder, count, resume, limit)
        ranks.barrier()
        found.append(names(place))
        said_of_others += lines
        ranks.barrier()
    return found, said_of_others


def test_a_run_removes_its_own_and_those_of_the_runs_that_it_goes_on_with(world, tmp_path):
    (found, lines), (_, silent) = world(2).run(_runs, str(tmp_path))
    assert found == [
        [f"checkpoint_{n}" for n in numbers] for numbers in ((0, 1), (0, 1, 2, 3), (2, 3, 4), (2, 3, 4, 5), (4, 5, 6))
    ]
    assert silent == []
    place = tmp_path / "checkpoints"
    assert [line.split(" alone: ")[0] for line in lines] == [
        f"{place}: total_limit leaves {others}"
        for others in (
            "checkpoint_3, checkpoint_2",
            "checkpoint_4, checkpoint_3, checkpoint_2",
            "checkpoint_5, checkpoint_4",
        )
    ]


def test_what_cut_short_saves_have_left_is_known_by_its_name(tmp_path):
    for name in (".staging-checkpoint_3", ".staging-removed-checkpoint_2", ".staging-mine", ".staging-checkpoint_x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".staging-checkpoint_4").symlink_to(tmp_path / "precious")
    (tmp_path / ".staging-checkpoint_5").write_text("a file")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".staging-checkpoint_4", ".staging-checkpoint_5", ".staging-checkpoint_x", ".staging-mine", "precious")
    ]


# What a save to a name replaces.


def _refused(ranks: Any, folder: str) -> list[str]:
    run = Run(folder)
    run.train()
    root = Path(folder)

    def prepare() -> None:
        for name in ("app", "staged", "replaced", "empty"):
            (root / name).mkdir()
        (root / "app" / "manifest.json").write_text(json.dumps({"name": "an app", "icons": []}))
        (root / "plain").write_text("a file")
        (root / ".staging-staged").mkdir()
        (root / ".staging-staged" / "notes.txt").write_text("precious")
        (root / ".replaced-replaced").mkdir()
        (root / ".replaced-replaced" / "notes.txt").write_text("precious")
        (root / "precious").write_text("mine")
        (root / ".lock-locked").symlink_to("precious")
        os.mkfifo(root / ".lock-piped")

    _on_first(ranks, prepare)
    run.accelerator.save_state(root / "replaced")
    before, words = {p: s for p, s in snapshot(root).items() if "/.lock-" not in p}, []
    for name in ("app", "plain", "staged", "replaced", "locked", "piped", "/", "/proc"):
        try:
            run.accelerator.save_state(root / name)
        except CheckpointError as error:
            words.append(str(error))
        else:
            words.append(f"{name} was saved")
    ranks.barrier()
    after = {p: s for p, s in snapshot(root).items() if "/.lock-" not in p}
    kept = {p: s[:2] for p, s in before.items()} == {p: s[:2] for p, s in after.items()}
    run.accelerator.save_state(root / "empty")
    run.close()
    assert (root / "precious").read_text() == "mine"
    return [*words, str(kept), *names(root / "empty")]


def test_what_is_not_a_checkpoint_is_not_replaced(world, tmp_path):
    results = world(2).run(_refused, str(tmp_path))
    assert results[0] == results[1]
    words = results[0]
    for text, part in zip(
        words[:8],
        (
            *(
                "holds files that are not a checkpoint",
                "is a file",
                "no save has left",
                "holds files that are not a checkpoint",
            ),
            *("it is a link", "is not a file", "the root of the file system", "mount point"),
        ),
        strict=True,
    ):
        assert part in text, words
    assert words[8] == "True"
    assert "manifest.json" in words


# Links.


def _through_links(ranks: Any, folder: str) -> None:
    root, drive = Path(folder), Path(folder) / "disk"

    def prepare() -> None:
        drive.mkdir()
        (root / "state").symlink_to(drive / "state")
        (root / "unmounted").symlink_to(root / "other_disk" / "state")
        (root / "loop").symlink_to("loop")
        (root / "foreign").symlink_to(drive / "data")
        (drive / "data").mkdir()
        (drive / "data" / "a.txt").write_text("precious")

    _on_first(ranks, prepare)
    run = Run(folder)
    seen: list[Path] = []
    for expected in (1, 2):
        run.train()
        with disk.watched(lambda operation, path: seen.append(path)):
            assert run.accelerator.save_state(root / "state") == str(root / "state")
        assert (root / "state").is_symlink()
        assert read_manifest(drive / "state").step == expected
    # All that was written lies on the other disk, so that the last rename stays on it.
    assert seen
    assert all(drive in path.parents or path == drive for path in seen)
    ranks.barrier()
    assert {path.name for path in drive.iterdir()} == {"state", "data", ".lock-state"}
    weights = run.weights()
    run.train()
    assert run.accelerator.load_state(root / "state") == str(root / "state")
    assert run.weights() == weights
    for name, words in (("unmounted", "Is its disk mounted"), ("loop", "leads back"), ("foreign", "not a checkpoint")):
        with pytest.raises(CheckpointError, match=words):
            run.accelerator.save_state(root / name)
        with pytest.raises(CheckpointError, match=name):
            run.accelerator.load_state(root / name)
    assert not (root / "other_disk").exists()

    # A kill while it was replaced: the earlier one lies beside the target, not beside the link.
    _on_first(ranks, lambda: (drive / "state").rename(drive / ".replaced-state"))
    run.accelerator.load_state(root / "state")
    assert run.weights() == weights
    run.close()


def test_a_save_through_a_link_replaces_what_it_leads_to(world, tmp_path):
    world(2).run(_through_links, str(tmp_path))
    assert (tmp_path / "disk" / "data" / "a.txt").read_text() == "precious"


def _links_among_them(ranks: Any, folder: str) -> None:
    root = Path(folder)
    place, drive = root / "checkpoints", root / "disk"
    run = Run(folder, total_limit=2)
    expected = [run.weights()]
    for _ in range(2):
        run.train()
        run.accelerator.save_state(include_frozen="shared")
        expected.append(run.weights())

    def link() -> None:
        drive.mkdir()
        (place / "checkpoint_0").rename(drive / "moved")
        (place / "checkpoint_0").symlink_to(drive / "moved")
        (place / "latest").symlink_to("checkpoint_0")
        (place / "gone").symlink_to("nowhere")
        (place / "round").symlink_to("round")

    _on_first(ranks, link)
    with heard() as lines:
        run.accelerator.load_state()
    assert run.weights() == expected[2]
    if ranks.rank == 0:
        assert [("gone" in line, "round" in line) for line in lines] == [(True, False), (False, True)]
    # One that was moved to another disk counts; with its frozen weights, which are where they were.
    model = Net()
    with torch.no_grad():
        model.blocks[0].weight.add_(1.0)
    run.accelerator.free_memory()
    forget_run()
    other = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    other.prepare(model, optimizer)
    other.register_for_checkpointing(run)
    other.load_state(place / "latest")
    assert torch.cat([p.detach().reshape(-1) for p in model.parameters()]).tolist() == expected[1]
    other.free_memory()
    # The limit removes no link and nothing behind one.
    run.accelerator._run.folder.release()
    again = Run(folder, total_limit=1)
    again.accelerator.load_state()
    for _ in range(2):
        again.train()
        again.accelerator.save_state()
    ranks.barrier()
    again.close()
    assert {"checkpoint_0", "latest", "gone", "round", "checkpoint_3"} <= set(names(place))
    assert "checkpoint_1" not in names(place)
    Checkpoint(drive / "moved").verify()


def test_links_among_the_checkpoints_are_other_names_of_them(world, tmp_path):
    world(2).run(_links_among_them, str(tmp_path))


# Failures beside the save itself.


def _unremovable(ranks: Any, folder: str) -> list[str]:
    """Older checkpoints cannot be removed, and one that was replaced neither: the saves are done, and it is said."""
    run = Run(folder, total_limit=1)
    state = Path(folder) / "state"
    for _ in range(2):
        run.train()
        run.accelerator.save_state()
    run.accelerator.save_state(state)
    run.train()

    def fails(operation: str, path: Path) -> None:
        if operation == "remove" and "removed-" in path.name:
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    with heard() as lines, disk.watched(fails):
        first = run.accelerator.save_state()
        second = run.accelerator.save_state(state)
    assert read_manifest(Path(first)).step == read_manifest(Path(second)).step == 3
    run.accelerator.load_state(state)
    run.close()
    return lines


def test_what_cannot_be_removed_is_a_warning(world, tmp_path):
    lines = world(2).run(_unremovable, str(tmp_path))
    assert len(lines[0]) == 2
    assert all("Read-only file system" in line and "was saved, but" in line for line in lines[0])
    assert lines[1] == []


class Breaking(GeneralTracker):
    name = "breaking"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None: ...

    def finish(self) -> None:
        raise self.error


@pytest.fixture
def open_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="shardwise-owned-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def _the_end(ranks: Any, folder: str) -> list[str]:
    """The disk takes no change any more when the training has ended: it may be finished nevertheless, on every rank."""
    run = Run(folder)
    run.accelerator.trackers = [Breaking(OSError(errno.ENOSPC, "No space left on device"))] if ranks.rank == 0 else []
    run.train()
    run.accelerator.save_state()
    run.accelerator.save_state(Path(folder) / "state")
    _on_first(ranks, lambda: [path.chmod(0o555) for path in (Path(folder), Path(folder) / "checkpoints")])
    with heard() as lines, as_another_user(True):
        run.accelerator.end_training()
    run.accelerator.free_memory()
    return lines


def test_a_disk_that_takes_nothing_at_the_end_is_a_warning(world, open_folder):
    lines = world(2).run(_the_end, str(open_folder))
    assert len(lines[0]) == 3
    assert sum("could not be removed" in line for line in lines[0]) == 2
    assert "breaking could not be closed" in lines[0][2]
    assert lines[1] == []


def _tracker_fails(ranks: Any, folder: str) -> str:
    run = Run(folder)
    run.accelerator.trackers = [Breaking(KeyError("x"))] if ranks.rank == 0 else []
    try:
        run.accelerator.end_training()
    except KeyError as error:
        return repr(error)
    finally:
        run.accelerator.free_memory()
    return "ended"


def test_an_error_at_the_end_leaves_no_rank_waiting(world, tmp_path):
    assert world(2).run(_tracker_fails, str(tmp_path)) == ["KeyError('x')", "ended"]


# What is found, and what is not.


def _unreadable(ranks: Any, folder: str) -> list[Any]:
    run = Run(folder)
    run.train()
    run.accelerator.save_state()
    place = Path(folder) / "checkpoints"
    found: list[Any] = []
    for path, mode in (
        (place / "checkpoint_0", 0o700),
        (place / "checkpoint_0" / "manifest.json", 0o600),
        (place, 0o700),
    ):
        _on_first(ranks, lambda: path.chmod(mode))  # noqa: B023
        with heard() as lines, as_another_user(True):
            for ask in (run.accelerator.has_checkpoint, run.accelerator.load_state):
                try:
                    found.append((ask(), lines[:]))
                except CheckpointError as error:
                    found.append((str(error), lines[:]))
                lines.clear()
        _on_first(ranks, lambda: path.chmod(0o755))  # noqa: B023
    assert run.accelerator.has_checkpoint()
    run.close()
    return found


def test_a_checkpoint_of_another_user_is_told_and_a_directory_is_an_error(world, open_folder):
    first, second = world(2).run(_unreadable, str(open_folder))
    assert [answer for answer, _ in first] == [answer for answer, _ in second]
    place = open_folder / "checkpoints"
    for (there, lines), (words, skipped) in ((first[0], first[1]), (first[2], first[3])):
        assert there is False
        assert len(lines) == len(skipped) == 1
        assert "There is no complete checkpoint" in lines[0]
        assert str(place / "checkpoint_0") in lines[0]
        assert "holds no complete checkpoint" in words
    assert "does not let others in" in first[0][1][0]
    assert "Permission denied" in first[2][1][0]
    for answer, lines in first[4:]:
        assert answer == f"rank 0: {place} cannot be read: Permission denied."
        assert lines == []
    assert all(lines == [] for _, lines in second)


def _metric(ranks: Any, folder: str) -> list[str]:
    run = Run(folder, total_limit=1, keep_best=1)
    with heard() as lines:
        for metric in (2.0, float("nan"), float("inf"), 3.0):
            run.train()
            run.accelerator.save_state(metric=metric)
    with pytest.raises(CheckpointError, match="metric is 'good', which is not a number"):
        run.accelerator.save_state(metric="good" if ranks.rank == 0 else None)
    ranks.barrier()
    run.close()
    return [*lines, *names(Path(folder) / "checkpoints")]


def test_a_metric_that_is_no_number_is_not_the_best(world, tmp_path):
    first, second = world(2).run(_metric, str(tmp_path))
    assert [line for line in first if "no place among the best" in line] == first[:2]
    assert first[2:] == second == ["checkpoint_0", "checkpoint_3"]


class Large:
    def state_dict(self) -> dict[str, Any]:
        return {"values": list(range(2000))}

    def load_state_dict(self, state: Any) -> None: ...


def _too_large(ranks: Any, folder: str) -> str:
    run = Run(folder)
    run.train()
    run.accelerator.save_state()
    run.accelerator.register_for_checkpointing(Large())
    kept, documents._VALUES = documents._VALUES, 2000
    try:
        run.accelerator.save_state()
    except CheckpointError as error:
        return str(error)
    finally:
        documents._VALUES = kept
        run.close()
    return "saved"


def test_what_could_not_be_loaded_is_not_saved(world, tmp_path):
    words = world(2).run(_too_large, str(tmp_path))
    assert words[0] == words[1]
    assert "rank-00000.json, which keeps the state of the run" in words[0]
    assert "holds more than 2000 values" in words[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]


def _old(ranks: Any, folder: str) -> tuple[int, list[float], str]:
    run = Run(folder, total_limit=1)
    run.accelerator.load_state(OLD)
    found = run.steps, run.weights()
    run.train()
    saved = run.accelerator.save_state()
    run.close()
    return *found, json.loads((Path(saved) / "manifest.json").read_text())["made"]["name"]


def test_a_checkpoint_of_the_first_version_is_read(world, tmp_path):
    """Saved by 2 ranks at stage 3, before manifests said who made them."""
    assert "made" not in json.loads((OLD / "manifest.json").read_text())
    first = Run(str(tmp_path / "plain"), stage=0)
    first.train()
    expected = first.weights()
    first.close()
    for size in (1, 2):
        for steps, weights, name in world(size).run(_old, str(tmp_path / str(size))):
            assert steps == 1
            assert weights == pytest.approx(expected, abs=1e-6)
            assert name == "checkpoint_0"
