"""The rig itself: it returns what ranks return, and tells an exception, a crash and a hang apart."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from rig import RankCrashedError, RanksHungError


def _sum(ranks, x):
    t = torch.full((2,), float(x + ranks.rank))
    ranks.all_reduce(t)
    return t, ranks.counts["all_reduce"], os.getpid(), torch.get_num_threads()


def _raise_on(ranks, bad):
    if ranks.rank in bad:
        raise KeyError(f"rank {ranks.rank}")
    ranks.barrier()


def _raise_unpicklable(ranks):
    class LocalError(Exception):
        pass

    raise LocalError("cannot travel")


def _die(ranks, how):
    if ranks.rank == ranks.world_size - 1:
        print("last words", flush=True)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    ranks.barrier()


def _sleep(ranks):
    if ranks.rank == 0:
        time.sleep(60)
    ranks.barrier()


def _leave(ranks, setting, value):
    setting(value)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_rank_returns_its_result_in_order(world, n):
    results = world(n).run(_sum, 1)
    for total, counted, _, threads in results:
        assert total.tolist() == [sum(range(1, n + 1))] * 2
        assert counted == 1
        assert threads == 1


def test_ranks_are_reused_between_runs(world):
    first, second = world(2).run(_sum, 1), world(2).run(_sum, 2)
    assert [r[2] for r in first] == [r[2] for r in second]


@pytest.mark.parametrize("bad", [[0], [1], [0, 1]])
def test_an_exception_of_a_rank_is_raised_here_with_its_traceback(world, bad):
    with pytest.raises(KeyError) as caught:
        world(2).run(_raise_on, bad)
    notes = "\n".join(caught.value.__notes__)
    assert "_raise_on" in notes
    assert f"rank {bad[0]}" in notes


def test_an_exception_that_cannot_be_pickled_still_arrives(world):
    with pytest.raises(Exception, match="cannot travel"):
        world(1).run(_raise_unpicklable)


@pytest.mark.parametrize(("how", "code"), [("exit", 7), ("kill", -signal.SIGKILL)])
def test_a_crash_names_the_rank_and_its_exit(world, how, code):
    with pytest.raises(RankCrashedError, match="last words") as caught:
        world(2).run(_die, how)
    assert caught.value.rank == 1
    assert caught.value.exitcode == code


def test_a_hang_shows_every_rank_s_stack(world):
    with pytest.raises(RanksHungError, match="_sleep") as caught:
        world(2).run(_sleep, timeout_s=2)
    assert caught.value.ranks == [0, 1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (torch.compiler.set_stance, "force_eager"),
        (torch.set_default_dtype, torch.float64),
        (torch._C._set_grad_enabled, False),
    ],
)
def test_a_setting_of_the_process_that_a_function_leaves_changed_is_its_error(world, setting, value):
    with pytest.raises(AssertionError, match=f"leaves settings.*{setting.__name__.removeprefix('_')}"):
        world(1).run(_leave, setting, value)
    world(1).run(_sum, 1)


def test_a_failed_pool_is_replaced(world):
    pool = world(2)
    with pytest.raises(KeyError):
        pool.run(_raise_on, [0])
    assert world(2) is not pool
    world(2).run(_sum, 1)
