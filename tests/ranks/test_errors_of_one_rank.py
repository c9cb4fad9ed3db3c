"""Verbs in which one rank meets something that the others do not: what it meets is everybody's, and nobody waits."""

from __future__ import annotations

import errno
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ranks.test_front_training import fresh
from rig.heard import heard
from rig.tiny import tiny_llama, with_lora
from shardwise import Accelerator, gradient
from shardwise.errors import CheckpointError, PrepareError, RankError, ShardwiseError
from shardwise.files import disk
from shardwise.zero import whole


class Heads(nn.Module):
    """A weight of one element and a larger one: with three ranks somebody holds nothing of the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.body = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(x)


INPUT = torch.arange(6.0).reshape(2, 3)


def _groups(stage: int, several: bool, turned: bool) -> tuple[list, list]:
    """Norms of each group in turn, of shardwise and of plain torch; and the weights afterwards."""
    accelerator, model, plain = fresh(stage), Heads(), Heads()
    found, wanted = [], []

    def optimizers(of: Heads) -> list[torch.optim.Optimizer]:
        sets = [[of.scale], list(of.body.parameters())][:: -1 if turned else 1]
        if several:
            return [torch.optim.SGD(one, lr=0.1) for one in sets]
        return [torch.optim.SGD([{"params": one} for one in sets], lr=0.1)]

    mine, theirs = optimizers(model), optimizers(plain)
    accelerator.prepare(model, *mine)
    for _ in range(2):
        accelerator.backward(model(INPUT).square().mean())
        plain(INPUT).square().mean().backward()
        for optimizer in mine:
            for group in optimizer.param_groups:
                found.append(accelerator.clip_grad_norm_(group["params"], 0.5, norm_type=2).item())
            for group in optimizer.param_groups:
                accelerator.clip_grad_value_(group["params"], 0.2)
            optimizer.step()
            optimizer.zero_grad()
        for optimizer in theirs:
            for group in optimizer.param_groups:
                wanted.append(nn.utils.clip_grad_norm_(group["params"], 0.5).item())
            nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 0.2)
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    accelerator.free_memory()
    if state:
        for name, value in plain.state_dict().items():
            assert torch.allclose(state[name], value, atol=1e-6), name
    return found, wanted


def _clip(ranks):
    for stage in (0, 2, 3):
        for several, turned in itertools.product((False, True), repeat=2):
            found, wanted = _groups(stage, several, turned)
            assert found == pytest.approx(wanted, rel=1e-5), (stage, several, turned)


def test_a_rank_that_holds_nothing_of_an_optimizer_clips_with_the_others(world):
    world(3).run(_clip, timeout_s=60)


def _clip_strangers(ranks):
    accelerator, model = fresh(2), Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    accelerator.backward(model(INPUT).mean())
    with pytest.raises(PrepareError, match="none of these parameters"):
        accelerator.clip_grad_norm_([torch.ones(1)], 1.0)
    with pytest.raises(PrepareError, match="none of these parameters"):
        accelerator.clip_grad_value_([torch.ones(1)], 1.0)
    accelerator.free_memory()


def test_parameters_of_no_optimizer_are_an_error_on_every_rank(world):
    world(2).run(_clip_strangers, timeout_s=60)


def _clip_used_up(ranks):
    """What diffusers' scripts do: an optimizer takes a filter, and what is clipped later is the same one, empty."""
    for stage in (0, 2, 3):
        accelerator, model = fresh(stage), Heads()
        chosen = filter(lambda p: p.requires_grad, model.parameters())
        optimizer = torch.optim.SGD(chosen, lr=0.1)
        accelerator.prepare(model, optimizer)
        with heard() as said:
            for _ in range(2):
                accelerator.backward(model(INPUT).mean() * 1000)
                before = gradient(model.body.weight).clone()
                norm = accelerator.clip_grad_norm_(chosen, 1.0)
                assert norm == torch.nn.utils.clip_grad_norm_([], 1.0) == 0.0
                accelerator.clip_grad_value_(chosen, 1e-6)
                assert torch.equal(gradient(model.body.weight), before)
                optimizer.step()
                optimizer.zero_grad()
        lines = [line for line in said if "clips nothing" in line]
        assert len(lines) == (2 if ranks.rank == 0 else 0), lines  # each verb once, on the main process
        accelerator.free_memory()


def test_no_parameters_clip_nothing_and_it_is_said_once(world):
    world(2).run(_clip_used_up, timeout_s=60)


# Saving.


