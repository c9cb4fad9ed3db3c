"""Offloading changes where bytes rest and nothing else: to the bit, on every tier, with several chunks to a unit."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rig.engine import Tower, adamw, inputs, loss_of, mine, prepare, tower
from shardwise.errors import RankError, StoreError
from shardwise.plan.plan import Tier

pytestmark = pytest.mark.thinned(2)

# (stage, optimizer, param)
TIERS = {
    "1-cpu": (1, "cpu", "none"),
    "1-nvme": (1, "nvme", "none"),
    "2-cpu": (2, "cpu", "none"),
    "2-nvme": (2, "nvme", "none"),
    "3-opt-cpu": (3, "cpu", "none"),
    "3-opt-nvme": (3, "nvme", "none"),
    "3-param-cpu": (3, "none", "cpu"),
    "3-param-nvme": (3, "none", "nvme"),
    "3-cpu": (3, "cpu", "cpu"),
    "3-nvme": (3, "nvme", "nvme"),
    "3-mixed": (3, "nvme", "cpu"),
}
OPTIMIZERS = {
    "AdamW": adamw,
    "two groups": lambda ps: torch.optim.AdamW(
        [{"params": ps[:3]}, {"params": ps[3:], "lr": 1e-2, "weight_decay": 0.1}], lr=3e-3, eps=1e-4
    ),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, initial_accumulator_value=0.1),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, centered=True),
    "Rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-3),
}


def half_frozen():
    """Wide enough that a third of a block is two chunks."""
    torch.manual_seed(5)
    model = Tower(depth=3, width=240)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].up.requires_grad_(False)
    return model


def _train(
    ranks, stage, optimizer, param, folder, *, make=adamw, steps=4, micro=1, clipping=None, precision="no", **more
):
    """(losses, weights on rank 0, ShardedModel, ShardedOptimizer)"""
    with _small_chunks(), _plan(stage, optimizer, param):
        return _trained(ranks, folder, make, steps, micro, clipping, precision, more)


@contextmanager
def _small_chunks():
    """A page of 16 bits."""
    from shardwise.step import visits

    whole, visits.CHUNK = visits.CHUNK, 2048
    try:
        yield
    finally:
        visits.CHUNK = whole  # the ranks are those of the tests to come


@contextmanager
def _plan(*placement):
    """A plan called "chosen" for the rig."""
    from rig import engine

    engine.PLANS["chosen"] = placement
    try:
        yield
    finally:
        del engine.PLANS["chosen"]


def _trained(ranks, folder, make, steps, micro, clipping, precision, more):
    model = half_frozen()
    paths = dict.fromkeys(("param", "optimizer"), folder)
    sharded, stepper, stepping = prepare(
        ranks, model, "chosen", optimizer=make, clipping=clipping, precision=precision, nvme_paths=paths, **more
    )
    losses = []
    for batch in inputs(steps):
        parts = mine(batch, ranks.rank, ranks.world_size).chunk(micro)
        for i, part in enumerate(parts):
            sharded.sync_gradients = i == len(parts) - 1
            loss = stepper.scaler.scale(loss_of(model, part) / len(parts))
            loss.backward()
            losses.append(float(loss.detach()))
        stepping.step()
        stepping.zero_grad()
    return losses, sharded.state_dict(), sharded, stepper


def _bits(ranks, tier, folder, **settings):
    """What differs from the run of the same stage with nothing offloaded."""
    stage, optimizer, param = TIERS[tier]
    if "make" in settings:
        settings["make"] = OPTIMIZERS.get(settings["make"], settings["make"])
    losses, weights, *_ = _train(ranks, stage, "none", "none", folder, **settings)
    others, found, *_ = _train(ranks, stage, optimizer, param, folder, **settings)
    return [i for i, pair in enumerate(zip(losses, others, strict=True)) if pair[0] != pair[1]], [
        name for name, value in weights.items() if not torch.equal(value, found[name])
    ]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_tier_gives_the_bits_of_none(world, tmp_path, tier, n, precision):
    for differing in world(n).run(_bits, tier, tmp_path, precision=precision, clipping=0.5):
        assert differing == ([], [])


@contextmanager
def _small_blocks():
    """A block is a page, so that small slabs too lie on all drives."""
    from shardwise.offload import host, striping

    assert host.BLOCK == 8 << 20, "memory stays as it is"
    whole, striping.BLOCK = striping.BLOCK, 4096
    try:
        yield
    finally:
        striping.BLOCK = whole


def _striped(ranks, tier, folders, **settings):
    """`_bits` over several drives; the bytes on each drive at the end, and those that were written to it."""
    with _small_blocks():
        differing = _bits(ranks, tier, folders, **settings)
        *_, sharded, _ = _train(ranks, *TIERS[tier], folders, **settings)
        (store,) = sharded.engine.stores.drives
        lie, written = [drive.files.nbytes for drive in store.drives], [drive.bytes_written for drive in store.drives]
        sharded.release()
    return differing, lie, written


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in "abc"]
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("tier", ["1-nvme", "3-param-nvme", "3-nvme"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_several_drives_give_the_bits_of_none_and_share_the_bytes(world, folders, tier, n, precision):
    for differing, lie, written in world(n).run(_striped, tier, folders, precision=precision, clipping=0.5):
        assert differing == ([], [])
        for each in (lie, written):
            assert min(each) > 0.7 * max(each)
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


@pytest.mark.parametrize("tier", ["3-cpu", "3-nvme", "1-nvme"])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_visits_the_device_unchanged(world, tmp_path, tier, make):
    for differing in world(2).run(_bits, tier, tmp_path, make=make):
        assert differing == ([], [])


class CountsInItsGroup(torch.optim.Optimizer):
    """Gradient descent whose rate falls with the steps that its group has seen, as some optimizers keep their count."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-2, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"] / group["steps"])


