"""Optimizers that look at all of a parameter: each parameter is stepped by one rank, with plain torch's numbers and states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rig.engine import (
    inputs,
    largest_difference,
    loss_of,
    mine,
    plain_step,
    prepare,
    shard,
    step_both,
    tower,
    train_both,
    trained,
    weights_of,
)
from rig.optimizers import AdafactorLike, Lamb, Loop
from shardwise.errors import OptimizerError
from shardwise.step.optimizer import ShardedOptimizer, find_sharded_optimizer

PLANS = ("0", "1", "2", "3", "2-opt", "3-all", "3-disk")
ALL_OWN = (2, "world")


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [p for p in parameters if p.ndim == 2]


def hf_adafactor(parameters: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=True)


def adamw_8bit(parameters: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-2, eps=1e-4, min_8bit_size=200)


# name -> (the optimizer, what a weight may differ by after all steps). Muon orthogonalises in bf16, and codes of 8 bits round:
# where a sum over ranks has another last bit than a sum over one batch, now and then an element rounds to a neighbour.
OPTIMIZERS: dict[str, tuple[Any, float]] = {
    "Muon": (lambda p: torch.optim.Muon(matrices(p), lr=1e-3), 1e-5),
    "Adafactor": (lambda p: torch.optim.Adafactor(p, lr=1e-2), 1e-6),
    "hf-Adafactor": (hf_adafactor, 1e-6),
    "Lamb": (lambda p: Lamb(p, weight_decay=0.1), 1e-6),
    "AdafactorLike": (AdafactorLike, 1e-6),
    "AdamW8bit": (adamw_8bit, 1e-4),
}
STEPS = 20
COVER = [
    (name, plan, 1 + (row + column) % 3)
    for row, name in enumerate(OPTIMIZERS)
    for column, plan in enumerate(PLANS)
    if (row + column) % 2 or plan in ("3", "3-disk")
]
REST = [(name, plan, n) for name in OPTIMIZERS for plan in PLANS for n in (1, 2, 3) if (name, plan, n) not in COVER]


def _trains(ranks: Any, name: str, plan: str, shard_group: Any = "world") -> float:
    weights, optimizer = shard_group if isinstance(shard_group, tuple) else (shard_group, "shard_group")
    make, _ = OPTIMIZERS[name]
    grouped = ranks.divided(weights, all_own=optimizer == "world")
    # Losses are looser than weights: the batch is small.
    sharded, reference = train_both(grouped, tower(), plan, optimizer=make, steps=STEPS, tolerance=1e-3)
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.thinned(2, rows=True)
@pytest.mark.parametrize(("name", "plan", "n"), [*COVER, *(pytest.param(*c, marks=pytest.mark.full) for c in REST)])
def test_it_trains_as_plain_torch_does(world, name, plan, n):
    assert max(world(n).run(_trains, name, plan)) <= OPTIMIZERS[name][1]


@pytest.mark.parametrize(
    ("name", "plan", "shard_group"),
    [
        ("Adafactor", "3", 2),
        ("Adafactor", "2", 2),
        ("Lamb", "3", ALL_OWN),
        ("Adafactor", "3-disk", ALL_OWN),
        ("Muon", "3", ALL_OWN),
    ],
)
def test_it_trains_in_groups_of_ranks(world, name, plan, shard_group):
    assert max(world(4).run(_trains, name, plan, shard_group)) <= OPTIMIZERS[name][1]


def _beside_adamw(ranks: Any, plan: str) -> float:
    """Matrices by Muon and the rest by AdamW: two optimizers over one model, clipped together, two micro-batches a step."""
    model = tower()
    reference = copy.deepcopy(model)

    def make(of: nn.Module) -> list[Any]:
        rest = [p for p in of.parameters() if p.ndim != 2]
        return [torch.optim.Muon(matrices(of.parameters()), lr=1e-3), torch.optim.AdamW(rest, lr=1e-2, eps=1e-4)]

    plain, stepping = make(reference), make(model)
    sharded = shard(ranks, model, plan)
    steppers = [ShardedOptimizer(each, [sharded]) for each in stepping]
    for number, batch in enumerate(inputs(6)):
        boundary = number % 2 == 1
        sharded.sync_gradients = boundary
        plain_step(reference, batch, ranks.world_size, number, loss_of)
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        if boundary:
            nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
            steppers[0].clip_norm(model.parameters(), 0.05)
            for each in plain:
                each.step()
                each.zero_grad()
        for each in stepping:
            each.step()
        for each in stepping:
            each.zero_grad()
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-disk"])
def test_muon_beside_adamw_accumulates_and_clips(world, plan):
    assert max(world(2).run(_beside_adamw, plan)) <= 1e-5


class Counts(Loop):
    """Looks at rows, and remembers how many elements it has stepped."""

    seen = 0

    def one(self, p, grad, group, state):
        type(self).seen += p.numel()
        p.sub_(grad / (grad.norm(dim=-1, keepdim=True) + 1e-3), alpha=group["lr"])


def _stepped(ranks: Any, plan: str) -> tuple[int, int, dict[str, int]]:
    model = tower()
    total = sum(p.numel() for p in model.parameters())
    _, _, stepping = prepare(ranks, model, plan, optimizer=Counts)
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    Counts.seen = 0
    ranks.shards.counts.clear()
    stepping.step()
    counts = dict(ranks.shards.counts)
    assert sum(p.numel() for group in stepping.param_groups for p in group["params"]) == total  # its own and others'
    return Counts.seen, total, counts


@pytest.mark.parametrize("n", [1, 3])
def test_each_parameter_is_stepped_once_in_the_whole_run(world, n):
    found = world(n).run(_stepped, "3")
    total = found[0][1]
    assert sum(seen for seen, _, _ in found) == total
    for seen, _, counts in found:
        assert seen < 1.6 * total / n
        assert counts.get("all_to_all", 0) == (8 if n > 1 else 0)  # to owners and back, for each of 4 units
        assert "all_gather" not in counts


def test_where_every_rank_has_all_each_steps_all(world):
    for seen, total, counts in world(2).run(_stepped, "0"):
        assert seen == total
        assert "all_to_all" not in counts


def _bytes(ranks: Any, plan: str, name: str) -> tuple[dict[Any, int], int]:
    model = tower()
    _, stepper, stepping = prepare(ranks, model, plan, optimizer=OPTIMIZERS[name][0])
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    stepping.step()
    held = find_sharded_optimizer(stepping)
    assert held is stepper
    rows = 0
    for whole in stepper.groups.owned:
        rows += sum(whole.shape) * 4 if len(whole.shape) == 2 else whole.numel * 4
    return stepper.ledger(), rows + 4 * len(stepper.groups.owned)


@pytest.mark.parametrize("plan", ["1", "3", "3-disk"])
def test_states_of_adafactor_take_its_rows_and_columns(world, plan):
    """Of a matrix rows + columns, of a vector its elements, and a count of steps; on all ranks together once."""
    for ledger, wanted in world(2).run(_bytes, plan, "Adafactor"):
        assert sum(ledger.values()) == wanted


def _dictionary(ranks: Any, plan: str, name: str) -> None:
    """torch's own dictionary goes in, and comes out as torch's."""
    make, _ = OPTIMIZERS[name]
    model, reference = tower(), tower()
    plain = make(reference.parameters())
    for batch in inputs(2):
        plain_step(reference, batch, 1, 0, loss_of)
        plain.step()
        plain.zero_grad()
    model.load_state_dict(reference.state_dict())
    stepping = make(trained(model))
    sharded = shard(ranks, model, plan)
    ShardedOptimizer(stepping, [sharded])
    stepping.load_state_dict(plain.state_dict())
    given, wanted = stepping.state_dict()["state"], plain.state_dict()["state"]
    assert given.keys() == wanted.keys()
    for number, state in wanted.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(given[number][key]), torch.as_tensor(value)), (number, key)
    for batch in inputs(2, seed=3):
        step_both(ranks, batch, (reference, plain), (model, stepping))
    assert largest_difference(weights_of(sharded), reference) <= 1e-5


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
@pytest.mark.parametrize("plan", ["0", "2", "3", "3-disk"])
def test_torchs_dictionaries_go_in_and_come_out(world, plan, name):
    world(2).run(_dictionary, plan, name)


def _grows(ranks: Any, plan: str) -> float:
    """Weights that thaw, and a group that is added, are stepped whole from then on."""
    model = tower()
    for module in (model.blocks[1], model.head):
        module.requires_grad_(False)
    reference = copy.deepcopy(model)
    head = {id(p) for p in model.head.parameters()}
    plain = AdafactorLike(
        [p for p in reference.parameters() if id(p) not in {id(q) for q in reference.head.parameters()}]
    )
    stepping = AdafactorLike([p for p in model.parameters() if id(p) not in head])
    sharded = shard(ranks, model, plan)
    ShardedOptimizer(stepping, [sharded])
    for number, batch in enumerate(inputs(4)):
        if number == 1:
            for each in (model, reference):
                each.blocks[1].requires_grad_(True)
        if number == 2:
            for each, optimizer in ((model, stepping), (reference, plain)):
                each.head.requires_grad_(True)
                optimizer.add_param_group({"params": list(each.head.parameters()), "lr": 1e-3})
        step_both(ranks, batch, (reference, plain), (model, stepping))
    return largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize("plan", ["0", "1", "3", "3-disk"])
def test_what_comes_later_is_stepped_whole_too(world, plan):
    assert max(world(2).run(_grows, plan)) <= 1e-6


class Peeks(AdafactorLike):
    """With a verb of its own that looks at the parameters."""

    def peek(self) -> float:
        return sum(float(p.sum()) for group in self.param_groups for p in group["params"])


def _peeks(ranks: Any) -> str:
    _, _, stepping = prepare(ranks, tower(), "2", optimizer=Peeks)
    with pytest.raises(OptimizerError) as caught:
        stepping.peek()
    return str(caught.value)


def test_a_verb_that_would_see_stand_ins_is_refused(world):
    assert all("Peeks.peek() works on the parameters of its groups" in text for text in world(2).run(_peeks))


def _overridden(ranks: Any, plan: str) -> tuple[float, set[torch.dtype]]:
    """As Trainer does with embeddings: the states of one module's weight stay in 32 bits."""
    import bitsandbytes

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    model = tower()
    reference = copy.deepcopy(model)
    try:
        for each in (model, reference):
            manager.register_module_override(each.blocks[1].up, "weight", {"optim_bits": 32})
        plain, stepping = adamw_8bit(reference.parameters()), adamw_8bit(model.parameters())
        sharded = shard(ranks, model, plan)
        stepper = ShardedOptimizer(stepping, [sharded])
        for batch in inputs(8):
            step_both(ranks, batch, (reference, plain), (model, stepping))
        found = stepper.states.whole()
        kinds = {name: state["state1"].dtype for (_, name), state in found.items()}
        wanted = {name: plain.state[p]["state1"].dtype for name, p in reference.named_parameters()}
        assert kinds == wanted
        return largest_difference(weights_of(sharded), reference), set(kinds.values())
    finally:
        manager.initialize()


