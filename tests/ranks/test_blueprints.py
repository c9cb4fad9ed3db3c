"""The arithmetic of a plan, done on meta tensors, is what the engine holds: to the byte, on every rank."""

from __future__ import annotations

import pytest
import torch

from rig.engine import PLANS, adamw, inputs, loss_of, mine, prepare, states_at_rest, tower, trained
from rig.tiny import batches, share, tiny
from shardwise.plan.blueprint import at_rest, divide, gathered_at_once
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.plan.units import find_units
from shardwise.zero.build import BUCKET_NBYTES
from shardwise.zero.flat import FlatBuffer

MODELS = ("mixed", "llama/full", "llama/lora", "llama/lora+save", "tied/full", "bart/lora")


def build(name):
    if name == "mixed":
        model = tower()
        model.blocks[0].requires_grad_(False)
        model.blocks[1].up.requires_grad_(False)
        return model
    return tiny(*name.split("/"))


def blueprints_of(model, plan, precision):
    stage, optimizer, param = PLANS[plan]
    chosen = Plan.from_stage(stage, offload_optimizer=optimizer, offload_param=param)
    return divide(find_units(model), chosen, Precision.named(precision), bucket_nbytes=BUCKET_NBYTES)


def _without_gradients(ledger):
    return {key: nbytes for key, nbytes in ledger.items() if key[0] != "gradient"}


def _ledgers(ranks, name, precision):
    """Per plan: the engine's ledger after a backward and after a step, and the moments' after the step."""
    found = {}
    for plan in PLANS:
        model = build(name)
        sharded, stepper, optimizer = prepare(ranks, model, plan, precision=precision)
        if name == "mixed":
            loss = loss_of(model, mine(inputs(1)[0], ranks.rank, ranks.world_size))
        else:
            batch = batches(name.split("/")[0], 1, 2 * ranks.world_size)[0]
            loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        before = sharded.ledger()
        optimizer.step()
        optimizer.zero_grad()
        after = sharded.ledger()
        found[plan] = before, _without_gradients(after), stepper.ledger()
        sharded.release()
    return found


@pytest.mark.thinned(2, rows=True)
@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "no") for name in MODELS), ("mixed", "bf16"), ("llama/lora", "bf16"), ("tied/full", "fp16")],
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_arithmetic_gives_the_engines_bytes_under_every_plan(world, n, name, precision):
    with torch.device("meta"):
        model = build(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    for rank, found in enumerate(world(n).run(_ledgers, name, precision)):
        for plan, (backward, step, moments) in found.items():
            blueprints = blueprints_of(model, plan, precision)
            assert at_rest(blueprints, n, gradients=True) == backward, plan
            assert at_rest(blueprints, n) == step, plan
            assert states_at_rest(blueprints, model, n, rank) == moments, plan


def _most_gathered(ranks, plan, prefetch):
    """The most bytes that whole weights which come and go had in the last of some steps."""
    held, most = {}, [0]
    expand, collapse = FlatBuffer.expand, FlatBuffer.collapse

    def expanded(self):
        expand(self)
        held[id(self)] = self.whole.untyped_storage().nbytes()
        most[0] = max(most[0], sum(held.values()))

    def collapsed(self):
        collapse(self)
        held.pop(id(self), None)

    model = build("llama/lora")
    _, _, optimizer = prepare(ranks, model, plan, prefetch=prefetch, optimizer=adamw)
    assert trained(model)
    FlatBuffer.expand, FlatBuffer.collapse = expanded, collapsed
    try:
        for batch in batches("llama", 4, 2 * ranks.world_size):
            held.clear()
            most[0] = 0
            model(**share(batch, ranks.rank, ranks.world_size)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        FlatBuffer.expand, FlatBuffer.collapse = expand, collapse
    return most[0]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_step_never_gathers_more_than_the_arithmetic_says(world, prefetch):
    with torch.device("meta"):
        model = build("llama/lora")
    for plan in ("3", "3-all"):
        expected = gathered_at_once(blueprints_of(model, plan, "no"), model, 2, prefetch)
        for most in world(2).run(_most_gathered, plan, prefetch):
            assert most == expected
