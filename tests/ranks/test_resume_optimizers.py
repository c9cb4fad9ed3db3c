"""Whatever optimizer steps, wherever its states rest: a run that is saved and loaded goes on as one that was not.

By both ways (save_state and load_state; the model's and the optimizer's dictionaries), in new objects or new processes, on as
many ranks (to the bit) or others. `make test` takes each optimizer on each tier and each change of ranks with some; `full` all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rig.engine import Tower, as_on_a_device, inputs, mine
from rig.optimizers import AdafactorLike, Assorted, Lamb
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.run.process import forget_run

optim = torch.optim


def _in_8_bits(groups: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=3e-3, eps=1e-4, min_8bit_size=512)


# eps above rounding noise where there is one, see tests/parity/training.py.
OPTIMIZERS: dict[str, Any] = {
    "Adadelta": lambda g: optim.Adadelta(g, lr=1.0, eps=1e-4),
    "Adagrad": lambda g: optim.Adagrad(g, lr=1e-2, eps=1e-4, initial_accumulator_value=0.1),
    "Adagrad-decay": lambda g: optim.Adagrad(g, lr=1e-2, eps=1e-4, lr_decay=0.1, foreach=False),
    "Adam": lambda g: optim.Adam(g, lr=3e-3, eps=1e-4, weight_decay=0.01),
    "Adam-amsgrad": lambda g: optim.Adam(g, lr=3e-3, eps=1e-4, amsgrad=True),
    "Adam-loop": lambda g: optim.Adam(g, lr=3e-3, eps=1e-4, foreach=False, fused=False),
    "Adam-tensor": lambda g: optim.Adam(g, lr=torch.tensor(3e-3), eps=1e-4, foreach=False, fused=False),
    "AdamW": lambda g: optim.AdamW(g, lr=3e-3, eps=1e-4),
    "AdamW-fused": lambda g: optim.AdamW(g, lr=3e-3, eps=1e-4, amsgrad=True, fused=True),
    "Adamax": lambda g: optim.Adamax(g, lr=3e-3, eps=1e-4),
    "ASGD": lambda g: optim.ASGD(g, lr=0.01, t0=2),
    "NAdam": lambda g: optim.NAdam(g, lr=3e-3, eps=1e-4, decoupled_weight_decay=True),
    "RAdam": lambda g: optim.RAdam(g, lr=3e-3, eps=1e-4),
    "RMSprop": lambda g: optim.RMSprop(g, lr=1e-3, eps=1e-4),
    "RMSprop-centred": lambda g: optim.RMSprop(g, lr=1e-3, eps=1e-4, momentum=0.5, centered=True),
    "Rprop": lambda g: optim.Rprop(g, lr=1e-3),
    "SGD": lambda g: optim.SGD(g, lr=0.05, weight_decay=0.01),
    "SGD-momentum": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, dampening=0.1, maximize=False),
    "SGD-nesterov": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    # Those that step whole parameters.
    "Muon": lambda g: optim.Muon([p for group in g for p in group["params"] if p.ndim == 2], lr=1e-3),
    "Adafactor": lambda g: optim.Adafactor(g, lr=1e-2),
    "AdafactorLike": AdafactorLike,
    "Lamb": Lamb,
    "Assorted": Assorted,  # containers, objects, tensors that wrap others
    "AdamW8bit": _in_8_bits,
}
# Of runs that were changed. Muon orthogonalises in bf16: a sum over other ranks with another last bit rounds otherwise there.
TOLERANCE = {"Muon": 1e-5, "AdamW8bit": 1e-5}
# Where states rest. "visiting" is "cpu" as on a device: the shards are not stepped where they are.
TIERS = ("none", "cpu", "visiting", "nvme")
WAYS = ("state", "dictionary")
SAVE_AT, STEPS = 3, 6
USE_CPU = True  # tests/gpu runs the same on CUDA devices


@dataclass(frozen=True)
class Case:
    name: str
    tier: str
    stage: int = 2
    n: int = 2

    def __str__(self) -> str:
        return f"{self.name}-{self.tier}-zero{self.stage}-x{self.n}"


class Net(Tower):
    """Several chunks to a unit, a frozen part, and a parameter without dimensions."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(depth=2, width=120)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.blocks[0].up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature.exp()


