"""How do a step's time and peak grow with layers, tokens and ranks? A model of ZeRO-3's collectives; nothing is run.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --case full1b --measured-ms 113
    python benchmarks/scaling.py --case full8b --measured-ms 1500 --sweep groups
    python benchmarks/scaling.py --sweep codes
    python benchmarks/scaling_fsdp2.py --case full8b --measured-ms 1000    FSDP2 by the same model, a file of its own

Computation is what one rank was measured to take, divided over the units by their arithmetic. A gather of n bytes over p ranks,
8 to a machine, takes

    t = launch + hops x latency + max(n (1 - 1/p) / nvlink, n (1 - 1/machines) / (8 x network))

and a reduction the same of its own bytes. With `shard_group: machine` the p ranks are those of a machine, and each reduction is
followed by an all-reduce of the shard over the machines: sent twice, along a tree, as NCCL has it for this collective alone.
With `optimizer_shard_group: world` beside it that is a reduce-scatter, sent once, along a ring, and after the step the new
16-bit shards are gathered over the machines, all units in few collectives.
With `gather_dtype: int8` a gather over machines sends 65 bytes for 64 weights; the device makes codes of its shard before it
and weights of all codes behind it, on the same lane.

The schedule is the engine's: a gather starts with the computation of the unit
`prefetch` places before, one after another on a lane of their own, and reductions follow their unit's backward; what the
computation waits for is exposed, and what it does not wait for slows it by a measured share. Peaks are `shardwise estimate`'s.

Terms that were measured (docs/log.md) and terms that are assumed are told apart in `Terms` and in every line that is printed.
This file knows nothing of processes; it is arithmetic on shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from cases import CASES, Case
from shardwise.config.sections import EngineConfig
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import Choice, Run, estimate
from shardwise.plan.compressed import CHUNK, Packing
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision
from shardwise.plan.units import UnitSpec, find_units
from shardwise.step.publishing import GROUP_NBYTES
from shardwise.zero.sharded import UNIT_NBYTES

GROUPED = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
LAYERS = (8, 16, 32, 64, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192)
PER_MACHINE = 8
NETWORKS = (40, 10, 5, 2.5)  # GB/s for each rank
COMPRESSED = (16, 64, 256, 1024)


@dataclass(frozen=True)
class Terms:
    """Bytes a second and seconds. The comment says where each is from."""

    nvlink: float = (
        112e9  # measured: 30 GB of gathers in 134 ms on two H200s while the computation runs; 224 to 263e9 alone
    )
    engines: float | None = (
        None  # what gathers get inside a machine, where it is not what NCCL does; see scaling_fsdp2.py
    )
    slowing: float = 0.12  # measured: 32 ms over DDP at 2 ranks less 18 ms exposed, over 116 ms of hidden gathers
    launch: float = 30e-6  # assumed: a kernel's start on both sides
    latency: float = 5e-6  # assumed: a hop inside a machine
    network: float = 40e9  # assumed: a 400 Gbit/s card for each rank, at 80%
    network_latency: float = 15e-6  # assumed: a hop between machines
    kernel: float = 4e-6  # assumed: one that works on little, behind another on its lane
    memory: float = 4.0e12  # assumed: what the optimizer's kernel reaches of an H200's 4.8e12


@dataclass(frozen=True)
class Work:
    """One unit in one pass. seconds: of computation. gathered, reduced: bytes of the whole unit, 0 for none."""

    seconds: float
    gathered: int
    reduced: int = 0


@dataclass(frozen=True)
class Step:
    """What a step takes, in seconds; `total` is the sum."""

    compute: float
    exposed_gathers: float
    slowed: float
    exposed_reductions: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def collective_s(nbytes: int, ranks: int, terms: Terms) -> float:
    """Seconds that an all-gather to `nbytes`, or a reduce-scatter from them, takes over `ranks`."""
    if ranks == 1 or not nbytes:
        return 0.0
    local = min(ranks, PER_MACHINE)
    machines = -(-ranks // PER_MACHINE)
    inside = nbytes * (1 - 1 / ranks) / terms.nvlink
    between = nbytes * (1 - 1 / machines) / (local * terms.network)
    hops = (local - 1) * terms.latency + (machines - 1) * terms.network_latency
    return terms.launch + hops + max(inside, between)


def gather_s(nbytes: int, ranks: int, terms: Terms, *, codes: bool) -> float:
    """`collective_s` of 16-bit weights; codes: as `gather_dtype: int8` has it, which changes nothing inside of a machine."""
    if not codes or ranks <= PER_MACHINE or not nbytes:
        return collective_s(nbytes, ranks, terms)
    numel = nbytes // 2
    packing = Packing(numel // ranks, ranks)
    # Of each weight of the shard: its range is read, it is cast, divided, rounded, clamped, freed of NaN and stored.
    made = 45 * packing.numel / terms.memory + 15 * math.ceil(packing.numel / CHUNK) * terms.kernel
    read = 3 * numel / terms.memory + terms.kernel
    return collective_s(packing.nbytes, ranks, terms) + made + read


def all_reduce_s(nbytes: int, group: int, ranks: int, terms: Terms) -> float:
    """Seconds in which the copies of `ranks` in groups of `group` average a gradient of `nbytes`, a shard of it each."""
    copies, machines = ranks // group, -(-ranks // PER_MACHINE)
    if copies == 1 or not nbytes:
        return 0.0
    inside = 2 * nbytes / group * (1 - 1 / copies) / terms.nvlink
    between = 2 * nbytes * (1 - 1 / machines) / (min(ranks, PER_MACHINE) * terms.network)
    hops = 2 * math.ceil(math.log2(copies)) * (terms.network_latency if machines > 1 else terms.latency)
    return terms.launch + hops + max(inside, between)


def over_copies_s(nbytes: int, group: int, ranks: int, terms: Terms) -> float:
    """Seconds in which the copies of `ranks` in groups of `group` reduce and divide `nbytes`, or gather them; along a ring."""
    copies, machines = ranks // group, -(-ranks // PER_MACHINE)
    if copies == 1 or not nbytes:
        return 0.0
    inside = nbytes / group * (1 - 1 / copies) / terms.nvlink
    between = nbytes * (1 - 1 / machines) / (min(ranks, PER_MACHINE) * terms.network)
    hops = (copies - 1) * (terms.network_latency if machines > 1 else terms.latency)
    return terms.launch + hops + max(inside, between)


def step_of(
    passes: Sequence[Work],
    turn: int,
    ranks: int,
    trained: int,
    terms: Terms,
    prefetch: int = 1,
    group: int | None = None,
    codes: bool = False,
    apart: bool = False,
    all_own: bool = False,
) -> Step:
    """The engine's schedule of one step. group: how many ranks hold one copy together; None: all. codes: see `gather_s`.

    all_own: all ranks divide what the optimizer works on, and a group the weights alone (hpZ).
    apart: the all-reduce over copies beside the next unit's reduction, which the engine does not do.
    passes: forward and backward, in order. turn: where the backward begins; the 1 + prefetch units before it stay gathered.
    trained: elements that the optimizer steps, over all ranks.
    """
    shards = ranks if group is None else group
    of_gathers = terms if terms.engines is None else replace(terms, nvlink=terms.engines)
    now = lane = reduced_until = crossed_until = exposed = slowed = 0.0
    ready: list[float] = []
    for place, work in enumerate(passes):
        while len(ready) <= min(place + prefetch, len(passes) - 1):  # issued when this unit's turn comes
            at = len(ready)
            stays = turn <= at <= turn + prefetch
            taken = 0.0 if stays else gather_s(passes[at].gathered, shards, of_gathers, codes=codes)
            lane = max(lane, now) + taken
            ready.append(lane)
            slowed += terms.slowing * taken if at else 0.0
        waits = max(0.0, ready[place] - now)
        exposed += waits
        now += waits + work.seconds
        if work.reduced and ranks > 1:
            reduced_until = max(reduced_until, now) + collective_s(work.reduced, shards, terms)
            cross = over_copies_s if all_own else all_reduce_s
            crossed_until = max(crossed_until, reduced_until) + cross(work.reduced, shards, ranks, terms)
            reduced_until = reduced_until if apart else crossed_until
    reduced_until = max(reduced_until, crossed_until)
    compute = sum(work.seconds for work in passes)
    # Masters, two moments and a gradient in fp32: 16 bytes read, 12 and a 16-bit copy written.
    optimizer = 30 * trained / (ranks if all_own else shards) / terms.memory
    if all_own:  # weights that stay whole are published in any case, in little time
        gathers = math.ceil(2 * trained / GROUP_NBYTES)
        optimizer += gathers * over_copies_s(2 * trained // gathers, shards, ranks, terms)
    return Step(compute, exposed, slowed, max(0.0, reduced_until - now), optimizer)


def placed_units(model: nn.Module) -> list[tuple[UnitSpec, str]]:
    """In the order of a forward, each a "lookup", a "block" or a "head"; a tied embedding comes twice."""
    units = [unit for unit in find_units(model, unit_nbytes=UNIT_NBYTES) if unit.parameters]
    kinds = [(unit, {type(entry) for entry in unit.entries}) for unit in units]
    lookups = [unit for unit, kind in kinds if nn.Embedding in kind]
    heads = [unit for unit, kind in kinds if nn.Linear in kind]
    blocks = [unit for unit in units if unit not in lookups and unit not in heads]
    return [*((u, "lookup") for u in lookups), *((u, "block") for u in blocks), *((u, "head") for u in heads)]


def passes_of(model: nn.Module, case: Case, flops_per_s: float) -> tuple[list[Work], int, int]:
    """(forward and backward in order, where the backward begins, elements that are trained)."""
    placed = placed_units(model)
    lookups = [unit for unit, place in placed if place == "lookup"]
    forward: list[Work] = []
    backward: list[Work] = []
    for unit, place in placed:
        frozen, trained = _elements(unit)
        adapters = 0 < trained * 16 <= frozen  # they stay whole
        gathered = 2 * (frozen if adapters else frozen + trained)
        seconds = 0.0 if place == "lookup" else _flops(unit, case, place == "block") / flops_per_s
        # The gradient of the input, of trained weights too, and of a recomputed block its forward once more.
        times = 1 + (trained > frozen) + (case.checkpointing and place == "block")
        # A tied weight is reduced once, when the lookup's backward ends.
        reduced = 4 * trained if place != "head" or unit not in lookups else 0
        forward.append(Work(seconds, gathered))
        backward.append(Work(times * seconds, gathered if seconds or trained else 0, reduced))
    everything = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [*forward, *backward[::-1]], len(forward), everything


def _elements(unit: UnitSpec) -> tuple[int, int]:
    """Frozen and trained elements."""
    sizes = [(p.requires_grad, p.numel()) for p in unit.parameters.values()]
    return sum(n for grad, n in sizes if not grad), sum(n for grad, n in sizes if grad)


def _flops(unit: UnitSpec, case: Case, block: bool) -> float:
    """Of a forward: two for each weight and token, and causal attention in a block."""
    matrices = sum(p.numel() for p in unit.parameters.values() if p.ndim == 2)
    attention = 2 * case.length * int(case.shape["hidden_size"]) * len(unit.entries) if block else 0
    return float(case.tokens * (2 * matrices + attention))


def rate_of(case: Case, measured_s: float) -> float:
    """Floating point operations a second at which the case's computation takes `measured_s`."""
    passes, _, _ = passes_of(case.build(torch.device("meta")), case, 1.0)
    return sum(work.seconds for work in passes) / measured_s


