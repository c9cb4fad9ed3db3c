"""How processes become ranks: whoever started them, whatever they were told, all train together or all end with one error."""

from __future__ import annotations

import atexit
import json
import os
import socket
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rig import Outcome, fresh_ranks, torchrun
from shardwise import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs, PartialState
from shardwise.config.schema import ENVIRONMENT_KEY

SOON_S = 20.0  # of a process of its own on a busy machine; a hang takes the timeout of 600 s


def within(seconds: float) -> dict[str, Any]:
    return {"kwargs_handlers": [InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))]}


def train(accelerator: Accelerator) -> list[float]:
    """The weights after two steps on this rank's rows: the average over ranks, or a rank is alone."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.get_state_dict(model)
    return [round(w, 5) for w in weights["weight"].flatten().tolist()] if weights else []


TOGETHER = [0.7, 0.7]  # 1 - 2 * 0.1 * mean(1, 2)
ALONE = [0.8, 0.8]


def _trains(keywords: dict[str, Any] | None = None) -> tuple[int, int, int, int, list[float]]:
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2), **(keywords or {}))
    ranks = accelerator._ranks
    weights = train(accelerator)
    accelerator.end_training()
    return ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, weights


def ended(outcomes: list[Outcome]) -> list[Any]:
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def failed(outcomes: list[Outcome]) -> list[str]:
    """The errors of processes that all ended by one, as Python does, and soon."""
    assert [outcome.code for outcome in outcomes] == [1] * len(outcomes), outcomes
    assert max(outcome.seconds for outcome in outcomes) < SOON_S
    return [str(outcome.error) for outcome in outcomes]


# Whoever started them.


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_slurm(rank: int) -> dict[str, str]:
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    return {**step, "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}


def by_open_mpi(rank: int) -> dict[str, str]:
    place = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank, "LOCAL_SIZE": 2}
    variables = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in place.items()}
    return {**variables, "PMIX_NAMESPACE": f"prterun-test-{os.getpid()}@1"}


def by_rank_alone(rank: int, port: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "RANK and WORLD_SIZE alone"])
def test_processes_of_any_launcher_train_together(launcher):
    port = free_port()
    ways: dict[str, Callable[[int], dict[str, str]]] = {
        "srun": by_slurm,
        "mpirun": by_open_mpi,
        "RANK and WORLD_SIZE alone": lambda rank: by_rank_alone(rank, port),
    }
    first, second = ended(fresh_ranks(_trains, [ways[launcher](rank) for rank in range(2)]))
    assert first == (0, 2, 0, 2, TOGETHER)
    assert second[:4] == (1, 2, 1, 2)


@pytest.mark.parametrize("shell", [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "a"}])
def test_a_process_that_nobody_launched_is_a_run_of_one(shell):
    """A notebook, a login shell inside an allocation."""
    assert ended(fresh_ranks(_trains, [shell])) == [(0, 1, 0, 1, ALONE)]


def test_a_machine_that_nobody_named_is_one_error():
    away = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    (error,) = failed(fresh_ranks(_trains, [away]))
    assert error.startswith("ConfigError: MASTER_ADDR is not set")
    assert "Set MASTER_ADDR to its machine and MASTER_PORT" in error


def test_a_port_in_use_is_one_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (error,) = failed(fresh_ranks(_trains, [by_rank_alone(0, port)], within(3)))
    assert error.startswith(f"ConfigError: MASTER_PORT {port} is in use on this machine.")


# Whatever they were told.


def _of_version(version: str | None) -> Any:
    if os.environ["RANK"] == "1" and version is not None:
        from shardwise import version as module

        module.__version__ = version
    return _trains()


def test_another_version_is_told_apart():
    errors = failed(fresh_ranks(_of_version, torchrun(2), "9.9.9"))
    assert errors[0] == errors[1]
    assert errors[0].startswith("ConfigError: ranks 0 and 1 of this run differ: shardwise version is ")
    assert "9.9.9 on rank 1" in errors[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_configuration_that_is_wrong_on_one_rank_ends_all(rank):
    environments = torchrun(2)
    environments[rank][ENVIRONMENT_KEY] = json.dumps(
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 7}}
    )
    errors = failed(fresh_ranks(_trains, environments))
    assert errors[rank].startswith("ConfigError: ")
    assert "zero_stage: 7 is not one of" in errors[rank]
    assert errors[1 - rank] == f"RankError: rank {rank} failed: {errors[rank]}"


def _debugs() -> Any:
    return _trains()


def test_torchs_own_settings_that_change_messages_are_compared():
    environments = torchrun(2)
    environments[1]["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    errors = failed(fresh_ranks(_debugs, environments))
    assert errors[0] == errors[1]
    assert "TORCH_DISTRIBUTED_DEBUG is OFF on rank 0 and DETAIL on rank 1" in errors[0]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_named_after_the_timeout(missing):
    environments = torchrun(2)
    del environments[missing]
    (error,) = failed(fresh_ranks(_trains, environments, within(2)))
    assert error.startswith("RankError: ")
    assert f"rank {missing} did not join the run within" in error


def _one_is_older() -> Any:
    """An older shardwise, or a script without it, makes its group at once."""
    if os.environ["RANK"] == "1":
        return dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    return _trains(within(2))


def test_a_rank_that_does_not_compare_leaves_nobody_waiting():
    errors = failed(fresh_ranks(_one_is_older, torchrun(2)))
    assert errors[0].startswith("RankError: rank 1 did not join the run within 2 s.")
    assert "another version of shardwise" in errors[0]


def _one_makes_no_accelerator(by_script: bool) -> Any:
    if by_script:
        dist.init_process_group("gloo", timeout=timedelta(seconds=2))
        dist.barrier()
    if os.environ["RANK"] == "1":
        if by_script:
            dist.new_group(timeout=timedelta(seconds=2))
            dist.new_group(timeout=timedelta(seconds=2))
            import time

            time.sleep(4)
        raise SystemExit(0)
    return _trains(within(2))


@pytest.mark.parametrize("by_script", [False, True])
def test_a_rank_without_an_accelerator_is_missed_by_name_or_call(by_script):
    first, _ = fresh_ranks(_one_makes_no_accelerator, torchrun(2), by_script)
    assert first.code == 1
    assert first.seconds < SOON_S
    assert first.error is not None
    assert first.error.startswith("RankError: ")


# Groups that are there already.


def _made_by_script(change: str) -> Any:
    dist.init_process_group("gloo", rank=int(os.environ["PLACE"]), world_size=2)
    keywords = {"mixed_precision": "bf16"} if change and dist.get_rank() == 1 else {}
    try:
        return _trains(keywords)
    finally:
        dist.destroy_process_group()


def test_a_group_that_the_script_made_is_the_run():
    """Also where no variable says the rank; the local one follows from the machine."""
    port = free_port()
    environments = [{"PLACE": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(2)]
    first, second = ended(fresh_ranks(_made_by_script, environments, ""))
    assert first == (0, 2, 0, 2, TOGETHER)
    assert second[:4] == (1, 2, 1, 2)
    port = free_port()
    environments = [{**environment, "MASTER_PORT": port} for environment in environments]
    errors = failed(fresh_ranks(_made_by_script, environments, "differs"))
    assert errors[0] == errors[1]
    assert "mixed_precision is no on rank 0 and bf16 on rank 1" in errors[0]


def _state_first() -> Any:
    state = PartialState(cpu=True)
    place = state.process_index, state.num_processes
    first, second = _trains_twice()
    return place, first, second


def _trains_twice() -> list[list[float]]:
    found = []
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        found.append(train(accelerator))
        accelerator.free_memory()
    accelerator.end_training()
    return found


def test_a_state_before_and_several_accelerators_share_one_run():
    first, second = ended(fresh_ranks(_state_first, torchrun(2)))
    assert first == ((0, 2), TOGETHER, TOGETHER)
    assert second[0] == (1, 2)


def _at_exit() -> Any:
    first, second = Accelerator(cpu=True)._ranks, Accelerator(cpu=True)._ranks.aside()
    groups = [weakref.ref(group) for group in (first._control.group, first.shards._data, second._control.group)]
    first.any_of([True])  # is under way until the others have answered
    first.barrier()
    held = [group() is not None for group in groups]
    atexit._run_exitfuncs()
    return held, [group() is not None for group in groups], dist.is_initialized()


def test_gloos_threads_end_before_the_interpreter_does():
    """Else a process that ends by an error may end by SIGABRT."""
    assert ended(fresh_ranks(_at_exit, torchrun(2))) == [([True] * 3, [False] * 3, False)] * 2


def _joins_again() -> Any:
    return [_trains()[-1] for _ in range(3)]


@pytest.mark.parametrize("of_the_launcher", [False, True])
def test_a_run_that_was_left_can_be_joined_again(of_the_launcher):
    """With the launcher's store, what was said at the first time is still there at the second."""
    environments = torchrun(2)
    store = None
    if of_the_launcher:
        port = int(environments[0]["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        environments = [{**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"} for environment in environments]
    first, _ = ended(fresh_ranks(_joins_again, environments))
    assert first == [TOGETHER] * 3
    del store
