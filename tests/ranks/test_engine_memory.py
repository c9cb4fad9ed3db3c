"""Bytes at rest are the plan's formula, exactly; collectives are counted, exactly.

The formulas are written here from the shapes alone, with nothing taken from the engine but its alignment of 128 bytes:

    a tensor takes its bytes rounded up to 128; a buffer takes the sum rounded up to 128 x world; a shard takes 1/world.
"""

from __future__ import annotations

import gc
import math
import time

import pytest
import torch

from rig.engine import PLANS, inputs, loss_of, mine, prepare, tower
from shardwise.zero.flat import FlatBuffer

pytestmark = pytest.mark.thinned(2)

ALIGNMENT = 128


def _up(value, multiple):
    return math.ceil(value / multiple) * multiple


def buffer_numel(shapes, itemsize, world_size):
    """Elements of a flat buffer of tensors of these shapes, whole."""
    align = ALIGNMENT // itemsize
    return _up(sum(_up(math.prod(shape), align) for shape in shapes), align * world_size)


def _unit_of(name):
    """tower(): each block is a unit, all else is the root's."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "root"


def mixed_tower():
    """Some units trained whole, one frozen whole, one half frozen."""
    model = tower()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].up.requires_grad_(False)
    return model


def formula(model, plan, precision, n, moments=2):
    """{(role, tier): bytes on each rank} at rest, without gradients; `moments` fp32 states of the optimizer too."""
    stage, offload_optimizer, offload_param = PLANS[plan]
    compute = {"no": 4, "bf16": 2}[precision]
    weight_tier = "gpu" if offload_param == "none" else offload_param
    optimizer_tier = "gpu" if offload_optimizer == "none" else offload_optimizer
    units = {}
    for name, p in model.named_parameters():
        # Trained weights that stay whole follow no module: they share buckets, and here all fit into one.
        home = "bucket" if p.requires_grad and stage < 3 else _unit_of(name)
        units.setdefault(home, {True: [], False: []})[p.requires_grad].append(tuple(p.shape))
    found = {}

    def add(role, tier, nbytes):
        if nbytes:
            found[role, tier] = found.get((role, tier), 0) + nbytes

    sharded, optimizer_sharded = stage == 3, stage >= 1
    for parts in units.values():
        if parts[False]:
            # Frozen weights lie in bytes: every tensor is aligned by itself.
            nbytes = sum(_up(math.prod(shape) * compute, ALIGNMENT) for shape in parts[False])
            add("frozen", weight_tier, _up(nbytes, ALIGNMENT * n) // n if sharded else _up(nbytes, ALIGNMENT))
        if parts[True]:
            numel = buffer_numel(parts[True], compute, n if optimizer_sharded else 1)
            mine = numel // n if optimizer_sharded else numel
            add("parameter", weight_tier, compute * (mine if sharded else numel))
            master_is_weight = compute == 4 and weight_tier == optimizer_tier
            add("optimizer", optimizer_tier, 4 * mine * (moments + (not master_is_weight)))
    return found


def _bytes(ranks, plan, precision):
    model = mixed_tower()
    sharded, _, stepping = prepare(ranks, model, plan, precision=precision)
    for batch in inputs(3):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    return {(str(role), str(tier)): nbytes for (role, tier), nbytes in sharded.ledger().items() if role != "gradient"}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_bytes_at_rest_are_the_formula_on_every_rank(world, plan, n, precision):
    # Moments are the optimizer's: the next test finds them among all tensors.
    expected = formula(mixed_tower(), plan, precision, n, moments=0)
    for ledger in world(n).run(_bytes, plan, precision):
        assert ledger == expected


def _storages():
    """Bytes of all tensor storages that are alive in this process."""
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        # isinstance() would ask a released parameter's guard for its class; type() asks nobody.
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                storage = thing.untyped_storage()
                seen[storage._cdata] = storage.nbytes()
    return sum(seen.values())


def _alive(ranks, plan, precision):
    before = _storages()
    model = mixed_tower()
    sharded, _, stepping = prepare(ranks, model, plan, precision=precision)
    for batch in inputs(3):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    del batch
    ranks.any_of([False])  # the last backward's vote has come in,
    time.sleep(0.05)  # and gloo's thread has let go of its message
    gc.collect()
    scalars = sum(
        t.nbytes for state in stepping.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim == 0
    )
    host_gradients = sum(nbytes for (role, _), nbytes in sharded.ledger().items() if role == "gradient")
    staging = sharded.engine.stores.staging_nbytes
    return _storages() - before - scalars - host_gradients - staging, host_gradients, staging


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_no_other_tensor_is_alive_between_steps(world, plan, n, precision):
    """Every tensor that Python can see, counted: the ledger cannot forget one."""
    expected = sum(size for (_, tier), size in formula(mixed_tower(), plan, precision, n).items() if tier != "nvme")
    # Moments may be kept without the padding between tensors (they are per interval): never more than the formula.
    padding = 2 * 4 * sum(32 * n + 32 for _ in mixed_tower().parameters())
    for alive, host_gradients, staging in world(n).run(_alive, plan, precision):
        assert expected - padding <= alive <= expected, (alive, expected)
        assert (host_gradients == 0) is (PLANS[plan][1] == "none")
        assert staging <= (2 * 8 * 8 * 2**20 if "disk" in plan else 0), "two rings of eight blocks, whatever the model"


def _counts(ranks, plan, checkpointed, prefetch=1):
    from torch.utils.checkpoint import checkpoint

    model = mixed_tower()
    if checkpointed:
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    _, _, stepping = prepare(ranks, model, plan, prefetch=prefetch)
    seen = []
    for batch in inputs(5):
        ranks.counts.clear()
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
        seen.append(dict(ranks.counts))
    ranks.counts.clear()
    with torch.no_grad():
        model(inputs(1)[0])
    return seen, dict(ranks.counts)


# mixed_tower at stage 3 has 4 units, 3 of them with trained weights; block 1 has a frozen and a trained buffer, which are
# gathered together. At stages 0 to 2 its trained weights are one bucket.
UNITS = 4


def gathers_per_step(stage, prefetch=1):
    """One per unit and pass, both of its buffers together; what the turn to the backward needs first is kept over it.

    forward: root 0 1 2, backward: root 2 1 0. Of the last 1 + prefetch and the first 1 + prefetch, those in both stay.
    """
    kept = {0: 0, 1: 1, 3: UNITS}[prefetch]
    return {0: 0, 1: 1, 2: 1, 3: 2 * UNITS - kept}[stage]


def reductions_per_backward(stage):
    return 3 if stage == 3 else 1


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_has_one_gather_per_unit_and_pass_and_one_reduction_per_trained_unit(world, plan, n):
    stage = PLANS[plan][0]
    for seen, _ in world(n).run(_counts, plan, False):
        for counts in seen[2:]:
            assert counts.get("all_gather", 0) == gathers_per_step(stage), counts
            assert counts.get("reduce_scatter", 0) == (reductions_per_backward(stage) if stage >= 1 else 0), counts
            assert counts.get("all_reduce_gradient", 0) == (1 if stage == 0 else 0), counts
            assert counts.get("broadcast", 0) == 0
            assert counts.get("gather_numbers", 0) == 0, "no pass is negotiated once the order is known"
            assert counts.get("all_reduce", 0) <= 1, counts
            # Which parameters were used, and at the end of each pass whether a rank needs it once more.
            assert counts.get("any_of", 0) <= (3 if stage == 3 else 1), counts


@pytest.mark.parametrize("prefetch", [0, 3])
def test_prefetch_and_checkpointing_add_no_gather(world, prefetch):
    for seen, _ in world(2).run(_counts, "3", True, prefetch):
        assert seen[-1]["all_gather"] == gathers_per_step(3, prefetch)
        assert seen[-1]["reduce_scatter"] == 3


@pytest.mark.parametrize("plan", PLANS)
def test_an_evaluation_forward_gathers_each_unit_once_and_reduces_nothing(world, plan):
    for _, counts in world(2).run(_counts, plan, False):
        assert counts.get("all_gather", 0) == (UNITS if PLANS[plan][0] == 3 else 0)
        assert counts.get("reduce_scatter", 0) == 0


def _accumulated_counts(ranks, plan):
    model = mixed_tower()
    sharded, _, stepping = prepare(ranks, model, plan)
    for batch in inputs(4):
        ranks.counts.clear()
        for i in range(4):
            sharded.sync_gradients = i == 3
            loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    return dict(ranks.counts)


@pytest.mark.parametrize("plan", PLANS)
def test_whole_gradients_are_reduced_at_the_boundary_and_sharded_ones_each_time(world, plan):
    stage = PLANS[plan][0]
    for counts in world(2).run(_accumulated_counts, plan):
        assert counts.get("reduce_scatter", 0) == {0: 0, 1: 1, 2: 4, 3: 12}[stage]
        assert counts.get("all_reduce_gradient", 0) == (1 if stage == 0 else 0)


def _single_rank_counts(ranks):
    return _counts(ranks, "3", False)


def test_the_offloaded_step_of_one_rank_talks_to_nobody(world):
    ((seen, _),) = world(1).run(_single_rank_counts)
    assert seen[-1].get("gather_numbers", 0) == 0
    assert math.isfinite(sum(seen[-1].values()))


def _peak_in_backward(ranks, plan):
    """Bytes alive when the first layer's gradient comes, which is last, over those when the backward began."""
    model = tower(depth=12)
    sharded, _, stepping = prepare(ranks, model, plan)
    seen = []
    model.first.weight.register_hook(lambda gradient: seen.append(_storages()))
    for batch in inputs(3):
        loss = loss_of(model, mine(batch, ranks.rank, ranks.world_size))
        before = _storages()
        loss.backward()
        stepping.step()
        stepping.zero_grad()
    del sharded
    return seen[-1] - before