def predict(
    case: Case,
    ranks: int,
    flops_per_s: float,
    terms: Terms,
    stage: int = 3,
    group: int | None = None,
    *,
    codes: bool = False,
    all_own: bool = False,
) -> dict[str, object]:
    """One row: milliseconds by what they go to, and the estimated peak. group, codes, all_own: see `step_of`."""
    model = case.build(torch.device("meta"))
    passes, turn, trained = passes_of(model, case, flops_per_s)
    step = step_of(passes, turn, ranks, trained, terms, group=group, codes=codes, all_own=all_own)
    run = Run(
        world_size=ranks,
        local_processes=min(ranks, PER_MACHINE),
        precision=Precision.named("bf16"),
        batch=Batch(case.rows, case.length, case.checkpointing),
        shard_group=group,
        all_own=all_own,
        options=EngineConfig(gather_dtype="int8" if codes else "none"),
    )
    peak = estimate(model, Choice(stage), run).peak(Tier.GPU)
    parts = {name: round(1000 * value, 1) for name, value in asdict(step).items()}
    return {"ranks": ranks, "step_ms": round(1000 * step.total, 1), "parts_ms": parts, "peak_bytes": peak}


def between_machines(case: Case, ranks: int, *, codes: bool) -> int:
    """Bytes of gathers that come into one machine in a step."""
    passes, turn, _ = passes_of(case.build(torch.device("meta")), case, 1.0)
    sizes = [work.gathered for at, work in enumerate(passes) if not turn <= at <= turn + 1]
    sizes = [Packing(size // 2 // ranks, ranks).nbytes if codes else size for size in sizes if size]
    machines = -(-ranks // PER_MACHINE)
    return sum(sizes) * (machines - 1) // machines


def compare_codes(name: str, case: Case, rate: float, terms: Terms) -> str:
    """A table: exact gathers and those of codes, over networks and ranks."""
    rows = [f"{'network':<9}" + "".join(f"{f'{ranks} ranks':>18}" for ranks in COMPRESSED)]
    for network in NETWORKS:
        slower, cells = replace(terms, network=network * 1e9), ""
        for ranks in COMPRESSED:
            found = [predict(case, ranks, rate, slower, codes=codes) for codes in (False, True)]
            for record, codes in zip(found, (False, True), strict=True):
                said = {"network_gb_per_s": network, "gather_dtype": "int8" if codes else "none"}
                said["gathered_into_a_machine_bytes"] = between_machines(case, ranks, codes=codes)
                print(json.dumps({"benchmark": "scaling", "case": name, "kind": "model", **said, **record}))
            cells += f"{' -> '.join(str(record['step_ms']) for record in found):>18}"
        rows.append(f"{network:<9}{cells}")
    return "\n".join(rows)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=("lora8b", "full1b", "full8b"), default="lora8b")
    parser.add_argument(
        "--measured-ms", type=float, default=484.5, help="of one rank's step without communication; lora8b's is DDP's"
    )
    parser.add_argument("--sweep", choices=("all", "ranks", "layers", "length", "groups", "codes"), default="all")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    case, terms = CASES[options.case], Terms()
    rate = rate_of(case, options.measured_ms / 1000)
    print(f"{options.case}: a model, at {rate / 1e12:.0f} TFLOP/s; terms: {json.dumps(asdict(terms))}")
    sweeps = {
        "ranks": [(str(ranks), case, ranks, None, False) for ranks in RANKS],
        "layers": [(str(layers), case.with_layers(layers), 8, None, False) for layers in LAYERS],
        "length": [(str(length), replace(case, length=length), 8, None, False) for length in LENGTHS],
        "groups": [
            (str(ranks), case, ranks, group, all_own)
            for ranks in GROUPED
            for group, all_own in ((None, False), (PER_MACHINE, False), (PER_MACHINE, True))
            if not all_own or ranks > PER_MACHINE
        ],
    }
    for what, entries in sweeps.items():
        if options.sweep not in ("all", what):
            continue
        rows = [
            f"{what:<10}{'step ms':>9}{'compute':>9}{'gathers':>9}{'slowed':>8}{'reduce':>8}{'step':>7}{'peak GB':>9}"
        ]
        for label, chosen, ranks, group, all_own in entries:
            record = predict(chosen, ranks, rate, terms, group=group, all_own=all_own)
            said: dict[str, object] = {what: int(label), "shard_group": ranks if group is None else group}
            said["optimizer_shard_group"] = "world" if all_own else "shard_group"
            print(json.dumps({"benchmark": "scaling", "case": options.case, "kind": "model", **said, **record}))
            parts = record["parts_ms"]
            assert isinstance(parts, dict)
            peak = record["peak_bytes"]
            assert isinstance(peak, int)
            cells = "".join(f"{value:>{width}}" for value, width in zip(parts.values(), (9, 9, 8, 8, 7), strict=True))
            name = (label if group is None else f"{label} / {group}") + " hpZ" * all_own
            rows.append(f"{name:<10}{record['step_ms']:>9}{cells}{peak / 1e9:>9.1f}")
        print("\n".join(rows))
    if options.sweep in ("all", "codes"):
        print(compare_codes(options.case, case, rate, terms))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
