"""One rank prepares, or steps with, something else than the others: one error that names fact, ranks and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from rig.agreeing import Net, data
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import ConfigError, PrepareError
from shardwise.run.process import forget_run


class Scripted:
    """What a script builds; each method of a test's is one line that reads otherwise on rank 1."""

    def __init__(self, what: str) -> None:
        self.net = Net(width=4 if what == "width" else 8, dropout=0.5 if what == "dropout" else 0.0)
        if what == "frozen":
            self.net.head.bias.requires_grad_(False)
        if what == "dtype":
            self.net.head.to(torch.float64)
        if what == "buffer":
            self.net.register_buffer("seen", torch.zeros(2))
        if what == "tied":
            self.net.blocks[1][0].weight = self.net.blocks[0][0].weight
        decay = [p for p in self.net.parameters() if p.ndim > 1]
        rest = [p for p in self.net.parameters() if p.ndim == 1]
        if what == "group":
            decay.append(rest.pop())
        groups = [{"params": decay, "weight_decay": 0.2 if what == "decay" else 0.1}, {"params": rest}]
        betas = (0.8, 0.99) if what == "betas" else (0.9, 0.99)
        kind = torch.optim.Adam if what == "class" else torch.optim.AdamW
        self.optimizer = kind(groups, lr=0.2 if what == "lr" else 0.1, betas=betas)
        self.scheduler = self._schedule(what)
        count = 12 if what == "length" else 16
        self.loader = DataLoader(data(count), batch_size=3 if what == "batch" else 4)
        self.objects: list[Any] = [self.net, self.optimizer, self.scheduler, self.loader]
        if what == "missing":
            self.objects.pop()
        if what == "order":
            self.objects.reverse()

    def _schedule(self, what: str) -> Any:
        if what == "period":
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        if what.startswith("total"):
            total = 200 if what == "total of rank 1" else 100
            return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / total))
        return torch.optim.lr_scheduler.StepLR(self.optimizer, 1)


SCRIPTS = {
    "width": "blocks.0.0.weight of Net is (8, 8) float32 trained on rank 0 and (4, 4) float32 trained on rank 1",
    "dropout": "p of drop of Net is 0.0 on rank 0 and 0.5 on rank 1",
    "frozen": "head.bias of Net is (1,) float32 trained on rank 0 and (1,) float32 frozen on rank 1",
    "dtype": "head.weight of Net is (1, 8) float32 trained on rank 0 and (1, 8) float64 trained on rank 1",
    "buffer": "buffer seen of Net is (1,) float32 on rank 0 and (2,) float32 on rank 1",
    "tied": "blocks.1.0.weight of Net is (8, 8) float32 trained on rank 0 and tied to blocks.0.0.weight on rank 1",
    "group": "the group of head.bias in AdamW is 1 on rank 0 and 0 on rank 1",
    "decay": "weight_decay of group 0 of AdamW is 0.1 on rank 0 and 0.2 on rank 1",
    "betas": "betas of group 0 of AdamW is [0.9, 0.99] on rank 0 and [0.8, 0.99] on rank 1",
    "class": 'the list of objects is ["Net", "AdamW", "StepLR", "DataLoader"] on rank 0 and ["Net", "Adam"',
    "lr": "lr of group 0 of AdamW is 0.1 on rank 0 and 0.2 on rank 1",
    "period": "step_size of StepLR is 1 on rank 0 and 2 on rank 1",
    "total": "[100]",
    "length": "the length of DataLoader is 4 batches of a data set of 16 on rank 0 and 3 batches of a data set of 12 on rank 1",
    "batch": "the batch size of DataLoader is 4 on rank 0 and 3 on rank 1",
    "missing": "the list of objects is",
    "order": "the list of objects is",
}


