"""`gather_dtype: int8`: between machines passes compute with weights that came as codes, and all else has the very weights.

The machines are played: ranks are told that they sit on several. The plain copy of a model gets the rounded weights by hand.
"""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn
from torch.func import grad

import shardwise
from rig.engine import Tower, adamw, inputs, loss_of, mine, plain_step, prepare, trained, weights_of
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.errors import ConfigError, WriteError
from shardwise.plan.compressed import Packing
from shardwise.ranks.group import Group
from shardwise.run.joined import Joined, forget_run
from shardwise.zero.compressed import dequantise, quantise
from shardwise.zero.sharded import find_sharded
from shardwise.zero.unit import Weights


def on_two_machines(ranks):
    apart = copy.copy(ranks)
    apart._divided, apart.machines = {}, tuple(2 * rank // ranks.world_size for rank in range(ranks.world_size))
    return apart


def tower(frozen=False):
    torch.manual_seed(5)
    model = Tower(3, width=36)
    if frozen:
        for block in model.blocks:
            block.up.requires_grad_(False)
    return model


def compressed(ranks, model=None, plan="3", **settings):
    settings = {"precision": "bf16", "gather_dtype": "int8", **settings}
    return prepare(on_two_machines(ranks), tower() if model is None else model, plan, **settings)


def in_pairs_apart(ranks, *, all_own):
    """Two groups of two ranks, each rank on a machine of its own."""
    apart = copy.copy(ranks)
    apart._divided, apart.machines = {}, tuple(range(ranks.world_size))
    return apart.divided(2, all_own=all_own)


def rounded_by_hand(sharded):
    """Name -> what passes shall compute with, of the weights as they rest; and whether the buffer travels as codes."""
    found, packed = {}, {}
    with sharded.gathered(), torch.no_grad():
        for unit in sharded.units:
            for buffer in unit.buffers:
                values, whole = buffer.whole.clone(), buffer.numbers(buffer.whole) if buffer.packing else None
                if whole is not None:
                    packing = Packing(whole.numel() // buffer.layout.world_size, buffer.layout.world_size)
                    assert packing == buffer.packing
                    parts = torch.zeros(packing.nbytes, dtype=torch.uint8)
                    for row, shard in zip(parts.view(packing.shards, -1), whole.view(packing.shards, -1), strict=True):
                        quantise(shard, packing, row)
                    dequantise(parts, packing, buffer.numbers(values))
                for index, member in enumerate(buffer.members):
                    found[member.name] = buffer.view(index, values).clone()
                    packed[member.name] = whole is not None
    return found, packed


# The numbers.


def _trains(ranks, plan, frozen, settings, all_own=None):
    reference = tower(frozen).bfloat16()
    apart = on_two_machines(ranks) if all_own is None else in_pairs_apart(ranks, all_own=all_own)
    sharded, _, stepping = prepare(apart, tower(frozen), plan, precision="bf16", gather_dtype="int8", **settings)
    masters = {name: p.detach().float().clone() for name, p in tower(frozen).named_parameters()}
    plain = adamw([masters[name].requires_grad_() for name, p in reference.named_parameters() if p.requires_grad])
    names = {id(p): name for name, p in reference.named_parameters()}
    for step, batch in enumerate(x.bfloat16() for x in inputs(4)):
        weights, packed = rounded_by_hand(sharded)
        assert {packed[name] for name, p in reference.named_parameters() if p.requires_grad} == {not settings}
        assert all(packed[name] for name, p in reference.named_parameters() if not p.requires_grad)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter.copy_(weights[name])
        expected = plain_step(reference, batch, ranks.world_size, step, loss_of)[ranks.rank]
        loss = loss_of(sharded.model, mine(batch, ranks.rank, ranks.world_size))
        loss.backward()
        assert loss.item() == expected, step
        for parameter, own in zip(trained(reference), trained(sharded.model), strict=True):
            torch.testing.assert_close(shardwise.gradient(own), parameter.grad.float(), rtol=0.02, atol=1e-3)
            masters[names[id(parameter)]].grad = shardwise.gradient(own).clone()
            parameter.grad = None
        stepping.step()
        stepping.zero_grad()
        plain.step()
    with sharded.gathered():  # padding stays zeros, which raise no block's scale
        assert not any(gap.any() for u in sharded.units for b in u.buffers for gap in b.slices_and_gaps(b.whole)[1])
    state = sharded.state_dict()
    if ranks.rank == 0:  # what is saved are the masters, and frozen weights as they were
        for name, value in state.items():
            wanted = masters[name] if masters[name].requires_grad else masters[name].bfloat16().float()
            torch.testing.assert_close(value.float(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("n", "plan", "frozen", "settings"),
    [
        (2, "3", False, {}),
        (4, "3", True, {}),
        (4, "3", True, {"whole_adapters": True}),
        (2, "3-all", True, {}),
        (2, "3-disk", False, {}),
    ],
)
def test_a_step_computes_with_the_rounded_weights_and_changes_the_exact_ones(world, n, plan, frozen, settings):
    world(n).run(_trains, plan, frozen, settings)


@pytest.mark.parametrize(("plan", "all_own"), [("3", False), ("3", True), ("3-all", True)])
def test_groups_that_lie_on_several_machines_and_states_over_all_ranks_do_the_same(world, plan, all_own):
    world(4).run(_trains, plan, False, {}, all_own)


# What is exact.


def _is_exact(ranks, plan):
    said = {}
    model = tower(frozen=True)
    sharded, _, stepping = compressed(ranks, model, plan, generation_memory_budget=None)
    before = {name: p.detach().bfloat16() for name, p in tower().named_parameters()}
    rounded, _ = rounded_by_hand(sharded)

    def forward(*, backward=False):
        """The weights that the modules of a pass compute with, by name."""
        found = {}

        def note(prefix):
            def hook(module, args):
                found.update({f"{prefix}.{n}": p.detach().clone() for n, p in module.named_parameters()})

            return hook

        hooks = [
            m.register_forward_pre_hook(note(name)) for name, m in model.named_modules() if isinstance(m, nn.Linear)
        ]
        loss = loss_of(model, mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size))
        for hook in hooks:
            hook.remove()
        if backward:
            loss.backward()
            stepping.zero_grad()
        return found

    def same(found, wanted):
        return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)

    assert not same(rounded, before)
    for _ in range(3):  # negotiated, then ordered
        said["a forward"] = same(forward(backward=True), rounded)
    with torch.no_grad():
        said["an evaluation"] = same(forward(), rounded)
        said["an evaluation again"] = same(forward(), rounded)
    with torch.inference_mode():
        said["inference mode"] = same(forward(), rounded)
    said["gathered"] = same(weights_of(sharded), before)
    with sharded.gathered(), torch.no_grad():
        said["a forward in gathered"] = same(forward(), before)
    with sharded.generation(), torch.no_grad():
        for _ in range(2 + ranks.rank):
            said["a generation"] = same(forward(), before)
    forward()  # and no backward: what stays for it is rounded
    said["gathered behind a forward"] = same(weights_of(sharded), before)
    state = sharded.state_dict()
    wanted = {
        name: p.detach() if p.requires_grad else p.detach().bfloat16() for name, p in tower(True).named_parameters()
    }
    said["state_dict"] = same(state, wanted) if ranks.rank == 0 else not state
    with sharded.gathered(modify=True), torch.no_grad():
        model.head.weight.mul_(1.5)
    before["head.weight"] = before["head.weight"] * 1.5
    said["gathered modify"] = same(weights_of(sharded), before)
    rounded, _ = rounded_by_hand(sharded)
    said["a forward at last"] = same(forward(backward=True), rounded)
    forward()
    sharded.release()
    with torch.no_grad():
        said["release"] = same({n: p.detach().bfloat16() for n, p in model.named_parameters()}, before)
    return [what for what, right in said.items() if not right]


@pytest.mark.parametrize(("n", "plan"), [(4, "3"), (2, "3-all")])
def test_only_passes_see_rounded_weights(world, n, plan):
    assert world(n).run(_is_exact, plan) == [[]] * n


def _kept_by_a_graph(ranks, plan):
    """A graph keeps gathered weights, rounded, while a script reads: what it reads is exact, and the backward works."""
    model = tower()
    sharded, _, stepping = compressed(ranks, model, plan)
    before = {name: p.detach().bfloat16() for name, p in tower().named_parameters()}
    for _ in range(3):
        x = mine(inputs(1)[0], ranks.rank, ranks.world_size).bfloat16().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).float().square().sum(), x, create_graph=True)
        assert any(unit.state is Weights.GATHERED and unit.rounded for unit in sharded.units)
        found = weights_of(sharded)
        assert all(torch.equal(found[name], before[name]) for name in before)
        gradient.square().sum().backward()
        stepping.zero_grad()


