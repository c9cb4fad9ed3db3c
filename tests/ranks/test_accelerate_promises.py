"""What accelerate's own suite asks of prepared objects, and of the names around them; see docs/design/accelerate_suite.md."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import shardwise
from ranks.test_front_training import fresh
from shardwise import Accelerator, DataLoaderConfiguration, data_loader, skip_first_batches, utils
from shardwise.errors import ConfigError, DataError, LoadingError, PrepareError
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.ranks.ranks import Ranks
from shardwise.run.process import forget_run


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


class Shifted(DataLoader):
    """A loader of a script's own, which changes what torch's gives."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch + 100


# Stateful loaders.


def _goes_on(make: Any, length: int) -> None:
    """A loader that takes the state of another gives the rest of its epoch."""
    loader, other = make(), make()
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = list(iterator)
    assert len(rest) == length - 1
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other, rest, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other, loader, strict=True))  # the next epoch, too


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("kind", [DataLoader, Shifted])
def test_a_stateful_loader_is_of_torchdatas_class_and_has_our_state(kind, dispatch):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    config = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=config)

    def make() -> Any:
        return accelerator.prepare(kind(range(16), batch_size=4, shuffle=True))

    loader = make()
    assert isinstance(loader, stateful)
    assert isinstance(loader, kind)
    assert isinstance(loader, data_loader.DataLoaderDispatcher) is dispatch
    assert isinstance(loader, data_loader.DataLoaderShard) is not dispatch
    assert loader.use_stateful_dataloader
    assert "_snapshot" not in loader.state_dict()
    assert sorted(torch.cat(list(loader)).tolist()) == [n + (100 if kind is Shifted else 0) for n in range(16)]
    with pytest.raises(DataError, match="not a prepared loader's"):
        loader.load_state_dict({"_snapshot": {}, "_iterator_finished": False})  # as torchdata's
    assert isinstance(skip_first_batches(loader, 3), stateful)
    assert len(list(skip_first_batches(loader, 3))) == 1
    _goes_on(make, 4)


def test_a_loader_that_was_not_asked_to_be_stateful_is_of_its_own_class():
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    loader = Accelerator(cpu=True).prepare(DataLoader(range(8)))
    assert not isinstance(loader, stateful)
    assert not loader.use_stateful_dataloader


@pytest.mark.parametrize("name", ["SkipDataLoader", "DataLoaderShard", "DataLoaderDispatcher"])
def test_a_loader_that_is_made_by_name_keeps_its_order_and_what_it_skips(name):
    kind = getattr(data_loader, name)

    def make() -> Any:
        return kind(range(16), batch_size=4, shuffle=True, skip_batches=1, use_stateful_dataloader=True)

    assert len(make()) == 3
    assert len(list(make())) == 3
    assert len(list(skip_first_batches(make(), 1))) == 2
    _goes_on(make, 3)


class Told(RandomSampler):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_an_epoch_reaches_samplers_and_data_sets_at_once():
    class Data(list):
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

    data = Data(range(8))
    sampler = Told(data)
    loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)))
    loader.set_epoch(3)
    assert (sampler.epoch, data.epoch, loader.iteration) == (3, 3, 3)
    list(loader)
    assert loader.iteration == 4


# What is prepared.


def test_what_is_prepared_says_so_until_it_is_freed():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    plain = type(schedule)
    loader = DataLoader(range(4))
    objects = (model, optimizer, schedule)
    assert not any(getattr(item, "_is_accelerate_prepared", False) for item in (*objects, loader))
    prepared = accelerator.prepare(*objects, loader)
    assert all(item._is_accelerate_prepared is True for item in prepared)
    assert (accelerator._models, accelerator._optimizers) == ((model,), (optimizer,))
    assert (accelerator._schedulers, accelerator._dataloaders) == ((schedule,), (prepared[3],))
    assert "_is_accelerate_prepared" not in schedule.state_dict()
    assert not hasattr(copy.deepcopy(schedule), "_is_accelerate_prepared")
    accelerator.free_memory()
    assert not any(hasattr(item, "_is_accelerate_prepared") for item in objects)
    assert not isinstance(optimizer, AcceleratedOptimizer)
    assert type(schedule) is plain
    found = (accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders)
    assert found == ((), (), (), ())


def test_each_object_that_cannot_be_saved_is_named():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(PrepareError, match=r"Item at index 0, a Tensor, .* Item at index 2, a str, ") as caught:
        accelerator.register_for_checkpointing(torch.ones(1), nn.Linear(1, 1), "a")
    assert "index 1" not in str(caught.value)


def _again(ranks: Ranks, stage: int) -> None:
    accelerator = fresh(stage)
    model = nn.Linear(4, 4)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, first)
    again, second = accelerator.prepare(model, first)
    assert (again, second) == (model, first)
    assert accelerator._models == (model,)
    assert accelerator._optimizers == (first,)
    accelerator.backward(model(torch.ones(1, 4)).sum())
    first.step()
    accelerator.free_memory()