@pytest.mark.parametrize("tier", ["3-cpu", "3-nvme"])
def test_an_optimizer_that_counts_for_its_group_visits_the_device_unchanged(world, tmp_path, tier):
    for differing in world(2).run(_bits, tier, tmp_path, make=CountsInItsGroup):
        assert differing == ([], [])


@pytest.mark.parametrize("tier", ["3-nvme", "2-cpu", "1-nvme"])
def test_accumulated_gradients_are_added_where_they_rest(world, tmp_path, tier):
    for differing in world(2).run(_bits, tier, tmp_path, micro=3):
        assert differing == ([], [])


@pytest.mark.parametrize("tier", ["3-nvme", "2-nvme"])
def test_an_fp16_overflow_skips_the_step_on_a_drive_too(world, tmp_path, tier):
    for differing in world(2).run(_bits, tier, tmp_path, precision="fp16", scale=2.0**30):
        assert differing == ([], [])


def _written(ranks, folder):
    """Bytes that went to the drive in prepare, and in the steps after it; the same for reading."""
    model = tower()
    for block in model.blocks:
        block.requires_grad_(False)
    with _plan(3, "none", "nvme"):
        sharded, _, stepping = prepare(ranks, model, "chosen", nvme_paths={"param": str(folder)}, whole_adapters=True)
    store = sharded.engine.stores.of(Tier.NVME, "param")
    before = store.bytes_written
    slabs = [unit.frozen.slab for unit in sharded.units if unit.frozen is not None]
    assert len(slabs) == store.open_files > 0
    times = [os.fstat(slab.files[0].descriptor).st_mtime_ns for slab in slabs]
    for batch in inputs(3):
        loss_of(model, mine(batch, ranks.rank, ranks.world_size)).backward()
        stepping.step()
        stepping.zero_grad()
    ledger = sharded.ledger()
    unchanged = [os.fstat(slab.files[0].descriptor).st_mtime_ns for slab in slabs] == times
    sharded.release()
    return before, store.bytes_written - before, store.bytes_read, unchanged, store.open_files, ledger


def test_a_frozen_base_is_written_once_and_only_read_afterwards(world, tmp_path):
    for first, later, read, unchanged, files, ledger in world(2).run(_written, tmp_path):
        assert first > 0
        assert later == 0
        assert read > first, "every pass reads it"
        assert unchanged
        assert ledger["frozen", "nvme"] > 0
        assert files == 0, "a run takes its files with it"
    assert list(tmp_path.iterdir()) == []


