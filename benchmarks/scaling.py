"""How do a step's time and peak grow with layers, tokens and ranks? A model of ZeRO-3's collectives; nothing is run.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --case full1b --measured-ms 113
    python benchmarks/scaling.py --case full8b --measured-ms 1500 --sweep groups
    python benchmarks/scaling.py --sweep codes
    python benchmarks/scaling_fsdp2.py --case full8b --measured-ms 1000    FSDP2 by the same model, a file of its own

Computation is what one rank was measured to take, divided over the units by their arithmetic. The rest is the model that
`shardwise plan` uses: terms, collectives and the engine's schedule are `shardwise.estimate`'s, and peaks are as well.

Terms that were measured (docs/log.md) and terms that are assumed are told apart in `Terms` and in every line that is printed.
This file knows nothing of processes; it is arithmetic on shapes.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

from cases import CASES, Case
from shardwise.config.sections import EngineConfig
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import Choice, Run, estimate
from shardwise.estimate.passes import Placed, forward_flops, placed_units, works_of
from shardwise.estimate.schedule import Work, step_of
from shardwise.estimate.terms import Terms
from shardwise.plan.compressed import Packing
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision

GROUPED = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
LAYERS = (8, 16, 32, 64, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192)
PER_MACHINE = Terms.per_machine
NETWORKS = (40, 10, 5, 2.5)  # GB/s for each rank
COMPRESSED = (16, 64, 256, 1024)


def passes_of(model: nn.Module, case: Case, flops_per_s: float) -> tuple[list[Work], int, int]:
    """(forward and backward in order, where the backward begins, elements that are trained)."""

    def seconds(one: Placed) -> tuple[float, float]:
        if one.place == "lookup":
            return 0.0, 0.0
        ahead = forward_flops(one, case.tokens, case.length, int(case.shape["hidden_size"])) / flops_per_s
        # The gradient of the input, of trained weights too, and of a recomputed block its forward once more.
        return ahead, ahead * (1 + (one.trained > one.frozen) + (case.checkpointing and one.place == "block"))

    passes, turn = works_of(placed_units(model), seconds)
    return passes, turn, sum(p.numel() for p in model.parameters() if p.requires_grad)


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
