"""A script that changes only the import of the Accelerator, and keeps its other imports from accelerate."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from torch.utils.data import DataLoader

import shardwise
from shardwise.errors import ConfigError
from shardwise.front.of_accelerate import own
from shardwise.run.process import forget_run

accelerate = pytest.importorskip("accelerate")


def _uses_accelerates_functions(ranks, stage):
    from accelerate import utils
    from accelerate.logging import get_logger
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import operations

    forget_run()
    plugin = None if stage is None else shardwise.DeepSpeedPlugin(zero_stage=stage)
    accelerator = shardwise.Accelerator(cpu=True, deepspeed_plugin=plugin)
    rank, world = ranks.rank, ranks.world_size
    mine = torch.tensor([rank, 10 + rank])
    seen = {
        "gather": utils.gather(mine).tolist(),
        "gather_object": utils.gather_object([rank]),
        "reduce": utils.reduce(mine.float(), "sum").tolist(),
        "broadcast": utils.broadcast(mine.clone(), from_process=world - 1).tolist(),
        "broadcast_object_list": utils.broadcast_object_list([rank, "of"], from_process=world - 1),
        "pad": list(utils.pad_across_processes(torch.ones(1 + rank)).shape),
        "ranks": (PartialState().process_index, PartialState().num_processes, PartialState().is_main_process),
        "plugin": getattr(AcceleratorState().deepspeed_plugin, "zero_stage", None),
        "precision": AcceleratorState().mixed_precision,
    }
    get_logger("mixed").info("a line")
    uneven = None
    if world > 1:
        try:
            utils.gather(torch.ones(1 + rank))
        except operations.DistributedOperationException as error:
            uneven = str(error)
    second = None
    try:
        accelerate.Accelerator(cpu=True)
    except ConfigError as error:
        second = str(error)
    loader = accelerator.prepare(DataLoader(list(range(8 * world)), batch_size=2))
    rest = accelerate.skip_first_batches(loader, 1)
    ends = [rest.end_of_dataloader for _ in rest]
    del accelerator
    forget_run()
    return seen, uneven, second, ends, isinstance(rest, type(loader)), dict(PartialState._shared_state)


@pytest.mark.parametrize("stage", [None, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_accelerates_functions_know_the_run_and_agree_with_ours(world, n, stage):
    for rank, (seen, uneven, second, ends, ours, left) in enumerate(world(n).run(_uses_accelerates_functions, stage)):
        assert seen == {
            "gather": [value for r in range(n) for value in (r, 10 + r)],
            "gather_object": list(range(n)),
            "reduce": [float(sum(range(n))), float(sum(10 + r for r in range(n)))],
            "broadcast": [n - 1, 9 + n],
            "broadcast_object_list": [n - 1, "of"],
            "pad": [n],
            "ranks": (rank, n, rank == 0),
            "plugin": stage,
            "precision": "no",
        }
        assert (uneven is None) == (n == 1)
        assert "from shardwise import Accelerator" in second
        assert ends == [False, False, True]
        assert ours
        assert left == {}


def _meets_a_state_of_accelerates_own(ranks):
    from accelerate.state import PartialState

    forget_run()
    PartialState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["num_processes"] = ranks.world_size + 1
    try:
        shardwise.PartialState(cpu=True)
    except ConfigError as error:
        return str(error)
    finally:
        PartialState._reset_state()
        forget_run()


def test_a_state_that_accelerate_has_made_of_another_run_is_an_error(world):
    (text,) = world(1).run(_meets_a_state_of_accelerates_own)
    assert "accelerate's state says rank 0 of 2" in text


# Its argument objects.


def test_argument_objects_of_accelerate_are_taken_field_by_field(tmp_path):
    from accelerate import utils as theirs

    project = own(theirs.ProjectConfiguration(project_dir=str(tmp_path), total_limit=2))
    assert project == shardwise.ProjectConfiguration(
        project_dir=str(tmp_path), logging_dir=str(tmp_path), total_limit=2
    )
    assert own(theirs.InitProcessGroupKwargs()) == shardwise.InitProcessGroupKwargs()
    assert own(theirs.InitProcessGroupKwargs(timeout=timedelta(seconds=9))).timeout == timedelta(seconds=9)
    assert own(theirs.DataLoaderConfiguration(split_batches=True)) == shardwise.DataLoaderConfiguration(
        split_batches=True
    )
    assert own(theirs.GradientAccumulationPlugin(num_steps=3)).num_steps == 3
    (scaler, autocast) = own([theirs.GradScalerKwargs(init_scale=8.0), theirs.AutocastKwargs(enabled=False)])
    assert scaler == shardwise.GradScalerKwargs(init_scale=8.0)
    assert autocast == shardwise.AutocastKwargs(enabled=False)
    assert own(theirs.DistributedDataParallelKwargs(find_unused_parameters=True)).find_unused_parameters
    assert own(theirs.ProfileKwargs(with_stack=True)).with_stack
    assert own("text") == "text"
    given = shardwise.AutocastKwargs()
    assert own(given) is given

    class Narrower(theirs.AutocastKwargs):
        pass

    assert type(own(Narrower(enabled=False))) is shardwise.AutocastKwargs


def test_the_check_of_our_own_refuses_what_it_refuses():
    from accelerate import utils as theirs

    with pytest.raises(ConfigError, match="comm_hook"):
        own(theirs.DistributedDataParallelKwargs(comm_hook=theirs.DDPCommunicationHookType.FP16))
    with pytest.raises(ConfigError, match="comm_state_option"):
        own(theirs.DistributedDataParallelKwargs(comm_state_option={"a": 1}))


def test_a_deepspeed_plugin_of_accelerates_says_what_was_said():
    from accelerate.utils import DeepSpeedPlugin

    try:
        plugin = DeepSpeedPlugin(zero_stage=3, gradient_clipping=0.5)
    except Exception as error:  # of accelerate's, without DeepSpeed
        pytest.skip(str(error))
    taken = own(plugin)
    assert (taken.zero_stage, taken.gradient_clipping, taken.hf_ds_config) == (3, 0.5, None)
    assert taken.gradient_accumulation_steps is None
    assert own({"student": plugin})["student"] == taken
