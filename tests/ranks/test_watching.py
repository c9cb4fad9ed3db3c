"""A watched run of several ranks: one record, the mean of all losses, and one collective in a step that is logged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rig.tiny import tiny_llama
from shardwise import Accelerator, DeepSpeedPlugin, GeneralTracker, ProfileKwargs, WatchCallback
from shardwise.errors import ConfigError, RankError
from shardwise.ranks.activity import activity
from shardwise.run.process import forget_run

STEPS = 6


def fresh(directory, stage=0, offload="none"):
    forget_run()
    plugin = DeepSpeedPlugin(
        zero_stage=stage,
        offload_optimizer_device=offload if stage else "none",
        offload_optimizer_nvme_path=str(directory) if offload == "nvme" else None,
    )
    return Accelerator(cpu=True, deepspeed_plugin=plugin, project_dir=directory)


def _train(ranks, directory, stage, log_every, offload="none"):
    """What rank's losses were, and how many all_reduces its steps took more than those of a run that nobody watches."""
    counts = []
    for watches in (False, True):
        accelerator = fresh(directory, stage, offload)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ids = torch.arange(STEPS * 2 * 2 * 3).reshape(-1, 3) % 20
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(ids), batch_size=2))
        batches = accelerator.watch(loader, epochs=1, log_every=log_every, bar=False) if watches else loader
        losses = []
        before = accelerator._run.ranks.counts["all_reduce"]
        for (batch,) in batches:
            loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        counts.append(accelerator._run.ranks.counts["all_reduce"] - before)
        accelerator.free_memory()
    forget_run()
    return losses, counts[1] - counts[0], activity.listener is None


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("log_every", [1, 4])
def test_rank_0_writes_the_mean_loss_of_all_ranks(world, tmp_path, stage, log_every):
    found = world(2).run(_train, tmp_path, stage, log_every)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ends = [step for step in range(1, STEPS + 1) if step % log_every == 0 or step == STEPS]
    assert [line["step"] for line in lines] == ends
    both = [(a + b) / 2 for a, b in zip(found[0][0], found[1][0], strict=True)]
    for begin, end, line in zip([0, *ends], ends, lines, strict=False):
        assert line["loss"] == pytest.approx(sum(both[begin:end]) / (end - begin), rel=1e-6)
        assert line["tokens"] == (end - begin) * 2 * 2 * 3
        assert line["tokens_per_s_per_gpu"] == pytest.approx(line["tokens_per_s"] / 2)
    assert [row[1] for row in found] == [len(ends)] * 2
    assert [row[2] for row in found] == [True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["weights"] == 20 * 8 + 8 * 20 + 20  # whole ones, also where a rank has a part
    assert about["ranks"] == 2


def _left_early(ranks, directory):
    accelerator = fresh(directory, 3)
    torch.manual_seed(1)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(torch.arange(48.0).reshape(-1, 3), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in accelerator.watch(loader, log_every=100, bar=False):
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == 2:
            break
    accelerator.free_memory()  # as in end_training, after which the pool's ranks could not go on
    forget_run()
    return losses


def test_steps_of_a_loop_that_all_ranks_left_are_of_all_ranks(world, tmp_path):
    first, second = world(2).run(_left_early, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert (last["step"], last["steps"], last["samples"]) == (2, 2, 8)
    assert last["loss"] == pytest.approx(sum(first + second) / 4)


def test_bytes_on_a_drive_are_the_ledgers(world, tmp_path):
    world(2).run(_train, tmp_path, 2, 1, "nvme")
    *_, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((tmp_path / "run.json").read_text())["at_rest_bytes"]
    masters = sum(count for name, count in about.items() if name.endswith("/nvme"))
    assert masters > 0
    assert last["memory_bytes"]["drive"]["now"] > masters  # the moments too, which the first step has made
    assert last["memory_bytes"]["drive"]["peak"] == last["memory_bytes"]["drive"]["now"]


def _wrong_on_one(ranks, directory):
    accelerator = fresh(directory)
    model = nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        accelerator.watch([], log_every=0 if ranks.rank == 1 else 1)
    except (ConfigError, RankError) as error:
        return str(error)
    finally:
        forget_run()


def _unwritable(ranks, directory):
    accelerator = fresh(directory / "file" / "run")
    model = nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        accelerator.watch([])
    except (ConfigError, RankError) as error:
        return str(error)
    finally:
        forget_run()


def test_what_is_wrong_on_one_rank_is_an_error_on_all(world, tmp_path):
    first, second = world(2).run(_wrong_on_one, tmp_path)
    assert "rank 1 failed" in first
    assert "log_every is 0" in second
    (tmp_path / "file").write_text("")
    first, second = world(2).run(_unwritable, tmp_path)
    assert "cannot be written" in first
    assert "rank 0 failed" in second


def _trainer_begins(ranks, directory, callback_on):
    """The error of each rank; then a collective of all, which nobody may have missed."""
    accelerator = fresh(None, stage=3)
    model = tiny_llama()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    arguments = SimpleNamespace(
        device=torch.device("cpu"),
        bf16=False,
        fp16=False,
        world_size=2,
        output_dir=str(directory),
        to_sanitized_dict=dict,
        gradient_accumulation_steps=1,
    )
    state = SimpleNamespace(is_world_process_zero=ranks.rank == 0, max_steps=1, global_step=0, logging_steps=1)
    callback = WatchCallback(bar=False)
    try:
        if ranks.rank in callback_on:
            callback.on_train_begin(arguments, state, None, model=model, train_dataloader=[0])
    except (ConfigError, RankError) as error:
        return str(error)
    finally:
        callback._close()
        ranks.barrier()
        forget_run()


def test_a_directory_that_the_callback_cannot_write_is_an_error_on_every_rank_that_has_it(world, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = world(2).run(_trainer_begins, tmp_path / "file" / "run", (0, 1), timeout_s=60)
    assert "metrics.jsonl: the run's record cannot be written: Not a directory." in first
    assert second == f"rank 0 failed: ConfigError: {first}"
    first, second = world(2).run(_trainer_begins, tmp_path / "file" / "run", (0,), timeout_s=60)
    assert first
    assert second is None
    assert world(2).run(_trainer_begins, tmp_path / "run", (0, 1), timeout_s=60) == [None, None]


class Keeping(GeneralTracker):
    """A tracker that keeps its numbers in a file of a directory that the script has named."""

    name, requires_logging_directory = "keeping", True

    def __init__(self, run_name, logging_dir):
        self.folder = Path(logging_dir)

    def start(self):
        self.folder.mkdir(exist_ok=True)


def _tracked(ranks, directory, guarded):
    """What each rank met that called init_trackers, three times, in turn alone and first."""
    forget_run()
    accelerator = Accelerator(cpu=True, log_with=Keeping, project_dir=directory)

    def begin():
        try:
            accelerator.init_trackers("run")
        except (OSError, RankError) as error:
            return f"{type(error).__name__}: {error}"

    try:
        if guarded:
            found = [begin() if ranks.rank == 0 else None]
            ranks.barrier()
            return found
        found = [begin()]
        with accelerator.main_process_first():
            found.append(begin())
        return [*found, begin()]
    finally:
        ranks.barrier()
        forget_run()


def test_a_tracker_that_cannot_start_is_an_error_on_every_rank_that_starts_it(world, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = world(2).run(_tracked, tmp_path / "file" / "logs", False, timeout_s=60)
    assert first[0].startswith("NotADirectoryError")
    assert len(set(first)) == 1
    assert second == [f"RankError: rank 0 failed: {first[0]}"] * 3
    first, second = world(2).run(_tracked, tmp_path / "file" / "logs", True, timeout_s=60)
    assert first[0].startswith("NotADirectoryError")
    assert second == [None]
    assert world(2).run(_tracked, tmp_path / "logs", False, timeout_s=60) == [[None] * 3] * 2


def _profiled(ranks, directory):
    forget_run()
    accelerator, trained = Accelerator(cpu=True), False
    try:
        with accelerator.profile(ProfileKwargs(output_trace_dir=directory)):
            trained = True
    except ConfigError as error:
        return str(error), trained
    finally:
        forget_run()


def test_a_profile_that_cannot_be_written_is_refused_before_it_is_taken(world, tmp_path):
    (tmp_path / "file").write_text("")
    found = world(2).run(_profiled, tmp_path / "file" / "traces")
    assert found == [(f"ProfileKwargs: output_trace_dir {tmp_path}/file/traces: Not a directory.", False)] * 2