class Run:
    """New objects in a new Accelerator, with files below `folder`. weights: what the model is built with."""

    def __init__(self, case: Case, folder: str, weights: dict[str, Tensor] | None = None) -> None:
        forget_run()
        tier = "cpu" if case.tier == "visiting" else case.tier
        plugin = DeepSpeedPlugin(
            zero_stage=case.stage, offload_optimizer_device=tier, offload_optimizer_nvme_path=f"{folder}/drive"
        )
        self.accelerator = Accelerator(cpu=USE_CPU, deepspeed_plugin=plugin)
        model = Net()
        if weights is not None:
            model.load_state_dict(weights)
        named = list(model.named_parameters())
        optimizer = OPTIMIZERS[case.name](
            [
                {"params": [p for n, p in named if n.endswith("weight")]},
                {"params": [p for n, p in named if not n.endswith("weight")], "weight_decay": 0.0},
            ]
            if case.name != "Rprop"
            else [p for _, p in named]
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def steps(self, first: int, last: int) -> None:
        ranks = self.accelerator._ranks
        for number, batch in list(enumerate(inputs(last)))[first:]:
            loss = (self.model(mine(batch, ranks.rank, ranks.world_size).to(ranks.device)) - 1).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9 + 0.01 * number

    def end(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.accelerator.get_state_dict(self.model)
        self.accelerator.free_memory()
        return weights


def straight(ranks: Any, case: Case, folder: str, save_at: int = SAVE_AT) -> dict[str, Tensor]:
    """The undisturbed run, which saves in both ways and goes on; its weights at the end."""
    with as_on_a_device(visits=case.tier == "visiting"):
        run = Run(case, folder)
        run.steps(0, save_at)
        run.accelerator.save_state(f"{folder}/state")
        states = run.optimizer.state_dict()
        weights = run.accelerator.get_state_dict(run.model)
        if run.accelerator.is_main_process:
            torch.save((weights, states), f"{folder}/dictionary")
        run.accelerator.wait_for_everyone()
        run.steps(save_at, STEPS)
        return run.end()


def resumed(ranks: Any, case: Case, folder: str, way: str, save_at: int = SAVE_AT) -> dict[str, Tensor]:
    with as_on_a_device(visits=case.tier == "visiting"):
        if way == "state":
            run = Run(case, folder)
            run.accelerator.load_state(f"{folder}/state")
        else:
            weights, states = torch.load(
                f"{folder}/dictionary", weights_only=False
            )  # as plain torch needs it for objects
            run = Run(case, folder, weights)
            run.optimizer.load_state_dict(states)
        run.steps(save_at, STEPS)
        return run.end()


def both(ranks: Any, case: Case, folder: str, save_at: int) -> None:
    """All in these processes: what the straight run leaves behind must not matter, nor what a fresh one lacks."""
    expected = straight(ranks, case, folder, save_at)
    for way in WAYS:
        found = resumed(ranks, case, folder, way, save_at)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (way, name, (found[name] - value).abs().max())


# Each optimizer on a drive and on one of the other tiers.
COVER = [(name, tier) for number, name in enumerate(OPTIMIZERS) for tier in ("nvme", TIERS[number % 3])]
REST = [pair for pair in itertools.product(OPTIMIZERS, TIERS) if pair not in COVER]


def _stage(name: str, tier: str) -> int:
    number = list(OPTIMIZERS).index(name)
    return number % 4 if tier == "none" else 1 + number % 3


@pytest.mark.thinned(3, rows=True)
@pytest.mark.parametrize(("name", "tier"), [*COVER, *(pytest.param(*pair, marks=pytest.mark.full) for pair in REST)])
def test_it_goes_on_to_the_bit(world, tmp_path, name, tier):
    world(2).run(both, Case(name, tier, _stage(name, tier)), str(tmp_path), SAVE_AT)


@pytest.mark.parametrize(("name", "tier"), [("Adagrad", "visiting"), ("Adagrad", "nvme"), ("AdamW", "nvme")])
def test_what_was_saved_before_the_first_step_is_where_it_begins(world, tmp_path, name, tier):
    world(2).run(both, Case(name, tier), str(tmp_path), 0)


def _changed(world: Any, folder: str, first: Case, then: Case, ways: tuple[str, ...] = WAYS) -> None:
    """To the bit where nothing differs; else other ranks add up in another order."""
    expected, *_ = world(first.n).run(straight, first, folder)
    for way in ways:
        found, *_ = world(then.n).run(resumed, then, folder, way)
        for name, value in expected.items():
            assert torch.equal(found[name], value) or first != then, (way, name)
            assert (found[name] - value).abs().max() <= TOLERANCE.get(first.name, 1e-6), (way, name)


# Each optimizer once, each tier and each change of ranks several times.
CHANGES = [(1, 2), (2, 1), (2, 3), (3, 1), (3, 2), (1, 3)]
CHANGED = [
    (name, TIERS[number % 4], TIERS[(number + 1) % 4], CHANGES[number % 6]) for number, name in enumerate(OPTIMIZERS)
]


@pytest.mark.thinned(2, rows=True)
@pytest.mark.parametrize(("name", "tier", "other", "change"), CHANGED)
def test_it_goes_on_with_other_ranks_on_another_tier(world, tmp_path, name, tier, other, change):
    _changed(world, str(tmp_path), Case(name, tier, 2, change[0]), Case(name, other, 3, change[1]))


def _in_new_processes(world: Any, folder: str, case: Case, ways: tuple[str, ...]) -> None:
    expected = world(case.n).run(straight, case, folder)
    for way in ways:
        world.close()
        for found, value in zip(world(case.n).run(resumed, case, folder, way), expected, strict=True):
            assert all(torch.equal(found[name], value[name]) for name in value)


@pytest.mark.parametrize(("name", "tier", "way"), [("Adagrad", "nvme", "state"), ("AdamW", "visiting", "dictionary")])
def test_it_goes_on_in_new_processes(world, tmp_path, name, tier, way):
    _in_new_processes(world, str(tmp_path), Case(name, tier, 3), (way,))


@pytest.mark.full
@pytest.mark.parametrize(("name", "tier"), list(itertools.product(OPTIMIZERS, TIERS)))
def test_every_optimizer_goes_on_in_new_processes(world, tmp_path, name, tier):
    _in_new_processes(world, str(tmp_path), Case(name, tier, 3), WAYS)


@pytest.mark.full
@pytest.mark.parametrize("change", list(itertools.product((1, 2, 3), repeat=2)), ids=str)
@pytest.mark.parametrize(("name", "tier"), list(itertools.product(OPTIMIZERS, TIERS)))
def test_every_optimizer_goes_on_with_any_ranks(world, tmp_path, name, tier, change):
    stage = _stage(name, tier)
    then = stage if change[0] == change[1] else 3
    _changed(world, str(tmp_path), Case(name, tier, stage, change[0]), Case(name, tier, then, change[1]))


def _under_way(ranks: Any, folder: str, what: str) -> None:
    """A step that was begun, and given up for an earlier state."""
    run = Run(Case("AdamW", "none"), folder)
    run.steps(0, 2)
    run.accelerator.save_state(folder)
    run.steps(2, 4)
    expected = run.accelerator.get_state_dict(run.model)
    loss = run.model(inputs(1, seed=9)[0]).square().mean() * (float("nan") if what == "a loss that is NaN" else 1.0)
    run.accelerator.backward(loss)
    if what == "clipped":
        run.accelerator.clip_grad_norm_(run.model.parameters(), 1e-3)
    run.accelerator.load_state(folder)
    run.steps(2, 4)
    found = run.accelerator.get_state_dict(run.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("what", ["a backward", "clipped", "a loss that is NaN"])
def test_a_step_that_was_given_up_does_not_reach_the_loaded_run(world, tmp_path, what):
    world(2).run(_under_way, str(tmp_path / "state"), what)