@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_prepared_again_is_given_back_and_trains(world, stage):
    world(2).run(_again, stage, timeout_s=60)


# Weights by file.


def _loads(ranks: Ranks, folder: str, stage: int) -> None:
    torch.manual_seed(3)
    source = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    accelerator = fresh(stage)
    accelerator.save_model(source, folder, max_shard_size=300)
    wanted = {name: value.clone() for name, value in source.state_dict().items()}
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ranks.barrier()
    shardwise.load_checkpoint_in_model(model, folder, strict=True)
    found = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    accelerator.free_memory()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_prepared_model_takes_the_weights_of_files(world, tmp_path, stage):
    world(2).run(_loads, str(tmp_path), stage, timeout_s=60)


@pytest.mark.parametrize("safe", [True, False])
def test_files_of_weights_are_told_apart_and_held_against_the_model(tmp_path, caplog, safe):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.two.weight = self.one.weight

    accelerator = Accelerator(cpu=True)
    model, other = Tied(), Tied()
    accelerator.save_model(model, tmp_path, safe_serialization=safe)
    utils.load_checkpoint_in_model(other, tmp_path, strict=True)
    assert torch.equal(other.one.weight, model.one.weight)
    larger = nn.ModuleDict({"one": nn.Linear(3, 3), "three": nn.Linear(3, 3)})
    with pytest.raises(LoadingError, match=r"files lack three.bias, three.weight. The model has no two"):
        utils.load_checkpoint_in_model(larger, tmp_path, strict=True)
    with caplog.at_level(logging.WARNING, "shardwise"):
        utils.load_checkpoint_in_model(larger, tmp_path)
    assert "files lack three.bias" in caplog.text
    with pytest.raises(ConfigError, match="device_map, dtype cannot be given"):
        utils.load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"}, dtype="float16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadingError, match="no index of several"):
        utils.load_checkpoint_in_model(model, tmp_path / "empty")


def test_tensors_that_a_file_leaves_out_are_told(tmp_path, caplog):
    weight = torch.arange(4.0)
    with caplog.at_level(logging.WARNING, "shardwise"):
        utils.save({"a": weight, "b": weight}, tmp_path / "both.safetensors", safe_serialization=True)
    assert "Left out: b (it is in a)" in caplog.text


# Names beside that.


def test_what_cannot_be_joined_is_the_error_that_torch_and_accelerate_have():
    assert utils.concatenate(["a"]) == "a"
    with pytest.raises(DataError) as caught:
        utils.concatenate([{"a": "x"}, {"a": "y"}])
    assert isinstance(caught.value, TypeError)
    with pytest.raises(DataError) as caught:
        utils.concatenate([torch.ones(2, 3), torch.ones(2, 4)])
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(("rows", "parts", "padded"), [(1, 2, 2), (3, 2, 4), (4, 3, 6), (4, 4, 4), (3, 4, 4)])
def test_padded_rows_can_be_cut_into_equal_parts(rows, parts, padded):
    batch = {"a": torch.ones(rows, 4)}
    found = utils.pad_input_tensors(batch, rows, parts)["a"]
    assert found.shape == (padded, 4)
    assert torch.equal(found[:rows], batch["a"])
    assert not found[rows:].any()


def test_the_plugin_of_dynamo_takes_the_variables_and_tells_them(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
    plugin = utils.TorchDynamoPlugin()
    assert plugin.to_kwargs() == {"backend": "eager", "dynamic": False}
    assert utils.TorchDynamoPlugin(backend="inductor", mode="default").to_kwargs()["backend"] == "inductor"
    monkeypatch.undo()
    assert utils.TorchDynamoPlugin().to_kwargs() == {}


def test_comparing_before_sending_cannot_be_turned_off_in_silence(caplog):
    state = Accelerator(cpu=True).state
    with caplog.at_level(logging.WARNING, "shardwise"):
        state.debug = True
        assert not caplog.text
        state.debug = False
    assert state.debug
    assert "debug = False has no effect" in caplog.text


def _summed(ranks: Ranks) -> Any:
    torch.manual_seed(0)
    accelerator = fresh()
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with model.no_sync():
        accelerator.backward(model(torch.ones(1, 3)).sum())
        optimizer.step()  # no boundary
    copied = copy.deepcopy(model)
    with copied.no_sync():
        pass
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    moved = (model.weight.detach() - before).flatten().tolist()
    accelerator.free_memory()
    return moved, hasattr(model, "no_sync")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_prepared_model_has_no_sync_as_ddps_wrapper_has_until_it_is_given_back(world, ranks):
    for moved, has in world(ranks).run(_summed):
        assert moved == [-2.0] * 3
        assert not has