def _fails_on_first(accelerator: Accelerator, verb: Callable[[], object], words: str) -> None:
    """The verb raises on every rank, what rank 0 met; and the model is whole afterwards."""
    with pytest.raises((OSError, MemoryError, ShardwiseError), match=words) as caught:
        verb()
    assert accelerator.is_main_process or isinstance(caught.value, (RankError, CheckpointError))


def _saves(ranks, folder):
    path = Path(folder)
    accelerator, model = fresh(3), Heads()
    model.body.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator.prepare(model, optimizer)
    (path / "file").write_text("") if ranks.rank == 0 else None

    def full(operation: str, where: Path) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, "no space left")

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError("no memory")

    _fails_on_first(accelerator, lambda: accelerator.save_model(model, path / "file"), "it is a file")
    _fails_on_first(accelerator, lambda: accelerator.save_model(model, path, max_shard_size="a lot"), "a lot")
    for safe in (True, False):
        with disk.watched(full) if ranks.rank == 0 and safe else pytest.MonkeyPatch.context() as patched:
            if not safe and ranks.rank == 0:
                patched.setattr(torch, "save", no_memory)
            words = "no space left" if safe else "no memory"
            verb = functools.partial(accelerator.save_model, model, path / "full", safe_serialization=safe)
            _fails_on_first(accelerator, verb, words)
    with pytest.MonkeyPatch.context() as patched:
        if ranks.rank == 0:
            patched.setattr(whole, "_frozen_reader", lambda *_: no_memory)
        _fails_on_first(accelerator, lambda: accelerator.get_state_dict(model), "no memory")
        _fails_on_first(accelerator, lambda: accelerator.save_model(model, path / "full"), "no memory")
    assert not list((path / "full").glob("*.safetensors*")), "nothing of a save that failed stays"
    with pytest.raises(CheckpointError, match="metric is 'high', which is not a number"):  # rank 0's counts
        accelerator.save_state(path / "state", metric=0.5 if ranks.rank == 1 else "high")
    handle = accelerator.register_save_state_pre_hook(lambda *_: 1 / ranks.rank)
    with pytest.raises(CheckpointError, match="rank 0: ZeroDivisionError"):
        accelerator.save_state(path / "state")
    handle.remove()
    # And all of it goes on.
    accelerator.backward(model(INPUT).mean())
    optimizer.step()
    accelerator.save_model(model, path / "good")
    state = accelerator.get_state_dict(model)
    if state:
        found = load_file(path / "good" / "model.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    accelerator.free_memory()


def test_an_error_of_one_rank_in_a_save_is_every_ranks_and_training_goes_on(world, tmp_path):
    world(2).run(_saves, str(tmp_path), timeout_s=60)


def _writes_below_a_file(ranks, target, lora):
    """What each verb that writes where the script says raises on this rank; all ranks come to the next one."""
    accelerator, model = fresh(3), tiny_llama()
    model = with_lora(model) if lora else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerator.prepare(model, optimizer)

    def in_the_background():
        accelerator.save_state(target, async_=True)
        accelerator.finish_saving()

    verbs = {
        "save_model": lambda: accelerator.save_model(model, target),
        "save_model, a pickle": lambda: accelerator.save_model(model, target, safe_serialization=False),
        "save_pretrained": lambda: model.save_pretrained(target),
        "save_pretrained, by transformers": lambda: model.save_pretrained(
            target, max_shard_size="1KB", variant="other"
        ),
        "save_state": lambda: accelerator.save_state(target),
        "save_state, async": in_the_background,
        "load_state": lambda: accelerator.load_state(target),
    }
    if lora:
        verbs = {name: verb for name, verb in verbs.items() if name.startswith("save_pretrained")}
    found = {}
    for name, verb in verbs.items():
        try:
            verb()
        except (OSError, ShardwiseError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        ranks.barrier()
    accelerator.free_memory()
    return found, list(verbs)


@pytest.mark.parametrize("lora", [False, True])
def test_a_place_below_a_file_is_the_same_error_on_every_rank(world, tmp_path, lora):
    (tmp_path / "file").write_text("")
    (first, verbs), (second, _) = world(2).run(
        _writes_below_a_file, str(tmp_path / "file" / "out"), lora, timeout_s=120
    )
    for verb in verbs:
        assert verb in first, verb
        assert second.get(verb) in (first[verb], f"RankError: rank 0 failed: {first[verb]}"), (verb, first, second)
        assert "file" in first[verb], first[verb]