def _fault(ranks, folder, kind):
    """Train with a drive that fails on rank 1; the error that this rank got."""
    from shardwise.offload import drive

    real = drive.read_at, drive.write_at, os.posix_fallocate
    calls = {"n": 0}

    def failing(code):
        def call(*args):
            calls["n"] += 1
            if calls["n"] > 6:
                raise OSError(code, os.strerror(code))
            return real[0 if kind == "read EIO" else 1](*args)

        return call

    def short(descriptor, buffers, offset):
        calls["n"] += 1
        got = real[0](descriptor, buffers, offset)
        return got if calls["n"] <= 6 else 1

    def no_space(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    try:
        if ranks.rank == 1:
            if kind == "read EIO":
                drive.read_at = failing(errno.EIO)
            elif kind == "short read":
                drive.read_at = short
            elif kind == "write ENOSPC":
                drive.write_at = failing(errno.ENOSPC)
            elif kind == "no space":
                os.posix_fallocate = no_space
            elif kind == "path gone":
                folder = Path("/proc/nowhere")
        _train(ranks, 3, "nvme", "nvme", folder, steps=6)
    except (StoreError, RankError) as error:
        return type(error).__name__, str(error)
    finally:
        drive.read_at, drive.write_at, os.posix_fallocate = real
    return "nothing", ""


@pytest.mark.parametrize("kind", ["no space", "read EIO", "short read", "write ENOSPC", "path gone"])
def test_a_failing_drive_is_one_clear_error_on_every_rank(world, tmp_path, kind):
    (other, told), (own, text) = world(2).run(_fault, tmp_path, kind)
    assert (other, own) == ("RankError", "StoreError")
    assert "rank 1" in text
    assert text in told, "the others repeat it"
    assert ("nvme_path" in text) or ("last checkpoint" in text)


def _second_full(ranks, folders, when):
    """Train with a second drive that is full on rank 1, from the start or later; the error, and what is left."""
    from shardwise.offload import drive

    real = os.posix_fallocate, drive.write_at
    calls = {"n": 0}

    def full(call):
        def told(descriptor, *args):
            if f"{folders[1]}/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                calls["n"] += 1
                if when == "at the start" or calls["n"] > 6:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(descriptor, *args)

        return told

    try:
        if ranks.rank == 1 and when == "at the start":
            os.posix_fallocate = full(real[0])
        elif ranks.rank == 1:
            drive.write_at = full(real[1])
        with _small_blocks():
            _train(ranks, 3, "nvme", "nvme", folders, steps=6)
    except (StoreError, RankError) as error:
        return type(error).__name__, str(error)
    finally:
        os.posix_fallocate, drive.write_at = real
    return "nothing", ""


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_full_second_drive_is_one_error_that_names_it(world, folders, when):
    (other, told), (own, text) = world(2).run(_second_full, folders, when)
    assert (other, own) == ("RankError", "StoreError")
    assert "rank 1 could not" in text
    assert f"in {folders[1]}: No space left on device" in text
    assert text in told, "the others repeat it"
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def _missing(ranks, folders):
    try:
        _train(ranks, 3, "nvme", "nvme", folders)
    except (StoreError, RankError) as error:
        return str(error)
    return ""


def test_a_second_drive_that_is_not_there_is_refused_on_every_rank(world, folders):
    for text in world(2).run(_missing, [folders[0], folders[0] / "not mounted"]):
        assert "not mounted: No such file or directory. Each of several paths must exist" in text
    assert list(folders[0].iterdir()) == []


def test_a_part_of_a_slab_is_read_and_written_whatever_pages_it_meets(tmp_path):
    from shardwise.offload.nvme import NvmeStore
    from shardwise.ranks.lanes import Lanes

    store = NvmeStore(tmp_path, Lanes(torch.device("cpu")), 0)
    content = torch.arange(5_000_001, dtype=torch.int32)
    slab = store.allocate(content.numel(), torch.int32, "weights")
    slab.put(content).enqueued()
    store.drain()
    for begin, numel in ((0, 7), (1021, 3), (1023, 4_000_000), (4_999_990, 11), (0, 5_000_001)):
        assert torch.equal(slab.read_part(begin, numel), content[begin : begin + numel])
        content[begin : begin + numel] += 1
        slab.write_part(begin, content[begin : begin + numel])
    assert torch.equal(slab.read_part(0, content.numel()), content)
    store.close()


def _budgeted(ranks, folder, tier, budget):
    stage, optimizer, param = TIERS[tier]
    losses, weights, *_ = _train(ranks, stage, optimizer, param, folder, steps=6, clipping=0.5)
    others, found, sharded, stepper = _train(
        ranks, stage, optimizer, param, folder, steps=6, clipping=0.5, gpu_memory_budget=budget
    )
    ledger = {**sharded.ledger()}
    for key, nbytes in stepper.ledger().items():
        ledger[key] = ledger.get(key, 0) + nbytes
    offloaded = sum(nbytes for (_, place), nbytes in ledger.items() if place != "gpu")
    same = losses == others and all(torch.equal(value, found[name]) for name, value in weights.items())
    return same, offloaded, [unit.leaves for unit in sharded.units]


@pytest.mark.parametrize("tier", ["3-cpu", "3-nvme", "3-opt-cpu", "2-nvme", "3-mixed"])
def test_a_budget_keeps_on_the_device_what_fits_and_changes_no_bit(world, tmp_path, tier):
    offloaded = []
    for budget in (0, 80_000, 1 << 30):
        found = world(2).run(_budgeted, tmp_path, tier, budget)
        assert all(same for same, *_ in found)
        offloaded.append(found[0][1])
        if budget == 1 << 30 and TIERS[tier][2] != "none":
            assert found[0][2].count(False) == 1, "the frozen block stays whole"
    assert offloaded[0] >= offloaded[1] >= offloaded[2] == 0
    assert offloaded[0] > 0
    if tier == "3-nvme":  # several units, with all of their states in files
        assert offloaded[0] > offloaded[1] > 0


class _Lopsided(torch.nn.Module):
    """Two small weights that are used, with a large one between them that is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first = torch.nn.Parameter(torch.randn(6))
        self.spare = torch.nn.Parameter(torch.randn(8000))
        self.last = torch.nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * self.first + self.last


def _visited(ranks, placement, folder):
    """Elements of masters that came up in each of three steps; the weights are plain torch's."""
    from shardwise.offload.nvme import NvmeStore

    model, reference, came = _Lopsided(), _Lopsided(), []
    fetch = NvmeStore.fetch

    def counted(store, slab, out, begin=0):
        came[-1] += out.numel()
        return fetch(store, slab, out, begin)

    with _small_chunks(), _plan(*placement):
        paths = dict.fromkeys(("param", "optimizer"), folder)
        sharded, _, stepping = prepare(ranks, model, "chosen", optimizer=adamw, nvme_paths=paths)
        plain = adamw(list(reference.parameters()))
        for number in range(3):
            batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
            for each, optimizer in ((model, stepping), (reference, plain)):
                each(batch).square().mean().backward()
                came.append(0)
                NvmeStore.fetch = counted
                try:
                    optimizer.step()
                finally:
                    NvmeStore.fetch = fetch
                optimizer.zero_grad()
        weights = sharded.state_dict()
    if ranks.rank == 0:
        for name, value in reference.named_parameters():
            assert torch.equal(weights[name], value.detach()), name
    return came[2::2]


@pytest.mark.parametrize("placement", [(1, "nvme", "none"), (3, "nvme", "nvme")])
def test_chunks_of_which_nothing_is_stepped_stay_where_they_are(world, tmp_path, placement):
    """Behind the first step, which has no states, of two ranks each visits one chunk of two; the gradient is in host memory."""
    for steps in world(2).run(_visited, placement, str(tmp_path)):
        assert all(0 < elements <= 3 * 2048 for elements in steps), steps


class _Ahead(torch.nn.Module):
    """A frozen unit, and one of which the middle third has no states."""

    def __init__(self):
        super().__init__()
        self.lopsided = _Lopsided()
        self.frozen = torch.nn.Linear(6, 1000).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.lopsided(x))


def _unlike(ranks, folder, budget):
    """What stays on the device, and whether each unit is still gathered."""
    sharded, _, stepping = prepare(
        ranks,
        _Ahead(),
        "3-disk",
        units=["_Lopsided", "Linear"],
        nvme_paths=dict.fromkeys(("param", "optimizer"), folder),
        gpu_memory_budget=budget,
    )
    for number in range(4):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        sharded.model(batch).square().mean().backward()
        stepping.step()
        stepping.zero_grad()
    return [unit.leaves for unit in sharded.units], [
        unit.trained.master.tier.name for unit in sharded.units if unit.trained is not None
    ]


@pytest.mark.parametrize("budget", [30_000, 45_000, 1 << 30])
def test_ranks_whose_states_differ_keep_the_same_on_the_device(world, tmp_path, budget):
    """Of three ranks the second has a third of a weight that no step has touched, and so no states."""
    first, *others = world(3).run(_unlike, str(tmp_path), budget, timeout_s=30)
    assert all(other == first for other in others)
