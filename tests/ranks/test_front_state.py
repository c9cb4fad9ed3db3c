"""One run's state as scripts ask for it: it lives as long as an Accelerator, says what is true, and goes into pickles."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle

import pytest
import torch
from torch import nn

from shardwise import (
    Accelerator,
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    GradientState,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    PartialState,
    ProfileKwargs,
)
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.run.accelerator_state import AcceleratorState
from shardwise.run.process import forget_run


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


def helper():
    return Accelerator(cpu=True).mixed_precision


def test_an_accelerator_that_comes_and_goes_leaves_the_state_of_the_scripts_own():
    plugin = DeepSpeedPlugin(zero_stage=2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", deepspeed_plugin=plugin, gradient_accumulation_steps=4)
    assert helper() == "bf16"  # what is not said holds for the run, as in accelerate
    for state in (AcceleratorState(), accelerator.state):
        assert state.mixed_precision == "bf16"
        assert state.distributed_type == DistributedType.DEEPSPEED
        assert state.deepspeed_plugin.zero_stage == 2
    assert GradientState().num_steps == 4
    assert accelerator.gradient_accumulation_steps == 4
    model = nn.Linear(2, 1)
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    helper()
    with accelerator.accumulate(model):  # the script's own models still hear of it
        assert accelerator._run.models[0].sharded.at_boundary is False
    other = Accelerator(cpu=True, mixed_precision="no")
    assert AcceleratorState().mixed_precision == "no"
    del other
    assert AcceleratorState().mixed_precision == "bf16"
    del accelerator, state
    assert not AcceleratorState().initialized
    with pytest.raises(ConfigError, match="no Accelerator"):
        _ = AcceleratorState().mixed_precision
    assert helper() == "no"


def test_one_step_is_one_step_where_it_is_said_while_another_accelerator_lives():
    for steps in (4, 2, 1):  # as in a loop over trials, where the last trial's lives until its name is another's
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
        assert (accelerator.gradient_accumulation_steps, GradientState().num_steps) == (steps, steps)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    other = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    assert other.gradient_accumulation_steps == 1
    accelerator.gradient_accumulation_steps = 4
    assert Accelerator(cpu=True).gradient_accumulation_steps == 4  # a helper's, which says nothing


def test_a_state_takes_the_settings_in_force_and_refuses_others():
    with pytest.raises(ConfigError, match=r"Give mixed_precision to Accelerator\(\)"):
        AcceleratorState(mixed_precision="bf16")
    plugin = DeepSpeedPlugin(zero_stage=1)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", deepspeed_plugins={"student": plugin})
    assert AcceleratorState("bf16", True).mixed_precision == "bf16"
    assert AcceleratorState(deepspeed_plugin=accelerator.deepspeed_plugin).initialized
    with pytest.raises(ConfigError, match="mixed_precision is 'fp16'"):
        AcceleratorState(mixed_precision="fp16")
    for name in ("dynamo_plugin", "fsdp_plugin", "torch_tp_plugin", "megatron_lm_plugin", "parallelism_config"):
        with pytest.raises(ConfigError, match=name):
            AcceleratorState(**{name: object()})
    state = AcceleratorState()
    assert state.get_deepspeed_plugin("student") is state.deepspeed_plugins["student"] is state.deepspeed_plugin
    state.select_deepspeed_plugin("student")
    for verb in (state.get_deepspeed_plugin, state.select_deepspeed_plugin):
        with pytest.raises(ConfigError, match="student"):
            verb("teacher")
    assert (state.is_fsdp2, state.dynamo_plugin, state.debug) == (False, None, True)


def test_a_partial_state_takes_what_the_run_is_joined_by_and_refuses_the_rest():
    state = PartialState(True, backend="gloo", init_method="env://")
    assert state.debug
    assert not state.fork_launched
    state.set_device()
    with pytest.raises(ConfigError, match="backend is 'nccl'"):
        PartialState(backend="nccl")
    for name in ("rank", "world_size", "store", "device_id"):
        with pytest.raises(ConfigError, match=name):
            PartialState(**{name: 1})
    with pytest.raises(ConfigError, match="init_method"):
        PartialState(init_method="file:///x")


def test_a_gradient_state_takes_a_plugin():
    assert not GradientState().initialized
    state = GradientState(GradientAccumulationPlugin(num_steps=3))
    assert state.initialized
    assert state.num_steps == GradientState().num_steps == 3
    assert state.plugin_kwargs == {"num_steps": 3}
    assert state.dataloader_references == []


def test_an_accelerator_tells_its_handlers_and_what_it_has_not():
    given = [
        AutocastKwargs(enabled=False),
        DistributedDataParallelKwargs(bucket_cap_mb=3),
        GradScalerKwargs(init_scale=4.0),
        InitProcessGroupKwargs(),
        ProfileKwargs(with_flops=True),
    ]
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=given)
    names = ("autocast_handler", "ddp_handler", "scaler_handler", "init_handler", "profile_handler")
    assert [getattr(accelerator, name) for name in names] == given
    assert all(name in dir(accelerator) for name in names)
    assert given[2].to_dict() == {**GradScalerKwargs().to_dict(), "init_scale": 4.0}
    assert accelerator.native_amp is True
    for name in (
        "fp8_enabled",
        "has_fp8_handler",
        "has_lomo_optimizer",
        "is_fsdp2",
        "is_composable_parallelism_enabled",
    ):
        assert getattr(accelerator, name) is False
    for name in ("fp8_backend", "parallelism_config", "torch_device_mesh", "flag_tensor"):
        assert getattr(accelerator, name) is None
    for name in ("data_parallel", "data_parallel_shard", "tensor_parallel", "pipeline_parallel", "context_parallel"):
        assert getattr(accelerator, f"{name}_rank") == 0
    accelerator.set_trigger()
    assert accelerator.flag_tensor.item() == 1
    with pytest.raises(AttributeError, match="cannot be set"):
        accelerator.fp8_enabled = True
    with pytest.raises(ShardwiseError, match="LOMO"):
        accelerator.lomo_backward(torch.ones(()), 0.1)
    with accelerator.maybe_context_parallel(buffers=[torch.ones(1)], buffer_seq_dims=[0]):
        pass
    with pytest.raises(ConfigError, match="comm_state_option"):
        DistributedDataParallelKwargs(comm_state_option={"matrix_approximation_rank": 2})


def test_native_amp_that_is_switched_off_acts_or_is_refused():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.native_amp = False
    with accelerator.autocast():
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ConfigError, match="native_amp"):
        accelerator.prepare(nn.Linear(2, 2))
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    with accelerator.autocast():
        assert not torch.is_autocast_enabled("cpu")
    plain = Accelerator(cpu=True, mixed_precision="no")
    assert plain.native_amp is False
    plain.native_amp = False  # as scripts write for another device
    plain.prepare(nn.Linear(2, 2))


def _triggered(ranks, stage):
    forget_run()
    plugin = DeepSpeedPlugin(zero_stage=stage) if stage else None
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=8)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    for number in range(3):
        x = torch.full((1, 3), 1.0 + number + ranks.rank)
        with accelerator.accumulate(model):
            loss = 8 * model(x).sum()
            if number == 1:
                with accelerator.trigger_sync_in_backward(model):
                    accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            else:
                accelerator.backward(loss)
                optimizer.step()  # which does nothing
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_triggered_backward_ends_the_accumulation(world, n, stage):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    for number in range(2):
        for rank in range(n):
            (model(torch.full((1, 3), 1.0 + number + rank)).sum() / n).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    state = world(n).run(_triggered, stage)[0]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what its compiler imports
def test_wrappers_of_torch_come_off():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    assert accelerator.unwrap_model(nn.DataParallel(nn.DataParallel(model))) is model
    compiled = torch.compile(nn.DataParallel(model))
    assert accelerator.unwrap_model(compiled) is compiled
    assert compiled._orig_mod is model
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is model


# Pickles.


def _pickled(ranks, stage):
    forget_run()
    plugin = DeepSpeedPlugin(zero_stage=stage) if stage else None
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", deepspeed_plugin=plugin, log_with=Tracker())
    first = pickle.dumps(accelerator)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    accelerator.backward(model(torch.ones(1, 3)).sum())
    optimizer.step()
    assert pickle.dumps(accelerator) == first
    assert pickle.loads(first) is accelerator
    assert copy.deepcopy({"of a trainer": accelerator})["of a trainer"] is accelerator
    return first


class Tracker:
    name = "own"

    def __init__(self):
        self.file = io.BytesIO()

    def log(self, values, step=None):
        pass

    def __reduce__(self):
        raise TypeError("a tracker is not to be pickled")


@pytest.mark.parametrize("n", [1, 2])
def test_a_pickle_is_the_same_at_all_times_on_all_ranks_and_comes_back_as_the_object_itself(world, n):
    assert len({*world(n).run(_pickled, 0)}) == 1
    assert len({*world(n).run(_pickled, 3)}) == 1


def _in_a_worker(accelerator):
    try:
        accelerator.wait_for_everyone()
    except ShardwiseError as error:
        said = str(error)
    return (
        type(accelerator).__name__,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.is_main_process,
        accelerator.mixed_precision,
        str(accelerator.device),
        accelerator.gradient_accumulation_steps,
        accelerator.deepspeed_plugin.zero_stage,
        repr(accelerator)[:12],
        said[:36],
    )


def test_in_a_spawned_worker_it_stands_for_the_run_and_refuses_what_needs_the_ranks(monkeypatch):
    plugin = DeepSpeedPlugin(zero_stage=2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", deepspeed_plugin=plugin, gradient_accumulation_steps=3)
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_in_a_worker, (accelerator,))
    told = ("Accelerator", 1, 2, False, "bf16", "cpu", 3, 2, "Accelerator(", "this Accelerator came out of a pickl")
    assert found == told


def test_datasets_fingerprints_a_function_that_closes_over_one():
    fingerprint = pytest.importorskip("datasets.fingerprint")
    accelerator = Accelerator(cpu=True)

    def tokenize(row):
        return accelerator.process_index, row

    first = fingerprint.Hasher.hash(tokenize)
    nn.Linear(2, 2)
    assert fingerprint.Hasher.hash(tokenize) == first