def _scripted(ranks: Any, what: str) -> tuple[str, int]:
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    others = "total" if what == "total" else "nothing"
    script = Scripted(
        f"{what} of rank 1" if what == "total" and ranks.rank == 1 else what if ranks.rank == 1 else others
    )
    ranks.counts.clear()
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(*script.objects)
    moved = sum(ranks.counts.values())
    # Nothing was changed: what is right on all ranks is prepared by the same Accelerator.
    accelerator.prepare(*Scripted(others).objects)
    accelerator.free_memory()
    return str(caught.value), moved


@pytest.mark.parametrize("what", SCRIPTS)
def test_one_ranks_other_object_is_an_error_on_all_before_anything_moves(world, what):
    found = world(2).run(_scripted, what)
    assert found[0] == found[1]
    text, moved = found[0]
    assert text.startswith("`prepare` got different objects on ranks 0 and 1: ")
    assert SCRIPTS[what] in text
    assert moved == 0


def _draws(ranks: Any, kind: str) -> tuple[list[str], int]:
    forget_run()
    accelerator = Accelerator(cpu=True)
    own = torch.Generator().manual_seed(ranks.rank)
    whole = data()
    sets: dict[str, Any] = {
        "tensors": TensorDataset(torch.randn(16, 8, generator=own)),
        "split": torch.utils.data.random_split(whole, [12, 4], generator=own)[0],
        "items": [ranks.rank] * 16,
        "same": torch.utils.data.random_split(whole, [12, 4], generator=torch.Generator().manual_seed(3))[0],
        "drawn": [whole, ranks.rank],  # of other items nothing is known
    }
    with heard() as said:
        loader = accelerator.prepare(DataLoader(sets[kind], batch_size=2))
    return said, len(loader)


@pytest.mark.parametrize(("kind", "warned"), [("tensors", 1), ("split", 1), ("items", 1), ("same", 0), ("drawn", 0)])
def test_ranks_that_drew_data_of_their_own_are_told_once(world, kind, warned):
    (first, _), (other, _) = world(2).run(_draws, kind)
    assert len(first) == warned
    assert not other
    assert all("the contents of the data set of DataLoader is " in text and "on rank 1" in text for text in first)


def _changed_between(ranks: Any) -> str:
    forget_run()
    accelerator = Accelerator(cpu=True)
    if ranks.rank == 1:
        accelerator.gradient_accumulation_steps = 4
        accelerator.even_batches = False
    with pytest.raises(PrepareError) as caught:
        accelerator.prepare(DataLoader(data(), batch_size=4))
    return str(caught.value)


def test_settings_that_a_script_changes_are_compared_in_prepare(world):
    found = world(2).run(_changed_between)
    assert found[0] == found[1]
    assert "gradient_accumulation_steps is 1 on rank 0 and 4 on rank 1" in found[0]
    assert "DataLoaderConfiguration.even_batches is true on rank 0 and false on rank 1" in found[0]


def _differing_in(ranks: Any, what: str) -> str:
    forget_run()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.head.weight.detach().clone()
    accelerator.backward(model(torch.ones(2, 8)).square().mean())
    if what == "lr":
        optimizer.param_groups[0]["lr"] = 0.1 + ranks.rank
    elif what == "norm_type":
        accelerator.clip_grad_norm_(model.parameters(), 1.0, norm_type=2.0 + ranks.rank)
    else:
        getattr(accelerator, what)(model.parameters(), 0.5 + ranks.rank)
    with pytest.raises(ConfigError) as caught:
        optimizer.step()
    assert torch.equal(before, model.head.weight)
    accelerator.free_memory()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lr", "the sum of the groups' learning rates is 0.1 on rank 0 and 1.1 on rank 1"),
        ("norm_type", "norm_type of clip_grad_norm_ is 2 on rank 0 and 3 on rank 1"),
        ("clip_grad_norm_", "max_norm of clip_grad_norm_ is 0.5 on rank 0 and 1.5 on rank 1"),
        ("clip_grad_value_", "clip_value of clip_grad_value_ is 0.5 on rank 0 and 1.5 on rank 1"),
    ],
)
def test_ranks_that_would_step_differently_do_not_step(world, what, words):
    found = world(2).run(_differing_in, what)
    assert found[0] == found[1]
    assert words in found[0]
