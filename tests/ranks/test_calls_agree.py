"""A verb that ranks call in different ways is one error that says so, and nobody waits for the timeout."""

from __future__ import annotations

import pytest
import torch

import shardwise
from ranks.test_front_training import fresh
from rig.engine import inputs, loss_of, tower
from shardwise.errors import ConfigError

CALLS = {
    "save_state async_": lambda a, m, odd, folder: a.save_state(folder, async_=odd),
    "save_state include_frozen": lambda a, m, odd, folder: a.save_state(
        folder, include_frozen="shared" if odd else False
    ),
    "save_model max_shard_size": lambda a, m, odd, folder: a.save_model(
        m, folder, max_shard_size="1KB" if odd else "5GB"
    ),
    "save_model dtype": lambda a, m, odd, folder: a.save_model(m, folder, dtype=torch.bfloat16 if odd else None),
}


def _called(ranks, stage, how, folder):
    accelerator, model = fresh(stage), tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    verb, argument = how.split()
    with pytest.raises(ConfigError, match=rf"{verb} is called in another way on ranks 0 and 1: {argument} is"):
        CALLS[how](accelerator, model, ranks.rank == 1, folder)
    _goes_on(accelerator, model, optimizer)


def _goes_on(accelerator, model, optimizer):
    accelerator.backward(loss_of(model, inputs(1)[0]))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("how", CALLS)
def test_arguments_of_saves_are_the_same_on_every_rank(world, tmp_path, how, stage):
    world(2).run(_called, stage, how, str(tmp_path / "out"), timeout_s=30)


def _hooked(ranks, folder):
    accelerator, model = fresh(3), tower()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    if ranks.rank:
        accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="the number of save hooks is 0 on rank 0 and 1 on rank 1"):
        accelerator.save_state(folder)


def test_a_save_hook_of_one_rank_is_told(world, tmp_path):
    world(2).run(_hooked, str(tmp_path / "out"), timeout_s=30)


def _gathered(ranks, stage, what):
    accelerator, model = fresh(stage), tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    odd = ranks.rank == 1
    chosen = (model.blocks[1] if odd else model.blocks[0]) if what == "what is gathered" else model
    with (
        pytest.raises(ConfigError, match=f"gathered is called in another way on ranks 0 and 1: {what} is"),
        shardwise.gathered(chosen, modify=odd and what == "modify"),
    ):
        raise AssertionError("it was entered")
    _goes_on(accelerator, model, optimizer)


@pytest.mark.parametrize("what", ["modify", "what is gathered"])
def test_what_is_gathered_is_the_same_on_every_rank(world, what):
    world(2).run(_gathered, 3, what, timeout_s=30)


def _parted(ranks):
    from shardwise.ranks.words import exchanged

    if ranks.rank == 1:
        exchanged()  # as where Ctrl-C came into an exchange on one rank and behind it on another
    ranks.require_same("a test", {})
    place = ranks.words.place("a verb")
    ranks.words.say(place, str(ranks.rank))
    return ranks.words.heard(place, range(ranks.world_size))


def test_ranks_whose_counts_an_interrupt_has_parted_find_each_others_words_again(world):
    assert world(2).run(_parted, timeout_s=20) == [["0", "1"]] * 2
