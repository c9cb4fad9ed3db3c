"""`prepare` looks at each model once, changes nothing while it may still refuse, and says on every rank what it refuses."""

from __future__ import annotations

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from torch.utils.data import DataLoader

from rig.engine import adamw, trained
from rig.tiny import tiny
from shardwise import Accelerator, DeepSpeedPlugin, gathered
from shardwise.compat.deepspeed.entry import initialize
from shardwise.config.check import merged
from shardwise.data.prepare import check_data_loader
from shardwise.errors import DataError, PrepareError, RankError
from shardwise.front import prepare_checks, preparing
from shardwise.plan.units import FoundUnits
from shardwise.run.process import forget_run
from shardwise.tuning.losses import LeanLoss, LogitsLoss

EVERYTHING = {"dynamo_backend": "eager", "activation_checkpointing": "all", "loss_chunk_tokens": 4}


def fresh(**settings):
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    accelerator._run.config = merged(accelerator._run.config, **settings)
    return accelerator


class Looked:
    """How often each model was looked through, and how many losses were replaced, while this is entered."""

    def __init__(self) -> None:
        self.models = []
        self.losses = 0
        self._stack = ExitStack()

    def __enter__(self):
        look = FoundUnits.of.__func__

        def of(cls, model, *args, **kwargs):
            self.models.append(model)
            return look(cls, model, *args, **kwargs)

        self._stack.enter_context(patch.object(FoundUnits, "of", classmethod(of)))
        for kind in (LeanLoss, LogitsLoss):
            self._stack.enter_context(patch.object(kind, "__init__", self._counted(kind.__init__)))
        return self

    def _counted(self, make):
        def init(loss, *args, **kwargs):
            self.losses += 1
            make(loss, *args, **kwargs)

        return init

    def __exit__(self, *error):
        self._stack.close()


def _prepared(ranks, settings):
    accelerator = fresh(**settings)
    model, teacher = tiny("llama"), tiny("llama")
    optimizer = adamw(model.parameters())
    with Looked() as looked:
        accelerator.prepare(optimizer, model, teacher)
    assert [id(seen) for seen in looked.models] == [id(model), id(teacher)]
    assert looked.losses == (2 if "loss_chunk_tokens" in settings else 0)
    accelerator.free_memory()


@pytest.mark.parametrize("keeps", [False, True])
def test_a_model_is_looked_through_once_and_its_loss_replaced_once(world, keeps):
    world(2).run(_prepared, EVERYTHING | {"loss_keeps_logits": keeps})


def test_a_model_without_any_of_these_is_looked_through_once_too(world):
    world(2).run(_prepared, {})


def _initialized(ranks):
    model = tiny("llama")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    with Looked() as looked:
        engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=settings)
    assert looked.models == [model]
    engine.destroy()


def test_an_engine_of_deepspeeds_name_looks_once(world):
    world(2).run(_initialized)


def _states(model):
    return [(module, dict(vars(module))) for module in model.modules()]


def _refused(ranks, where):
    accelerator = fresh(**EVERYTHING)
    good, bad = tiny("llama"), tiny("bart") if where in ("all", ranks.rank) else tiny("llama")
    before = _states(good) + _states(bad)
    with pytest.raises(PrepareError if where in ("all", ranks.rank) else RankError, match="loss_chunk_tokens"):
        accelerator.prepare(good, bad)
    assert all(vars(module) == kept for module, kept in before)
    assert trained(accelerator.prepare(good))
    accelerator.free_memory()


@pytest.mark.parametrize("where", ["all", 1])
def test_what_is_refused_is_as_it_was_and_can_be_prepared_apart(world, where):
    world(2).run(_refused, where)


def _misnamed(ranks):
    accelerator = fresh(units=["LlamaDecoderLayer"])
    good, bad = tiny("llama"), tiny("bart")
    before = _states(good) + _states(bad)
    with pytest.raises(PrepareError, match="'LlamaDecoderLayer' is neither the class nor the path of a module of Bart"):
        accelerator.prepare(good, bad)
    assert all(vars(module) == kept for module, kept in before)
    accelerator.prepare(good)
    accelerator.free_memory()


def test_a_unit_that_one_model_does_not_have_is_refused_before_the_other_is_sharded(world):
    world(2).run(_misnamed)


def _loaders(ranks):
    accelerator = fresh()
    loader = DataLoader(list(range(8)), batch_size=1)
    watched = [
        patch.object(module, "check_data_loader", wraps=check_data_loader) for module in (prepare_checks, preparing)
    ]
    with watched[0] as in_prepare, watched[1] as alone:
        accelerator.prepare(loader)
        assert (in_prepare.call_count, alone.call_count) == (1, 0)
        accelerator.prepare_data_loader(loader)
        assert (in_prepare.call_count, alone.call_count) == (1, 1)
    for prepare in (accelerator.prepare, accelerator.prepare_data_loader):
        with pytest.raises(DataError, match="is empty"):
            prepare(DataLoader([], batch_size=1))


def test_a_loader_is_checked_once(world):
    world(2).run(_loaders)


def _inside_of_inference_mode(ranks, folder):
    for tier in ("none", "nvme"):
        forget_run()
        plugin = DeepSpeedPlugin(
            zero_stage=3, offload_param_device=tier, offload_optimizer_device=tier, offload_param_nvme_path=folder,
            offload_optimizer_nvme_path=folder,
        )  # fmt: skip
        accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
        model = torch.nn.Linear(4, 2)
        optimizer = adamw(model.parameters())
        before = model.weight.detach().clone()
        with torch.inference_mode():
            accelerator.prepare(model, optimizer)
        accelerator.backward(model(torch.ones(3, 4)).sum())
        optimizer.step()
        with gathered(model):
            assert not torch.equal(model.weight, before)
        with torch.inference_mode():
            built = torch.nn.Linear(4, 2)
        with pytest.raises(PrepareError, match=r"^weight was made inside torch.inference_mode\(\)"):
            accelerator.prepare(built)
        accelerator.free_memory()


def test_prepare_inside_of_inference_mode_makes_what_can_be_trained(world, tmp_path):
    world(2).run(_inside_of_inference_mode, str(tmp_path))
