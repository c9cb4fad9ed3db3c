"""Is the estimate right? The bytes that `shardwise estimate` gives, beside those of a run of the same case and plan.

    torchrun --nproc_per_node 2 benchmarks/estimate.py --case lora8b --engines shardwise:3,shardwise:3+opt+param
    torchrun --nproc_per_node 2 benchmarks/estimate.py --case lora8b --tiny --use-cpu

Prints a JSON line for each engine: estimated and measured bytes at rest, which must be equal (the counts of the optimizer's
steps aside, which only the estimate has), and on GPUs the estimated and the measured peak. Exits with 1 if the bytes at rest
differ, or if the peak is above the estimate by more than 5%.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import torch
from torch import nn

from cases import CASES, Case, pick_case
from engines import Engine
from measure import run_alone
from place import Place
from shardwise.config.sections import EngineConfig
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import AT_REST, Choice, Estimate, Run, estimate
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision

DEFAULT_ENGINES = "shardwise:0,shardwise:2,shardwise:3,shardwise:3+opt+param"
PEAK_BOUND = 1.05


def main(argv: list[str]) -> int:
    """Estimate, run, compare; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=sorted(CASES), default="lora8b")
    parser.add_argument("--engines", default=DEFAULT_ENGINES, help="words of engines.py that begin with shardwise")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    options = parser.parse_args(argv)
    engines = [Engine.parse(word) for word in options.engines.split(",")]
    if any(engine.kind != "shardwise" for engine in engines):
        parser.error("--engines: the estimate is of shardwise's plans only")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        case = pick_case(options.case, tiny=options.tiny, layers=options.layers)
        return max(judge(engine, case, place) for engine in engines)
    finally:
        place.leave()


def judge(engine: Engine, case: Case, place: Place) -> int:
    """One engine's line; 1 if the estimate was wrong."""
    expected = expect(engine, case, place)
    done = run_alone(engine, case, place, reduce_dtype="fp32", warmup=2, steps=3)
    # Gradients are gone after a step, but for the host memory that offloaded ones keep.
    measured = sum(nbytes for name, nbytes in done.at_rest.items() if not name.startswith("gradient"))
    rows = {row: sum(expected.nbytes.get((row, tier), 0) for tier in Tier) for row in AT_REST}
    rest = sum(nbytes for row, nbytes in rows.items() if row != "gradient")
    peak, seen = expected.peak(Tier.GPU), done.peaks.get("allocated")
    record = {
        "case": case.name,
        "engine": engine.text,
        "at_rest_bytes": {"estimated": rest, "measured": measured},
        "peak_bytes": {"estimated": peak, "measured": seen, "ratio": None if seen is None else round(seen / peak, 4)},
        "rows": {f"{row}/{tier}": nbytes for (row, tier), nbytes in expected.nbytes.items()},
    }
    place.say(json.dumps({**record, **place.facts()}))
    step_counts = 4 * sum(weight.requires_grad for weight in case.build(torch.device("meta")).parameters())
    wrong = not 0 <= rest - measured <= step_counts or (seen is not None and seen > PEAK_BOUND * peak)
    return int(wrong)


def expect(engine: Engine, case: Case, place: Place, model: nn.Module | None = None) -> Estimate:
    """What `shardwise estimate` says of this engine's plan on this case. model: the case's, if it was changed; on meta."""
    assert engine.stage is not None
    offloads = ["cpu" if option in engine.options else "none" for option in ("opt", "param")]
    run = Run(
        world_size=place.world_size,
        precision=Precision.named("bf16"),
        cuda=place.cuda,
        options=EngineConfig(prefetch_units=engine.prefetch),
        batch=Batch(case.rows, case.length, case.checkpointing),
    )
    if model is None:
        model = case.build(torch.device("meta"))
    return estimate(model, Choice(engine.stage, *offloads), run)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
