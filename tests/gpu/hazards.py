"""What only a device can do wrong, each in a case built to show it. Rows of worker.py, and a program of its own:

    torchrun --nproc_per_node 2 tests/gpu/hazards.py                        every row
    torchrun --nproc_per_node 2 tests/gpu/hazards.py --only branches        the rows whose name contains "branches"

It uses nothing of shardwise that came with the repairs, so PYTHONPATH may name an older commit: there one row at a time, for a
row that fails may hang, end the process, or leave the device in an error. A row that hangs ends the run after HANG_S seconds
with the stack of every thread.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import faulthandler
import gc
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from by_hand import average_gradients, weights_apart
from table import Check, Row, run
from torch import Tensor, nn

from shardwise.config.compiling import CompileConfig
from shardwise.config.sections import EngineConfig
from shardwise.errors import StoreError
from shardwise.offload import peers
from shardwise.offload.host import HostStore
from shardwise.offload.nvme import NvmeStore
from shardwise.plan.plan import Plan
from shardwise.plan.precision import Precision
from shardwise.ranks.lanes import Lanes
from shardwise.ranks.ranks import Ranks
from shardwise.step.optimizer import ShardedOptimizer
from shardwise.tuning.compiling import CompiledBlocks
from shardwise.tuning.recomputing import RecomputedBlocks
from shardwise.zero.sharded import ShardedModel

LOSS, WEIGHT = 1e-5, 1e-5  # fp32, relative and absolute: cuBLAS, cuDNN and NCCL may sum in another order
HANG_S = 40
LATE_S = 0.5
CYCLES = int(LATE_S * 1.8e9)  # of torch.cuda._sleep, which counts the multiprocessors' clock


def prepare(ranks: Ranks, model: nn.Module, stage: int, **settings: Any) -> tuple[ShardedModel, torch.optim.Optimizer]:
    """The model sharded in fp32, and SGD with momentum on it. settings: of the Plan where they begin with "offload", options of
    the engine by their names in a file, and keywords of ShardedModel.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    plan = Plan.from_stage(stage, **{key: settings.pop(key) for key in list(settings) if key.startswith("offload")})
    options = EngineConfig(**{key: settings.pop(key) for key in list(settings) if key in EngineConfig.model_fields})
    keywords = {"precision": Precision.named("no"), "options": options, **settings}
    sharded = ShardedModel(model, plan=plan, ranks=ranks, **keywords)
    ShardedOptimizer(optimizer, [sharded])
    return sharded, optimizer


def beside_plain(
    ranks: Ranks,
    plain: nn.Module,
    forward: Callable[[nn.Module, int, int], Tensor],
    stage: int,
    *,
    steps: int,
    accumulation: int = 1,
    **settings: Any,
) -> tuple[float, float]:
    """The largest difference of a loss, relative, and of a weight, from the same model in plain torch on each rank.

    forward: (model, step, micro-batch) -> this rank's loss.
    """
    plain.to(ranks.device)
    model = copy.deepcopy(plain)
    sharded, optimizer = prepare(ranks, model, stage, **settings)
    theirs = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    losses: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        for micro in range(accumulation):
            sharded.sync_gradients = micro == accumulation - 1
            mine, wanted = forward(model, step, micro), forward(plain, step, micro)
            (mine / accumulation).backward()
            (wanted / accumulation).backward()
            losses.append((mine.detach(), wanted.detach()))
        average_gradients(ranks, plain)
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()
    loss = max(abs(a.item() - b.item()) / abs(b.item()) for a, b in losses)
    return loss, weights_apart(sharded, plain)


def row_of(name: str, apart: tuple[float, float], note: str = "", loss: float = LOSS, weight: float = WEIGHT) -> Row:
    return Row("hazard", name, *apart, apart[0] <= loss and apart[1] <= weight, note)


@contextlib.contextmanager
def ended_if_it_hangs() -> Iterator[None]:
    """A rank that waits on the device for another cannot be told to stop: end the process, with the stack of every thread."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def drawn(ranks: Ranks, step: int, micro: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + ranks.rank)
    return torch.randn(*shape, generator=generator).to(ranks.device)


# A. Dropout in blocks that are recomputed and called by keyword.


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, *, hidden_states: Tensor) -> Tensor:
        return hidden_states + nn.functional.dropout(self.linear(hidden_states), 0.5, self.training)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dropping() for _ in range(3))
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(hidden_states=x)
        result: Tensor = self.head(x)
        return result


class Masked(nn.Module):
    """One such block: what it returns shows the mask, and so does the gradient of its bias under a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Dropping()])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.blocks[0](hidden_states=x)
        return result


