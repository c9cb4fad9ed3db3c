"""How would FSDP2, plain and as HSDP, grow with ranks by the model of `scaling.py`? Nothing is run.

    python benchmarks/scaling_fsdp2.py
    python benchmarks/scaling_fsdp2.py --case full8b --measured-ms 1000
    python benchmarks/scaling_fsdp2.py --network 10

Computation, links and what hidden gathers cost are the same `Terms`. What differs is FSDP2's own, by reading torch 2.13
(torch/distributed/fsdp/_fully_shard) and by arithmetic; blocks and the root are wrapped, as in `engines.py`:

    padding      a parameter is cut along its first dimension into equal chunks of rows: with more ranks than rows each rank
                 sends a row that most of them do not have
    copy-out     what a gather brought is copied into parameters, on the computation's stream: read and written once
    the root     embedding, norm and head are one group: gathered first, whole until the end, reduced when all else is
    one lane     gathers and reductions share a communicator, which runs them one after another (in `scaling.py` two do)
    one at once  a unit's reduction begins when the one before it has ended, and the computation waits for that
    HSDP         the all-reduce over copies has a communicator of its own, beside the next unit's reduction

Left out, in FSDP2's favour: its hooks, DTensors and copies into what is reduced; and gathers begin as early as its order lets
them, whatever the host does.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from cases import CASES, Case
from scaling import GROUPED, PER_MACHINE, passes_of, predict, rate_of
from shardwise.estimate.collectives import all_reduce_s, collective_s
from shardwise.estimate.passes import placed_units
from shardwise.estimate.schedule import Step, step_of
from shardwise.estimate.terms import Terms

# Shards of one machine, gathered by copy engines. Measured on two H200s: 218 MiB a rank in 0.75 ms; and `lora8b` at 492.8 ms
# where DDP took 478.4, of which 2.2 ms are the first gather and the rest is a share of 47 ms of hidden ones.
COPY_ENGINES = {"engines": 305e9, "slowing": 0.26}


@dataclass(frozen=True)
class Pass:
    """One group of FSDP2 in one pass. seconds: of computation. gathered, reduced: bytes over all ranks, padding included."""

    seconds: float
    gathered: int
    reduced: int = 0


def padded(parameters: Sequence[nn.Parameter], ranks: int) -> int:
    """Elements of all ranks' chunks of these parameters together."""
    total = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.ndim else 1
        total += -(-rows // ranks) * ranks * (parameter.numel() // max(1, rows))
    return total


def fsdp2_passes(model: nn.Module, case: Case, flops_per_s: float, shards: int) -> tuple[list[Pass], int]:
    """(forward and backward in order, where the backward begins). The root is gathered first and reduced last."""
    placed = [(one.unit, one.place) for one in placed_units(model)]
    works, turn, _ = passes_of(model, case, flops_per_s)
    ends = [parameter for unit, place in placed if place != "block" for parameter in unit.parameters.values()]
    ends = list({id(parameter): parameter for parameter in ends}.values())
    forward, backward = [], []
    for (unit, place), ahead, behind in zip(placed, works[:turn], works[turn:][::-1], strict=True):
        own = list(unit.parameters.values()) if place == "block" else []
        trained = [parameter for parameter in own if parameter.requires_grad]
        gathered = 2 * padded(own, shards)
        forward.append(Pass(ahead.seconds, gathered))
        backward.append(Pass(behind.seconds, gathered, 4 * padded(trained, shards)))
    forward[0] = replace(forward[0], gathered=2 * padded(ends, shards))
    backward[0] = replace(backward[0], reduced=4 * padded([p for p in ends if p.requires_grad], shards))
    return [*forward, *backward[::-1]], turn


def fsdp2_step(passes: Sequence[Pass], ranks: int, trained: int, terms: Terms, group: int | None = None) -> Step:
    """FSDP2's schedule of one step. group: how many ranks hold one copy together (HSDP); None: all. trained: see `step_of`."""
    shards = ranks if group is None else group
    now = lane = over_copies = exposed = slowed = copied = waited = 0.0
    reduced_until = 0.0
    ready: list[float] = []
    for place, work in enumerate(passes):
        while len(ready) <= min(place + 1, len(passes) - 1):  # the next one's gather begins with this one's computation
            at = len(ready)
            taken = collective_s(passes[at].gathered, shards, terms)
            lane = max(lane, now) + taken if taken else lane
            ready.append(lane if taken else 0.0)
            slowed += terms.slowing * taken if at else 0.0
        waits = max(0.0, ready[place] - now)
        exposed += waits
        copy_s = 2 * work.gathered / terms.memory if shards > 1 else 0.0
        copied += copy_s
        now += waits + copy_s + work.seconds
        if work.reduced and ranks > 1:
            waits = max(0.0, reduced_until - now)
            waited += waits
            now += waits
            lane = reduced_until = max(lane, now) + collective_s(work.reduced, shards, terms)
            over_copies = max(over_copies, reduced_until) + all_reduce_s(work.reduced, shards, ranks, terms)
    end = max(reduced_until, over_copies)
    compute = sum(work.seconds for work in passes) + copied
    return Step(compute, exposed, slowed, waited + max(0.0, end - now), 30 * trained / shards / terms.memory)


def predict_fsdp2(
    case: Case, ranks: int, flops_per_s: float, terms: Terms, group: int | None = None
) -> dict[str, object]:
    """One row: milliseconds by what they go to, copy-outs among the computation. padding: gathered bytes over exact ones."""
    model = case.build(torch.device("meta"))
    shards = ranks if group is None else group
    passes, _ = fsdp2_passes(model, case, flops_per_s, shards)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = fsdp2_step(passes, ranks, trained, terms, group)
    unpadded = sum(work.gathered for work in fsdp2_passes(model, case, flops_per_s, 1)[0])
    parts = {name: round(1000 * value, 1) for name, value in asdict(step).items()}
    times = round(sum(work.gathered for work in passes) / unpadded, 2)
    return {"ranks": ranks, "step_ms": round(1000 * step.total, 1), "parts_ms": parts, "padding": times}


def with_own_lane(case: Case, ranks: int, flops_per_s: float, terms: Terms, group: int) -> float:
    """Milliseconds of our step if the all-reduce over copies had a lane of its own, as FSDP2's has."""
    passes, turn, trained = passes_of(case.build(torch.device("meta")), case, flops_per_s)
    return round(1000 * step_of(passes, turn, ranks, trained, terms, group=group, apart=True).total, 1)


HEADS = ("ours", "machine", "engines", "own lane", "FSDP2", "padding", "HSDP")


def rows_of(name: str, case: Case, rate: float, terms: Terms, counts: Sequence[int]) -> str:
    """A table: ours over all ranks, in machines, there by copy engines, and with another lane; FSDP2 and its HSDP."""
    lines = [f"{'ranks':>6}" + "".join(f"{head:>10}" for head in HEADS)]
    for ranks in counts:
        machine = min(ranks, PER_MACHINE)
        found = {
            "shardwise": predict(case, ranks, rate, terms),
            "shardwise, machine": predict(case, ranks, rate, terms, group=machine),
            "shardwise, machine, copy engines": predict(
                case, ranks, rate, replace(terms, **COPY_ENGINES), group=machine
            ),
            "fsdp2": predict_fsdp2(case, ranks, rate, terms),
            "fsdp2, HSDP": predict_fsdp2(case, ranks, rate, terms, machine),
        }
        for engine, record in found.items():
            said = {"case": name, "kind": "model", "engine": engine, "network_gb_per_s": terms.network / 1e9}
            print(json.dumps({"benchmark": "scaling_fsdp2", **said, **record}))
        *ours, plain, grouped = (record["step_ms"] for record in found.values())
        cells = [*ours, with_own_lane(case, ranks, rate, terms, machine), plain, found["fsdp2"]["padding"], grouped]
        lines.append(f"{ranks:>6}" + "".join(f"{cell!s:>10}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=("lora8b", "full1b", "full8b"), default="lora8b")
    parser.add_argument("--measured-ms", type=float, default=484.5, help="see scaling.py")
    parser.add_argument("--network", type=float, default=40.0, help="GB/s between machines, for each rank")
    parser.add_argument("--ranks", default=",".join(map(str, (2, *GROUPED))))
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    case, terms = CASES[options.case], replace(Terms(), network=options.network * 1e9)
    rate = rate_of(case, options.measured_ms / 1000)
    counts = [int(count) for count in options.ranks.split(",")]
    print(rows_of(options.case, case, rate, terms, counts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