@pytest.mark.parametrize("plan", ["0", "2", "3-disk"])
def test_settings_of_single_parameters_hold_for_what_is_stepped_in_their_place(world, plan):
    for difference, kinds in world(2).run(_overridden, plan):
        assert difference <= 1e-4
        assert kinds == {torch.uint8, torch.float32}


def _clipped_by_its_groups(ranks: Any, plan: str) -> tuple[float, float]:
    """A script may give what stands in the optimizer's groups: of one that steps whole parameters all of it, on every rank."""
    model, reference = tower(), tower()
    plain = AdafactorLike(reference.parameters())
    _, stepper, stepping = prepare(ranks, model, plan, optimizer=AdafactorLike)
    plain_step(reference, inputs(1)[0], ranks.world_size, 0, loss_of)
    loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size)).backward()
    expected = nn.utils.clip_grad_norm_([p for group in plain.param_groups for p in group["params"]], 0.01)
    found = stepper.clip_norm([p for group in stepping.param_groups for p in group["params"]], 0.01)
    plain.step()
    stepping.step()
    sharded = stepper.models[0]
    return abs(float(found) - float(expected)), largest_difference(weights_of(sharded), reference)


@pytest.mark.parametrize("plan", ["0", "3"])
def test_what_its_groups_hold_is_clipped_together(world, plan):
    for norm, weights in world(3).run(_clipped_by_its_groups, plan):
        assert norm <= 1e-6
        assert weights <= 1e-6