@pytest.mark.parametrize("plan", ["3", "3-all", "3-disk"])
def test_what_a_graph_keeps_is_gathered_again_exactly_for_a_script(world, plan):
    world(2).run(_kept_by_a_graph, plan)


def _thaws(ranks):
    """A frozen weight is trained from some step on: its master starts from the exact value."""
    model = tower(frozen=True)
    sharded, _, stepping = compressed(ranks, model)
    x = mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size)
    loss_of(model, x).backward()
    stepping.zero_grad()
    model.blocks[0].up.weight.requires_grad_(True)
    loss_of(model, x).backward()
    found = {trained.name: trained for trained in sharded.trained()}["blocks.0.up.weight"]
    wanted = tower().blocks[0].up.weight.detach().bfloat16().float().flatten()
    pieces = [wanted[p.in_slot : p.in_slot + p.numel] for p in found.region.pieces]
    assert torch.equal(found.master.tensor[: sum(p.numel() for p in pieces)], torch.cat(pieces))
    assert found.buffer.packing is not None
    rounded, _ = rounded_by_hand(sharded)
    seen = []
    model.blocks[0].up.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    loss_of(model, x)
    assert torch.equal(seen[0], rounded["blocks.0.up.weight"])


def test_a_thawed_weight_starts_from_its_exact_value(world):
    world(2).run(_thaws)


