"""Where a process stands, read from what torchrun, Slurm and the MPIs set; nothing is taken for granted that nobody said."""

from __future__ import annotations

import pytest

from shardwise.cli.elsewhere import Elsewhere
from shardwise.config.environment import RankEnvironment
from shardwise.config.launchers import first_host, forgotten_tasks, port_of, tasks_on
from shardwise.errors import ConfigError

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1234",
}
# Task 3 of 4 on the second of two machines, as srun starts it.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[05-08]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-77@1",
}
INTEL = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def place(env):
    found = RankEnvironment.read(env)
    return found.rank, found.world_size, found.local_rank, found.local_world_size, found.address


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, 1, None)),
        (TORCH, (3, 4, 1, 2, "a")),
        (SRUN, (3, 4, 1, 2, "gpu07")),
        (SRUN | {"MASTER_ADDR": "10.0.0.1"}, (3, 4, 1, 2, "10.0.0.1")),
        (OPEN_MPI, (1, 2, 1, 2, "127.0.0.1")),
        (INTEL, (1, 2, 1, 2, "127.0.0.1")),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}, (5, 8, 1, 4, None)),
        ({"PALS_RANKID": "5", "WORLD_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}, (5, 8, 1, 4, None)),
        (
            {f"MV2_COMM_WORLD_{name}": n for name, n in (("RANK", "1"), ("SIZE", "4"), ("LOCAL_RANK", "1"))},
            (1, 4, 1, None, None),
        ),
    ],
    ids=["nobody", "torchrun", "srun", "srun, address given", "openmpi", "intel", "pals", "pals's own", "mvapich"],
)
def test_every_launcher_is_understood(env, expected):
    assert place(env) == expected


def test_torchs_variables_come_before_all_others():
    """`shardwise launch` or torchrun under srun, one task on each machine."""
    assert place(SRUN | OPEN_MPI | TORCH) == (3, 4, 1, 2, "a")


def test_local_rank_is_not_taken_to_be_rank():
    alone = {name: TORCH[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert place(alone) == (3, 4, None, None, "a")
    assert place(alone | {"LOCAL_RANK": "1"}) == (3, 4, 1, None, "a")
    assert place({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0, 1, None)


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "gpu07"},
        # A batch script has its own place among the tasks of its first machine.
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "35771"},
    ],
    ids=["salloc", "sbatch", "interactive step", "srun --pty"],
)
def test_a_shell_inside_an_allocation_is_one_process(env):
    assert place(env) == (0, 1, 0, 1, None)
    assert forgotten_tasks(env) == int(env["SLURM_NTASKS"])  # said once: srun was perhaps forgotten


def test_one_task_is_one_process():
    one = SRUN | {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_NTASKS": "1",
    }
    assert RankEnvironment.read(one) == RankEnvironment()
    assert forgotten_tasks(one) is None
    assert forgotten_tasks(SRUN) is None


def test_mpirun_in_an_allocation_counts_by_itself():
    """Its helpers are tasks of srun, one for each machine, and hand their variables on."""
    helper = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    many = {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert place(helper | many) == (5, 8, 1, 4, "gpu05")
    same = {"PMI_RANK": "3", "PMI_SIZE": "4"}  # srun --mpi=pmi2
    assert place(SRUN | same) == place(SRUN)


def test_ports_are_one_jobs_own():
    port = RankEnvironment.read(SRUN).port
    assert port == RankEnvironment.read(SRUN | {"SLURM_PROCID": "0"}).port
    assert port != RankEnvironment.read(SRUN | {"SLURM_STEP_ID": "1"}).port
    assert RankEnvironment.read(SRUN | {"MASTER_PORT": "7"}).port == 7
    assert RankEnvironment.read(INTEL).port == 29500
    assert all(15000 <= port_of(str(job)) < 30000 for job in range(1000))


def test_the_world_may_be_said_twice_if_it_is_said_alike():
    """A batch script exports WORLD_SIZE and MASTER_ADDR, srun gives the rest."""
    assert place(SRUN | {"WORLD_SIZE": "4", "MASTER_ADDR": "b"}) == (3, 4, 1, 2, "b")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 8 in the environment, but srun says 4"):
        place(SRUN | {"WORLD_SIZE": "8"})


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set in the environment, but WORLD_SIZE is"),
        ({"RANK": "0"}, "WORLD_SIZE is not set in the environment, but RANK is"),
        (TORCH | {"RANK": "4"}, "rank 4"),
        (TORCH | {"RANK": "x"}, "RANK='x' in the environment is not a whole number"),
        (TORCH | {"LOCAL_RANK": "2"}, "LOCAL_RANK 2 of LOCAL_WORLD_SIZE 2 does not fit"),
        ({"PMI_RANK": "1"}, "PMI_RANK is set, as by MPICH, Intel MPI or Cray PALS, but not PMI_SIZE.*Set RANK"),
        ({"PALS_RANKID": "1"}, "PALS_RANKID is set.*but not WORLD_SIZE"),
    ],
)
def test_half_a_place_is_one_error_that_says_what_to_set(env, words):
    with pytest.raises(ConfigError, match=words):
        place(env)


def test_slurms_short_forms():
    assert first_host("gpu[003-007,12],login1") == "gpu003"
    assert first_host("n1,n2") == "n1"
    assert first_host("rack[2-3]node[01-16]") == "rack2node01"
    assert first_host("single") == "single"
    assert [tasks_on(node, "2(x3),1") for node in range(5)] == [2, 2, 2, 1, None]
    assert tasks_on(0, "odd") is None


def test_exported_words_are_torchs(monkeypatch):
    for name in TORCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "given")
    import os

    RankEnvironment.read(SRUN).export()
    assert {name: os.environ.get(name) for name in TORCH} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "given",
        "MASTER_PORT": str(RankEnvironment.read(SRUN).port),
    }
    for name in TORCH:
        monkeypatch.delenv(name, raising=False)


def test_a_list_of_hosts_that_is_none_is_an_error_where_no_launcher_says_it():
    with pytest.raises(ConfigError, match="which is no list with SM_CURRENT_HOST 'algo-1' in it"):
        place({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1"})
    assert place({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1", **TORCH})[0] == 3


def test_flags_for_hosts_without_hosts_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--ssh: has no effect without --hostfile"):
        Elsewhere(ssh="ssh -p 22").is_asked()
    monkeypatch.setenv("SHARDWISE_SSH", "ssh -p 22")  # which holds for all runs of a shell
    assert not Elsewhere(ssh="ssh -p 22").is_asked()