def check_keywords(stage: int, backend: str, ranks: Ranks) -> Row:
    """Recomputed blocks see the dropout masks of their forward: the numbers of a run that recomputes nothing.

    With the device's generator left alone, the recomputation drew the next masks, and gradients were those of another forward.
    A compiled forward draws by kernels of its own, and others with recomputation than without: there the mask is read off.
    """
    name = f"keywords, recomputed, stage {stage}, {'eager' if backend == 'no' else f'compiled {backend}'}"
    if backend != "no":
        return row_of(name, (0.0, _mask_apart(stage, backend, ranks)), weight=1e-6)

    def train(recompute: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(5)
        model = Keywords().to(ranks.device)
        sharded, optimizer = prepare(ranks, model, stage, units=["Dropping"])
        replaced = RecomputedBlocks(list(model.blocks) if recompute else [], sharded, None)
        torch.manual_seed(11)
        losses = []
        for step in range(4):
            loss = model(drawn(ranks, step, 0, 16, 64)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with sharded.gathered():
            weights = [parameter.detach().clone() for parameter in model.parameters()]
        replaced.undo()
        return losses, weights

    (losses, weights), (others, other_weights) = train(recompute=False), train(recompute=True)
    loss = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    weight = max(float((a - b).abs().max()) for a, b in zip(weights, other_weights, strict=True))
    return row_of(name, (loss, weight), loss=1e-6, weight=1e-6)


def _mask_apart(stage: int, backend: str, ranks: Ranks) -> float:
    """How far a step of a compiled, recomputed block is from the step of the mask that its forward drew."""
    torch.manual_seed(5)
    model = Masked().to(ranks.device)
    sharded, optimizer = prepare(ranks, model, stage, units=["Dropping"])
    replaced: Any = CompiledBlocks(list(model.blocks), CompileConfig(dynamo_backend=backend), sharded, recompute=True)
    bias = model.blocks[0].linear.bias
    apart = 0.0
    for step in range(3):
        with sharded.gathered():
            before = bias.detach().clone()
        x = drawn(ranks, step, 0, 16, 64)
        out = model(x)
        out.sum().backward()
        expected = 2.0 * (out.detach() != x).sum(0, dtype=torch.float32)
        ranks.all_reduce(expected, "mean")
        for group in optimizer.param_groups:
            group["momentum"] = 0.0
        optimizer.step()
        optimizer.zero_grad()
        with sharded.gathered():
            apart = max(apart, float((bias.detach() - (before - 1e-2 * expected)).abs().max()))
    replaced.undo()
    return apart


# B. Recurrent layers, whose weights cuDNN moves.


class Reader(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rnn: Any = kind(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.flatten_parameters()
        result: Tensor = self.head(self.rnn(x)[0])
        return result


def check_flattened(kind: Callable[..., nn.Module], stage: int, ranks: Ranks) -> Row:
    """Layers that flatten their weights in every forward train, as the plain ones do.

    Weights that cuDNN had moved into a buffer of its own were read there and trained where they had been.
    """
    torch.manual_seed(7)
    plain = Reader(kind)
    start = [parameter.detach().clone() for parameter in plain.parameters()]

    def forward(model: nn.Module, step: int, micro: int) -> Tensor:
        loss: Tensor = model(drawn(ranks, step, micro, 8, 5, 16)).square().mean()
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*contiguous chunk")  # which is so
        apart = beside_plain(ranks, plain, forward, stage, steps=8)
    moved = max(float((a.detach().cpu() - b).abs().max()) for a, b in zip(plain.parameters(), start, strict=True))
    row = row_of(f"recurrent, {kind.__name__}, stage {stage}", apart, f"weights moved {moved:.1e}")
    row.ok &= moved > 100 * WEIGHT
    return row


# C. Ranks on other branches while gradients leave for host memory.


class Small(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.up(torch.tanh(self.down(x)))
        return result


class Big(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + torch.tanh(self.linear(x))
        return result


class Branches(nn.Module):
    def __init__(self, kinds: Sequence[Callable[[int], nn.Module]], width: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(kind(width) for kind in kinds)

    def forward(self, x: Tensor, route: Iterable[int]) -> Tensor:
        x = self.first(x)
        for index in route:
            x = self.blocks[index](x)
        result: Tensor = self.head(x)
        return result


# The last block is gathered first in a backward. Rank 0 reduces it before it gathers the first one, rank 1 the other way round.
ONE_BIG = [Small, Small, Small, Small, Big]
ALL_BIG = [Big, Big, Big, Big]
KNOWN = 2  # steps in which all ranks take all blocks in turn, and learn the order


def check_branches(
    name: str, kinds: Sequence[Callable[[int], nn.Module]], other: Sequence[int], offload: bool, ranks: Ranks
) -> Row:
    """Ranks on two routes train as a plain model, with a big unit on its way down, or more than the window in flight.

    other: the route of odd ranks, from some step on. Fails by hanging: rank 0 waits for a reduction before it issues the gather
    that rank 1 needs before it comes to that reduction.
    """
    width = 6400 if ranks.device.type == "cuda" else 64  # a big block's shard is 78 MiB at two ranks, its whole 156
    torch.manual_seed(7)
    plain = Branches(kinds, width)

    def forward(model: nn.Module, step: int, micro: int) -> Tensor:
        route = other if step >= KNOWN and ranks.rank % 2 else range(len(kinds))
        loss: Tensor = model(drawn(ranks, step, micro, 4, 8), route).square().mean()
        return 1e-3 * loss  # so that it does not diverge, which would let a rounding grow

    settings: dict[str, Any] = {"offload_optimizer": "cpu"} if offload else {}
    units = sorted({kind.__name__ for kind in kinds})
    with ended_if_it_hangs():
        apart = beside_plain(
            ranks,
            plain,
            forward,
            3,
            steps=KNOWN + 3,
            accumulation=2 if offload else 1,
            units=units,
            gather_with="nccl",
            **settings,
        )
    return row_of(f"branches, {name}", apart)


# D. Threads and the other devices.


def contexts(devices: int) -> list[int]:
    """Devices on which this process has a primary context. Asking makes none."""
    driver = ctypes.CDLL("libcuda.so.1")
    found = []
    for device in range(devices):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        code = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        assert code == 0, f"cuDevicePrimaryCtxGetState: {code}"
        if active.value:
            found.append(device)
    return found


def check_contexts(tier: str, ranks: Ranks) -> Row:
    """Threads that move shards and add gradients make no context on a device of another rank."""
    name = f"second device, contexts, {tier}"
    if ranks.device.type != "cuda":
        return Row("hazard", name, 0.0, 0.0, True, "no CUDA: no context")
    devices = torch.cuda.device_count()
    before = contexts(devices)
    torch.manual_seed(7)

    def forward(model: nn.Module, step: int, micro: int) -> Tensor:
        loss: Tensor = model(drawn(ranks, step, micro, 4, 8), range(3)).square().mean()
        return loss

    apart = beside_plain(
        ranks,
        Branches([Small, Small, Small], 512),
        forward,
        2,
        steps=2,
        accumulation=3,
        offload_optimizer=tier,
        nvme_paths={"optimizer": tempfile.gettempdir()},
        gather_with="nccl",
    )
    new = sorted(set(contexts(devices)) - set(before))
    notes = ranks.gather_objects(f"rank {ranks.rank} on {ranks.device}: {before}, new {new}")
    row = row_of(name, apart, "; ".join(notes))
    row.ok &= not new
    return row


# E. Page-locked memory that is let go of while a copy reads it.


def check_released(ranks: Ranks) -> Row:
    """What was on its way up from a slab arrives though the slab is dropped. The note says how long dropping it took."""
    numel = 16 << 20
    lanes = Lanes(ranks.device)
    store = HostStore(lanes)
    slab = store.allocate(numel, torch.float32, "a test")
    slab.tensor.fill_(3.0)
    out = torch.empty(numel, device=ranks.device)
    lanes.up.wait(lanes.mark_compute())
    if ranks.device.type == "cuda":
        with lanes.up.on():
            torch.cuda._sleep(CYCLES)
    store.fetch(slab, out)
    started = time.perf_counter()
    del slab
    gc.collect()
    held = time.perf_counter() - started
    others = [np.full(numel, 5.0, dtype=np.float32) for _ in range(4)]  # the pages, if they were given back
    lanes.synchronize()
    wrong = int((out != 3.0).sum())
    store.close()
    note = f"{wrong} of {numel} elements wrong; dropping took {held:.2f} s of about {LATE_S} s; {len(others)} others"
    return Row("hazard", "page-locked memory, dropped early", 0.0, float(wrong), wrong == 0, note)


# Memory that ranks share, which they give back at different times.


def check_given_back(ranks: Ranks) -> Row:
    """A model is prepared while one rank still holds the one before. Fails by hanging, or by reading the other's weights.

    torch's pool gave the other rank memory that it had shared before, and it skipped the exchange in which the first waited.
    """
    kept: list[Any] = []
    apart = 0.0
    before, peers.MIN_SHARD_NBYTES = peers.MIN_SHARD_NBYTES, 1
    try:
        with ended_if_it_hangs():
            for turn in range(4):
                torch.manual_seed(turn)
                plain = Branches([Small, Small], 512).to(ranks.device)
                model = copy.deepcopy(plain)
                sharded, _ = prepare(ranks, model, 3, units=["Small"])
                with torch.no_grad():
                    x = drawn(ranks, turn, 0, 4, 8)
                    apart = max(apart, float((model(x, range(2)) - plain(x, range(2))).abs().max()))
                if ranks.rank == turn % 2:
                    kept.append((model, sharded))
                del model, sharded
                gc.collect()
    finally:
        peers.MIN_SHARD_NBYTES = before
    return row_of("shared memory, given back by one rank", (0.0, apart))


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1024, 2048, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


def check_given(ranks: Ranks) -> Row:
    """A gradient that a script gives after a step is of the next one, also while that step's is still on its way up."""
    torch.manual_seed(7)
    plain = One().to(ranks.device)
    model = copy.deepcopy(plain)
    sharded, optimizer = prepare(ranks, model, 1, offload_optimizer="cpu")
    theirs = torch.optim.SGD(plain.parameters(), lr=1e-2, momentum=0.9)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 1024, generator=generator).to(ranks.device)  # of all ranks: there is nothing to average
        for one in (model, plain):
            one(x).square().mean().backward()
        if ranks.device.type == "cuda":
            sharded.engine.lanes.synchronize()
            with sharded.engine.lanes.up.on():
                torch.cuda._sleep(CYCLES)
        for given in (False, True):
            for one, stepped in ((model, optimizer), (plain, theirs)):
                if given:
                    one.linear.weight.grad = torch.full_like(one.linear.weight, float(1 + step))
                stepped.step()
                stepped.zero_grad()
    weight = float((model.linear.weight.detach() - plain.linear.weight.detach()).abs().max())
    return row_of("a gradient given during a step", (0.0, weight))


# F. Parameters without elements.


class Hollow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            self.first, self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat(
            [self.first.weight.reshape(-1), self.inner.weight.reshape(-1), self.outer.weight.reshape(-1)]
        )
        result: Tensor = self.first(x) + self.outer(self.inner(x)) + joined.mean()
        return result


def check_empty(precision: str, ranks: Ranks) -> Row:
    """Parameters without elements are where the others are, and of their dtype."""
    torch.manual_seed(7)
    model = Hollow()
    sharded, optimizer = prepare(ranks, model, 2, precision=Precision.named(precision))
    for step in range(2):
        model(drawn(ranks, step, 0, 4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    places = sorted({f"{parameter.device} {parameter.dtype}" for parameter in model.parameters()})
    sharded.release()
    return Row("hazard", f"empty parameters, {precision}", 0.0, 0.0, len(places) == 1, ", ".join(places))


# G. A drive that fails while other parts of the step are still on their way up.


def check_failed_drive(ranks: Ranks) -> Row:
    """Where the rest of a failed step lands stays the step's until it has landed.

    Memory that was given back at once would be somebody else's by then: what takes it here finds other numbers in it.
    """
    real = NvmeStore._read
    failing: list[Any] = []

    def read(store: NvmeStore, slab: Any, *args: Any) -> None:
        if any(slab is one for one in failing):
            raise StoreError("made to fail")
        real(store, slab, *args)

    torch.manual_seed(7)
    model = One()
    NvmeStore._read = read  # type: ignore[method-assign, assignment]
    wrong, note = 0, "nothing failed"
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = {"optimizer": folder, "param": folder}
            sharded, optimizer = prepare(ranks, model, 1, offload_optimizer="nvme", nvme_paths=paths)
            lanes = sharded.engine.lanes
            for step in range(3):
                model(drawn(ranks, step, 0, 4, 1024)).square().mean().backward()
                if step == 2:
                    [trained] = [unit.trained for unit in sharded.units if unit.trained is not None]
                    failing.append(trained.master)
                    numel = trained.master.numel
                    lanes.synchronize()
                    gc.collect()
                    if ranks.device.type == "cuda":
                        with lanes.up.on():
                            torch.cuda._sleep(3 * CYCLES)  # longer than the host takes to fail
                try:
                    optimizer.step()
                except StoreError as error:
                    note = str(error)[:60]
                    traceback.clear_frames(
                        error.__traceback__
                    )  # as whoever drops the error does: they know the step's memory
                if step < 2:
                    optimizer.zero_grad()
            gc.collect()
            with lanes.step.on():
                takers = [torch.full((numel,), 7.0, device=ranks.device) for _ in range(8)]
            time.sleep(3 * LATE_S if ranks.device.type == "cuda" else 0.0)
            lanes.synchronize()
            wrong = sum(int((taker != 7.0).sum()) for taker in takers)
            failing.clear()
    finally:
        NvmeStore._read = real  # type: ignore[method-assign]
    row = Row("hazard", "failed drive, memory of its step", 0.0, float(wrong), wrong == 0, f"{wrong} wrong; {note}")
    row.ok &= "made to fail" in note
    return row


# Found on the way: a number that is assigned into a tensor on the device is copied there from the host, which waits for that.


def check_waits(stage: int, clipping: float | None, ranks: Ranks) -> Row:
    """No call of a training step makes the host wait for the device, which would then have nothing to do until the next one.

    torch counts only waits of its own calls. Those for an event of the engine's, which an earlier step has recorded, are meant.
    """
    torch.manual_seed(7)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sharded = ShardedModel(model, plan=Plan.from_stage(stage), ranks=ranks, precision=Precision.named("bf16"))
    ShardedOptimizer(optimizer, [sharded], gradient_clipping=clipping)
    x = drawn(ranks, 0, 0, 4, 64)
    found = ""
    for step in range(6):
        if step == 4 and ranks.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        except RuntimeError as error:
            found = found or f"{str(error)[:60]} {traceback.extract_tb(error.__traceback__)[-1]}"
        finally:
            if step == 5 and ranks.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    sharded.release()
    name = f"a step waits for nothing, stage {stage}, clipping {clipping}"
    return Row("hazard", name, 0.0, 0.0, not found, found)


def _check(name: str, check: Callable[[Ranks], Row]) -> Check:
    return f"hazard {name}", check


# Those that fail by hanging, or by an error of the device, come last.
HAZARDS: list[Check] = [
    *(
        _check(f"keywords stage {stage} {backend}", partial(check_keywords, stage, backend))
        for stage, backend in ((0, "no"), (3, "no"), (0, "eager"), (0, "aot_eager"))
    ),
    *(
        _check(f"recurrent {kind.__name__} stage {stage}", partial(check_flattened, kind, stage))
        for kind in (nn.LSTM, nn.GRU)
        for stage in range(4)
    ),
    *(_check(f"empty parameters {precision}", partial(check_empty, precision)) for precision in ("no", "bf16")),
    *(_check(f"second device {tier}", partial(check_contexts, tier)) for tier in ("nvme", "cpu")),
    *(
        _check(f"waits stage {stage} clipping {clipping}", partial(check_waits, stage, clipping))
        for stage in range(4)
        for clipping in (None, 1.0)
    ),
    _check("given gradients", check_given),
    _check("failed drive", check_failed_drive),
    _check("branches, a big unit", partial(check_branches, "a unit of 78 MiB, offloaded x2", ONE_BIG, (4, 0), True)),
    _check("branches, reversed", partial(check_branches, "625 MiB reversed", ALL_BIG, (3, 2, 1, 0), False)),
    _check(
        "branches, reversed, offloaded", partial(check_branches, "the same, offloaded x2", ALL_BIG, (3, 2, 1, 0), True)
    ),
    _check("page-locked memory", check_released),
    _check("shared memory", check_given_back),
]


if __name__ == "__main__":
    sys.exit(run(HAZARDS, __doc__ or ""))