def _loops(ranks):
    """Ranks run a block a different number of times: what is here is gathered again for the others, the same."""
    model = tower()
    sharded, _, stepping = compressed(ranks, model, "3-all")
    rounded, _ = rounded_by_hand(sharded)
    seen = []
    model.blocks[1].up.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    for step in range(4):
        model.times = 1 + (step + ranks.rank) % 2
        model.forward = lambda x: _looped(model, x)
        loss_of(model, mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size)).backward()
        stepping.zero_grad()
    assert len(seen) == 6
    assert all(torch.equal(weight, rounded["blocks.1.up.weight"]) for weight in seen)


def _looped(model, x):
    x = model.first(x)
    for _ in range(model.times):
        for block in model.blocks:
            x = block(x)
    return model.head(x)


def test_ranks_that_loop_differently_see_the_same_weights(world):
    world(2).run(_loops)


def _transformed(ranks):
    model = tower()
    sharded, _, _ = compressed(ranks, model)
    rounded, _ = rounded_by_hand(sharded)
    plain = tower().bfloat16()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(rounded[name])
    x = inputs(1)[0].bfloat16()[0]
    for _ in range(2):
        assert torch.equal(grad(lambda row: model(row).sum())(x), grad(lambda row: plain(row).sum())(x))


def test_transforms_see_rounded_weights(world):
    world(2).run(_transformed)


# A script that reads between passes, by the Accelerator.


def _reads_between(ranks):
    accelerator, model = accelerator_on_two_machines(ranks), tower()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accelerator.prepare(model, optimizer)
    rounded, _ = rounded_by_hand(find_sharded(model))
    before = {name: p.detach().bfloat16() for name, p in tower().named_parameters()}
    x = inputs(1)[0]
    plain, exact = tower().bfloat16(), tower().bfloat16()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(rounded[name])
        wanted = plain(x.bfloat16()).float(), exact(x.bfloat16()).float()
        assert not torch.equal(*wanted)
        found = []
        for _ in range(3):
            found.append(torch.equal(model(x.bfloat16()), wanted[0]))  # every rank evaluates
            with torch.enable_grad():
                model(x.bfloat16())  # and no backward: its last units are here still, rounded
            accelerator.wait_for_everyone()
            if ranks.rank == 0:
                found.append(torch.equal(model.head.weight.detach().clone(), before["head.weight"]))
                found.append(torch.equal(model(x.bfloat16()), wanted[1]))  # on this rank alone
            accelerator.wait_for_everyone()
    accelerator.backward(loss_of(model, x.bfloat16()))
    optimizer.step()
    accelerator.free_memory()
    forget_run()
    return found


def accelerator_on_two_machines(ranks, **keywords):
    forget_run()
    Accelerator(cpu=True)
    Joined.ranks.machines = on_two_machines(ranks).machines
    values = {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}, "bf16": {"enabled": True}}
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=values), **keywords)


def test_a_rank_that_reads_or_evaluates_alone_has_the_very_weights(world):
    first, second = world(2).run(_reads_between)
    assert first == [True] * 9
    assert second == [True] * 3


# What is sent.


def _sent(ranks, gather_dtype, frozen):
    model = tower(frozen)
    sharded, _, stepping = compressed(ranks, model, gather_dtype=gather_dtype, whole_adapters=False)
    sent: list[int] = []
    gather = Group.all_gather

    def counted(group, whole, shard):
        sent.append(shard.nbytes)
        gather(group, whole, shard)

    for step in range(3):
        if step == 2:  # the first passes are negotiated
            ranks.counts.clear()
            Group.all_gather = counted
        try:
            loss_of(model, mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size)).backward()
        finally:
            Group.all_gather = gather
        stepping.zero_grad()
    sizes = {buffer.layout.shard_numel * buffer.dtype.itemsize for unit in sharded.units for buffer in unit.parts}
    return sorted(sent), ranks.counts["all_gather"], sizes