def test_the_offloaded_backward_of_one_rank_does_not_collect_whole_gradients(world):
    """With nothing to wait for, a reduced gradient's scratch memory is given back before the next unit's comes."""
    whole_gradients = 4 * sum(p.numel() for p in tower(depth=12).parameters())
    (grown,) = world(1).run(_peak_in_backward, "3-all")
    # What stays is one shard (on one rank that is the unit's whole gradient), not the shard and the scratch beside it.
    assert grown < 1.5 * whole_gradients, (grown, whole_gradients)


def _largest_whole_at_once(ranks, plan):
    """The most bytes of whole storage that buffers held at one time while the model was prepared, and one unit's."""
    held, most = set(), [0]
    expand, collapse = FlatBuffer.__init__, FlatBuffer.collapse

    def built(self, *args, **kwargs):
        expand(self, *args, **kwargs)
        held.add(self)
        most[0] = max(most[0], sum(buffer.whole.untyped_storage().nbytes() for buffer in held))

    def collapsed(self):
        collapse(self)
        held.discard(self)

    FlatBuffer.__init__, FlatBuffer.collapse = built, collapsed
    try:
        sharded, *_ = prepare(ranks, tower(depth=8), plan)
    finally:
        FlatBuffer.__init__, FlatBuffer.collapse = expand, collapse
    largest = max(b.layout.numel * b.dtype.itemsize for u in sharded.units for b in u.buffers)
    return most[0], largest


@pytest.mark.parametrize("n", [1, 2])
def test_preparing_holds_one_whole_unit_at_a_time(world, n):
    for most, largest in world(n).run(_largest_whole_at_once, "3-all"):
        assert most <= 2 * largest
