"""How much memory a plan needs, known before anything is loaded: per rank, by what it is for and where it lies.

Bytes at rest are exact: they are what the engine's ledger will say. What comes and goes is an upper estimate, with the
formula beside each term here. The model is on the meta device; nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..config.offloads import DEVICES, OFFLOADS, Medium
from ..config.rules import lies_on_one_machine
from ..config.sections import EngineConfig
from ..errors import OptimizerError
from ..offload.host import Ring
from ..offload.striping import BLOCK
from ..offload.tiers import ON_DISK
from ..plan.blueprint import Blueprint, at_rest, divide, gathered_at_once, padding
from ..plan.plan import Plan, Tier
from ..plan.precision import Precision
from ..plan.state_dtypes import scratch_nbytes, state_nbytes
from ..plan.units import find_units
from ..step.moments import is_moment
from ..step.visits import CHUNK, VISITING
from ..zero.build import BUCKET_NBYTES
from ..zero.engine import ReductionsInFlight
from ..zero.sharded import DEFAULTS, UNIT_NBYTES
from .activations import Batch, decoder_shape, kept_nbytes, peak_nbytes
from .keeping import Stepper
from .states import States
from .steppers import steppers_of

# By role, at rest; then what comes and goes in a step.
AT_REST = ("frozen", "parameter", "gradient", "optimizer")
PASSING = (
    "gathered units",
    "reductions",
    "whole gradients",
    "offload staging",
    "whole steps",
    "activations",
    "logits and loss",
)

# What a process takes before it has a tensor: on the GPU its context, the library of kernels and NCCL's buffers; on the
# host Python with torch and transformers. Round figures, on the safe side of what was seen.
CONTEXT_NBYTES = 3 << 29
PROCESS_NBYTES = 1 << 30


@dataclass(frozen=True)
class Choice:
    """A stage and what of it is offloaded: each one of DEVICES."""

    stage: int
    optimizer: str = "none"
    param: str = "none"

    @property
    def offloads(self) -> bool:
        """Whether anything leaves the device."""
        return {self.optimizer, self.param} != {"none"}

    @property
    def on_disk(self) -> bool:
        """Whether anything rests on a drive."""
        return any(DEVICES[where].on_disk for where in (self.optimizer, self.param))

    def __str__(self) -> str:
        places = [f"{role} {tier}" for role, tier in (("optimizer", self.optimizer), ("param", self.param))]
        offload = " + ".join(place for place in places if not place.endswith("none"))
        return f"stage {self.stage}" + (f", offload {offload}" if offload else "")


# Every stage with every offload that it allows; parameters go where the optimizer is, or stay.
CHOICES = (
    Choice(0),
    *(Choice(stage, tier) for stage in (1, 2, 3) for tier in DEVICES),
    *(Choice(3, tier, tier) for tier in OFFLOADS),
)


@dataclass(frozen=True)
class Run:
    """What the bytes depend on besides model and plan; the defaults are the engine's.

    shard_group:     how many ranks hold one copy of the model together; None: all. all_own: at stage 3 they divide weights
                     alone, and all ranks divide masters, states and gradients.
    local_processes: of one machine. cuda: ranks are GPUs. accumulates: a step has several micro-batches.
    options:         as ShardedModel takes them. directories: of what rests on a disk, each with staging of its own.
    batch:           None leaves activations out. steppers: the optimizers, made of the model; None: AdamW of all it trains.
    """

    world_size: int = 1
    local_processes: int = 1
    precision: Precision = field(default_factory=Precision)
    cuda: bool = True
    options: EngineConfig = DEFAULTS
    accumulates: bool = False
    batch: Batch | None = None
    steppers: Sequence[Stepper] | None = None
    shard_group: int | None = None
    all_own: bool = False
    directories: int = 1

    @property
    def shards(self) -> int:
        """By how many ranks a buffer is divided."""
        return self.world_size if self.shard_group is None else self.shard_group

    @property
    def compresses(self) -> bool:
        """Whether gathers in passes send 8-bit codes: a group of ranks lies on several machines."""
        return self.options.gather_dtype != "none" and not lies_on_one_machine(self.shards, self.local_processes)


@dataclass(frozen=True)
class Estimate:
    """nbytes: (row, tier) -> bytes on one rank, that which has most states; rows are AT_REST and PASSING.

    how:        of each optimizer its name, and how it is stepped: one of the words of `states.py`, or some.
    states:     bytes of states on each rank that divides the masters; one number where all ranks have all.
    operations: of whole parameters, what the rank that does most does, over the mean; None where there are none.
    padding:    of all buffers of weights, in parts of their tensors. refused: why `prepare` would not take the optimizer.
    """

    choice: Choice
    nbytes: dict[tuple[str, Tier], int]
    how: tuple[tuple[str, str], ...] = ()
    states: tuple[int, ...] = ()
    operations: float | None = None
    padding: float = 0.0
    refused: str | None = None

    @property
    def imbalance(self) -> float:
        """The states of the fullest rank over the mean."""
        return max(self.states) * len(self.states) / sum(self.states) if any(self.states) else 1.0

    def rest(self, tier: Tier) -> int:
        """What always lies on the tier, gradients as between a backward and its step."""
        return sum(count for (row, place), count in self.nbytes.items() if place is tier and row in AT_REST)

    def peak(self, tier: Tier) -> int:
        """The most that a step needs there: everything that rests, and everything that passes at once."""
        return sum(count for (_, place), count in self.nbytes.items() if place is tier)

    def taken(self, medium: Medium, rows: Iterable[str] = (*AT_REST, *PASSING)) -> int:
        """Bytes of these rows on all tiers of a medium; `peak` is of all rows."""
        return sum(count for (row, tier), count in self.nbytes.items() if tier.medium == medium and row in rows)

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "zero_stage": self.choice.stage,
            "offload_optimizer_device": self.choice.optimizer,
            "offload_param_device": self.choice.param,
            "bytes": {f"{row}/{tier}": count for (row, tier), count in self.nbytes.items()},
            "at_rest": {str(tier): self.rest(tier) for tier in Tier},
            "peak": {str(tier): self.peak(tier) for tier in Tier},
            "optimizers": [{"name": name, "stepped": how} for name, how in self.how],
            "states_max_over_mean": round(self.imbalance, 6),
            "operations_max_over_mean": None if self.operations is None else round(self.operations, 6),
            "padding": round(self.padding, 8),
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Disk:
    """A file system of this machine, on which some of what rests on a disk would lie.

    name:   its directories. free_nbytes: None where that is not known.
    shares: role -> which part of its bytes; a role that is not named has none here.
    """

    name: str
    free_nbytes: int | None
    shares: Mapping[str, float]

    def taken(self, estimate: Estimate) -> int:
        """Bytes of one rank here."""
        return sum(math.ceil(share * estimate.taken("disk", [role])) for role, share in self.shares.items())


@dataclass(frozen=True)
class Machine:
    """What there is: bytes of one GPU, the number of GPUs (0: the ranks' device is the host), host memory, disks."""

    gpus: int = 0
    gpu_nbytes: int | None = None
    host_nbytes: int | None = None
    disks: Sequence[Disk] = ()

    def shortages(self, estimate: Estimate, run: Run) -> list[str]:
        """Why the plan does not fit, a few words each; [] if it does. What is not known is taken to be enough."""
        if estimate.refused is not None:
            return [estimate.refused]
        local = run.local_processes
        device, host = estimate.taken("GPU"), estimate.taken("host")
        host = local * (host + PROCESS_NBYTES)
        found = []
        if not run.cuda:
            host += local * device
        elif local > self.gpus:
            found.append(f"{local} processes, {self.gpus} GPUs")
        elif self.gpu_nbytes is not None and device + CONTEXT_NBYTES > self.gpu_nbytes:
            found.append(f"GPU: {size(device + CONTEXT_NBYTES)} of {size(self.gpu_nbytes)}")
        if self.host_nbytes is not None and host > self.host_nbytes:
            found.append(f"host: {size(host)} of {size(self.host_nbytes)}")
        for disk in self.disks:
            needed = local * disk.taken(estimate)
            if disk.free_nbytes is not None and needed > disk.free_nbytes:
                name = f"disk {disk.name}" if len(self.disks) > 1 else "disk"
                found.append(f"{name}: {size(needed)} of {size(disk.free_nbytes)}")
        return found


def estimates(model: nn.Module, run: Run) -> list[Estimate]:
    """One of every plan; where the optimizer cannot be stepped so, it says why."""
    found = []
    for choice in CHOICES:
        try:
            found.append(estimate(model, choice, run))
        except OptimizerError as error:
            found.append(Estimate(choice, {}, refused=str(error)))
    return found


def estimate(model: nn.Module, choice: Choice, run: Run) -> Estimate:
    """The bytes of one rank of `run` training `model` under a plan, that which has most states.

    model: on the meta device or elsewhere; only names, shapes, dtypes and requires_grad are read.
    Raises PlanError for a plan that ZeRO does not have, OptimizerError where `prepare` would refuse the optimizer.
    """
    plan = Plan.from_stage(choice.stage, offload_optimizer=choice.optimizer, offload_param=choice.param)
    if run.all_own and choice.stage == 3:
        plan = replace(plan, parts=run.world_size // run.shards)
    blueprints = divide(
        find_units(model, run.options.units, unit_nbytes=UNIT_NBYTES if run.cuda else 0),
        plan,
        run.precision,
        whole_adapters=run.options.whole_adapters,
        bucket_nbytes=BUCKET_NBYTES,
    )
    states = States(
        blueprints,
        steppers_of(model) if run.steppers is None else run.steppers,
        run.shards,
        ranks=run.world_size,
        cuda=run.cuda,
        state_dtype=run.options.optimizer_state_dtype,
    )
    operations = [max(load) * len(load) / sum(load) for load in states.loads]
    return Estimate(
        choice,
        _rows(model, plan, blueprints, states, run),
        how=tuple(states.how),
        states=tuple(states.totals),
        operations=max(operations, default=None),
        padding=padding(blueprints, run.shards),
    )


def _rows(
    model: nn.Module, plan: Plan, blueprints: Sequence[Blueprint], states: States, run: Run
) -> dict[tuple[str, Tier], int]:
    nbytes: dict[tuple[str, Tier], int] = {}

    def add(row: str, tier: Tier, count: int) -> None:
        if count:
            nbytes[row, tier] = nbytes.get((row, tier), 0) + count

    for ledger in (at_rest(blueprints, run.shards, gradients=True), states.fullest):
        for (role, tier), count in ledger.items():
            add(role, tier, count)
    ahead, compressed = run.options.prefetch_units, run.compresses
    gathered = gathered_at_once(blueprints, model, run.shards, ahead, compressed=compressed)
    add("gathered units", Tier.GPU, gathered)
    add("reductions", Tier.GPU, reductions(blueprints, run))
    if run.accumulates and not plan.gradient.sharded:
        whole = sum(p.trainable_layout(run.shards).numel * p.master_dtype.itemsize for p in blueprints if p.trainable)
        add("whole gradients", Tier.GPU, whole)
    for tier, count in offload_staging(blueprints, states, run).items():
        add("offload staging", tier, count)
    add("whole steps", Tier.GPU, states.whole_steps())
    shape = decoder_shape(model) if run.batch is not None else None
    if shape is not None and run.batch is not None:
        itemsize = run.precision.compute.itemsize if run.precision.compute else _widest(blueprints)
        kept = kept_nbytes(shape, run.batch, itemsize)
        add("activations", Tier.GPU, kept)
        add("logits and loss", Tier.GPU, peak_nbytes(shape, run.batch, itemsize) - kept)
    return nbytes


def reductions(blueprints: Sequence[Blueprint], run: Run) -> int:
    """The gradients of one unit in its compute dtype, and those on their way to the other ranks in the reduce dtype.

    On a GPU several reductions are under way, up to the engine's budget, on a CPU one.
    """
    trained = [blueprint for blueprint in blueprints if blueprint.trainable]
    if not trained:
        return 0
    numels = [blueprint.trainable_layout(run.shards).numel for blueprint in trained]
    arriving = max(n * p.dtype.itemsize for n, p in zip(numels, trained, strict=True))
    sizes = [
        n * (8 if p.master_dtype.itemsize == 8 else run.precision.reduce.itemsize)
        for n, p in zip(numels, trained, strict=True)
    ]
    under_way = min(sum(sizes), max(ReductionsInFlight.BUDGET, *sizes)) if run.cuda else max(sizes)
    return arriving + under_way


def offload_staging(blueprints: Sequence[Blueprint], states: States, run: Run) -> dict[Tier, int]:
    """What offloading needs besides the resting places.

    GPU:  the chunks that visit the device in a step, each with master, gradient and states; never more than there is.
          Weights are fetched straight into their gathered buffer and need nothing.
    Host: what each store on a disk takes; a ring of pinned blocks where micro-batches are added up in host memory.
    """
    found = dict.fromkeys(Tier, 0)
    trained = [blueprint for blueprint in blueprints if blueprint.trainable]
    tiers = {p.plan.optimizer.tier for p in trained}
    visiting = list(states.in_chunks())
    if visiting:
        numels = [p.region(run.shards, 0).numel for p, _ in visiting]
        numel = min(sum(numels), VISITING * min(CHUNK, max(numels)))
        of_states = max(sum(dtype.itemsize for dtype in coming.values()) for _, coming in visiting)
        found[Tier.GPU] = numel * (2 * max(p.master_dtype.itemsize for p, _ in visiting) + of_states)
        coded = run.options.optimizer_state_dtype
        moments = max(sum(is_moment(*state) for state in coming.items()) for _, coming in visiting)
        if coded != "fp32" and moments:  # of the chunk that steps both are there, numbers and codes
            found[Tier.GPU] += moments * state_nbytes(min(numel, CHUNK), coded) + scratch_nbytes(numel, coded)
    every = tiers.union(*((p.plan.frozen.tier, p.plan.parameter.tier) for p in blueprints))
    found[Tier.CPU] += run.directories * sum(ON_DISK[tier].staging_nbytes for tier in every if tier.on_disk)
    if run.cuda and run.accumulates and tiers - {Tier.GPU}:
        found[Tier.CPU] += Ring.LENGTH * BLOCK
    return found


def size(nbytes: int) -> str:
    """In words, to three digits: 1.75 GB is 1.75e9 bytes."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            value = nbytes / unit
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {name}"
    return f"{nbytes} B"


def _widest(blueprints: Sequence[Blueprint]) -> int:
    return max(m.dtype.itemsize for p in blueprints for m in (*p.frozen, *p.trainable))