@pytest.mark.parametrize("frozen", [False, True])
def test_each_gather_is_one_collective_of_so_many_bytes(world, frozen):
    ways = (world(2).run(_sent, gather_dtype, frozen) for gather_dtype in ("none", "int8"))
    for (exact, count, sizes), (codes, same, _) in zip(*ways, strict=True):
        assert count == same
        assert set(exact) == sizes
        numels = [size // 2 for size in exact]
        assert codes == [math.ceil((n + 4 * math.ceil(n / 256)) / 16) * 16 for n in numels]


# Where it has no effect, and what is refused.


def _on_one_machine(ranks, machines, group):
    losses = []
    with heard(logging.INFO) as said:
        for gather_dtype in ("none", "int8"):
            apart = copy.copy(ranks)
            apart._divided, apart.machines = {}, machines
            model = tower()
            grouped = apart.divided(group)
            prepared = prepare(grouped, model, "3", precision="bf16", gather_dtype=gather_dtype)
            for batch in inputs(2):
                loss = loss_of(model, mine(batch.bfloat16(), ranks.rank, ranks.world_size))
                loss.backward()
                prepared[2].step()
                prepared[2].zero_grad()
                losses.append(loss.item())
    assert losses[:2] == losses[2:]
    return [text for text in said if "gather_dtype" in text]


@pytest.mark.parametrize(
    ("machines", "group", "why"),
    [((0, 0, 0, 0), "world", "all ranks are"), ((0, 0, 1, 1), "machine", "each shard group is")],
)
def test_inside_of_machines_it_has_no_effect_and_says_so_once(world, machines, group, why):
    text = f"gather_dtype: has no effect: {why} on one machine, where weights are gathered exactly."
    assert world(4).run(_on_one_machine, machines, group) == [[text], [], [], []]


def _told(ranks, plan, precision):
    with heard(logging.INFO) as said:
        try:
            sharded, _, _ = compressed(ranks, None, plan, precision=precision)
        except ConfigError as error:
            return str(error)
        packed = {m.name: b.packing is not None for u in sharded.units for b in u.buffers for m in b.members}
    return [text for text in said if "gather_dtype" in text], packed


def test_what_travels_how_is_said(world):
    first, *others = world(2).run(_told, "3", "bf16")
    (text,), packed = first
    assert text.startswith("gather_dtype int8: 0.0 MB of weights travel as 0.0 MB in each pass.")
    assert all(packed.values())
    assert others[0][0] == []
    ((text,), packed), _ = world(2).run(_told, "2", "bf16")
    assert text == "gather_dtype: has no effect: passes gather no weights below zero_stage 3."
    assert not any(packed.values())


def test_trained_fp32_weights_are_one_error_and_frozen_ones_travel_exactly(world):
    found = world(2).run(_told, "3", "no")
    assert len(set(found)) == 1
    assert (
        "first.weight is trained and gathered in float32. Set mixed_precision: bf16, or gather_dtype: none." in found[0]
    )


def _frozen_in_fp32(ranks):
    model = tower().bfloat16()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.head.requires_grad_(True)
    model.blocks[0].up.float()
    model.blocks[0].up.forward = lambda x: nn.functional.linear(x.float(), model.blocks[0].up.weight).bfloat16()
    with heard(logging.INFO) as said:
        sharded, _, _ = compressed(ranks, model, precision="no")
    weights, packed = rounded_by_hand(sharded)
    exact = {name for name, codes in packed.items() if not codes}
    seen = []
    model.blocks[0].up.register_forward_pre_hook(lambda module, args: seen.append(module.weight.detach().clone()))
    for _ in range(2):
        loss_of(model, mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size)).backward()
    assert all(torch.equal(weight, weights["blocks.0.up.weight"]) for weight in seen)
    return [text for text in said if "gather_dtype" in text], exact


def test_a_frozen_buffer_with_fp32_in_it_travels_exactly(world):
    (said, exact), _ = world(2).run(_frozen_in_fp32)
    assert exact == {f"blocks.0.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")}
    assert "0.0 MB travel exactly, the first blocks.0.up.weight: their buffers hold bfloat16, float32." in said[0]


def _writes(ranks):
    model = tower()
    sharded, _, _ = compressed(ranks, model)

    def write(module, args):
        with torch.no_grad():
            module.weight.mul_(2)

    hook = model.blocks[1].up.register_forward_pre_hook(write)
    x = mine(inputs(1)[0].bfloat16(), ranks.rank, ranks.world_size)
    texts = []
    try:
        loss_of(model, x).backward()
    except WriteError as error:
        texts.append(str(error))
    hook.remove()
    before = {name: p.detach().bfloat16() for name, p in tower().named_parameters()}
    found = weights_of(sharded)
    assert all(torch.equal(found[name], before[name]) for name in before)
    loss_of(model, x).backward()
    return texts


def test_writing_inside_of_a_pass_is_an_error_that_says_where_to_write(world):
    for (text,) in world(2).run(_writes):
        assert text.startswith(
            "blocks.1.up.weight was written inside of a forward or a backward, to which it came in 8 bits"
        )
