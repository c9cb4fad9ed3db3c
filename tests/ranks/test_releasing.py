"""What a released model has is what was trained, in the dtype that it came in."""

from __future__ import annotations

import pytest
import torch

from rig.engine import inputs, loss_of, mine, prepare, tower
from rig.heard import heard
from shardwise.errors import OptimizerError, PrepareError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
COMPUTE = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _trained(ranks, plan, precision, dtype, steps=3):
    """(ShardedModel, the optimizer, the weights that it was built with)"""
    model = tower().to(DTYPES[dtype])
    model.blocks[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    built = {name: p.detach().clone() for name, p in model.named_parameters()}
    sharded, stepper, stepping = prepare(ranks, model, plan, precision=precision, whole_adapters=False)
    for batch in inputs(steps):
        x = mine(batch, ranks.rank, ranks.world_size).to(DTYPES[dtype])
        stepper.scaler.scale(loss_of(model, x).float()).backward()
        stepping.step()
        stepping.zero_grad()
    return sharded, stepping, built


def _released(ranks, plan, precision, dtype):
    sharded, _, built = _trained(ranks, plan, precision, dtype)
    model = sharded.model
    masters = {}
    for unit in sharded.units:
        if unit.trained is not None:
            whole = sharded.whole.master(unit.trained)
            masters |= {
                m.name: unit.trained.buffer.view(i, whole).clone() for i, m in enumerate(unit.trained.buffer.members)
            }
    with heard() as lines:
        sharded.release()
    compute = COMPUTE[precision]
    for name, parameter in model.named_parameters():
        assert type(parameter) is torch.nn.Parameter
        assert parameter.dtype == DTYPES[dtype], name
        if name in masters:
            expected = masters[name].to(DTYPES[dtype])
            assert (expected != built[name]).any(), "it was trained"
        else:
            expected = built[name] if compute is None else built[name].to(compute).to(DTYPES[dtype])
        assert torch.equal(parameter, expected), name
    out = model(inputs(1)[0].to(DTYPES[dtype]))
    assert out.dtype == DTYPES[dtype]
    rounds = compute is not None and DTYPES[dtype] != compute
    assert bool(lines) == (rounds and ranks.rank == 0), lines
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CASES = [
    *((plan, "bf16", "fp32", 2) for plan in ("0", "1", "2", "3", "2-opt", "3-all", "3-disk")),
    *(("3-disk", precision, dtype, 1) for precision, dtype in (("bf16", "fp32"), ("no", "bf16"), ("fp16", "fp32"))),
    *(("3", precision, "fp32", 3) for precision in ("no", "fp16")),
    *(("2", precision, dtype, 3) for precision, dtype in (("bf16", "bf16"), ("no", "bf16"), ("no", "fp64"))),
    ("3-all", "bf16", "fp16", 2),
]


@pytest.mark.parametrize(("plan", "precision", "dtype", "n"), CASES)
def test_released_weights_are_the_trained_ones_in_their_own_dtype(world, plan, precision, dtype, n):
    first, *others = world(n).run(_released, plan, precision, dtype)
    for other in others:
        assert all(torch.equal(first[name], value) for name, value in other.items())


def _lacks(ranks):
    """fp16 has no 65536, to which bf16 rounds the largest numbers of fp16."""
    model = tower().half()
    model.requires_grad_(False)
    model.head.weight.requires_grad_(True)
    with torch.no_grad():
        model.first.bias[0] = 65504.0
    sharded, _, _ = prepare(ranks, model, "3", precision="bf16")
    sharded.release()
    assert model.first.bias.dtype == torch.bfloat16
    assert model.first.bias[0] == 65536.0
    assert model.first.weight.dtype == model.head.weight.dtype == torch.float16


def test_a_value_that_the_own_dtype_lacks_is_kept(world):
    world(2).run(_lacks)


def _again(ranks, plan):
    """Prepared, trained, released and prepared anew; against one run. In fp32 masters a round trip loses nothing."""
    whole, _, _ = _trained(ranks, plan, "bf16", "fp32", steps=6)
    sharded, stepping, _ = _trained(ranks, plan, "bf16", "fp32", steps=3)
    states = stepping.state_dict()
    model = sharded.model
    sharded.release()
    sharded, stepper, stepping = prepare(ranks, model, plan, precision="bf16", whole_adapters=False)
    stepping.load_state_dict(states)
    for batch in inputs(6)[3:]:
        stepper.scaler.scale(loss_of(model, mine(batch, ranks.rank, ranks.world_size)).float()).backward()
        stepping.step()
        stepping.zero_grad()
    found, expected = sharded.state_dict(), whole.state_dict()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("plan", ["0", "2", "3", "3-disk"])
def test_a_model_that_is_released_and_prepared_anew_trains_on_to_the_bit(world, plan):
    assert world(2).run(_again, plan) == [[], []]


def _done_for(ranks):
    sharded, stepping, _ = _trained(ranks, "3", "no", "fp32")
    state = stepping.state_dict()
    sharded.release()
    for verb in (stepping.step, stepping.state_dict, lambda: stepping.load_state_dict(state)):
        with pytest.raises(
            OptimizerError, match=r"AdamW drives shards of a Tower that has been released \(free_memory\)"
        ):
            verb()


def test_an_optimizer_of_a_released_model_says_so(world):
    world(2).run(_done_for)


def _parted(ranks, plan, precision):
    sharded, _, _ = _trained(ranks, plan, precision, "fp32")
    data, ranks.shards._data = ranks.shards._data, None  # as leaving the run does
    try:
        if plan == "3":
            with pytest.raises(PrepareError, match=r"Call free_memory\(\) before end_training"):
                sharded.release()
        else:
            sharded.release()
            return {name: p.detach().clone() for name, p in sharded.model.named_parameters()}
    finally:
        ranks.shards._data = data
    return {}


@pytest.mark.parametrize(("plan", "precision"), [("0", "bf16"), ("2", "no"), ("2", "bf16"), ("3", "no")])
def test_after_the_ranks_have_parted_whole_weights_are_released_and_sharded_ones_refused(world, plan, precision):
    first, second = world(2).run(_parted, plan, precision)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) and value.dtype == torch.float32 for name, value in first.items())


def _thawed_but_released(ranks, plan):
    """The engine had begun to listen for a backward that comes to a thawed weight. One rank alone trains on."""
    model = tower()
    model.blocks[1].requires_grad_(False)
    sharded, *kept = prepare(ranks, model, plan)
    model.blocks[1].requires_grad_(True)
    loss_of(model, inputs(1)[0])
    sharded.release()
    if ranks.rank == 0:
        loss_of(model, inputs(1)[0]).backward()
        assert all(type(p.grad) is torch.Tensor for p in model.parameters())
    del kept  # the optimizer, which had the engine until here


@pytest.mark.parametrize("plan", ["0", "3"])
def test_nobody_listens_to_the_weights_of_a_released_model(world, plan):
    world(2).run(_thawed_but_released, plan, timeout_s=30)
