"""Which engine trains a case fastest, and in how many bytes? Several engines in one run, on the same data and dtypes.

    torchrun --nproc_per_node 2 benchmarks/compare.py --case lora8b --engines ddp,fsdp2,shardwise:3
    shardwise launch --num_processes 2 benchmarks/compare.py --case bart
    torchrun --nproc_per_node 2 benchmarks/compare.py --case lora8b --tiny --use-cpu

Prints one JSON line per engine and a table, from rank 0. Exits with 1 if the loss curves of the engines disagree: then
the times compare different computations. docs/design/benchmarks.md says what is measured and why so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import struct
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# deterministic cuBLAS must be chosen before CUDA starts; it is only used with --deterministic.
if "--deterministic" in sys.argv or "--blocking-check" in sys.argv:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from cases import CASES, Case, pick_case
from engines import Engine, Trainee
from measure import Account, free, run_alone, take_step
from overlap import record
from place import Place

DEFAULT_ENGINES = {
    "bart": "ddp,ddp32,ddpamp,fsdp2,shardwise:3",
    "lora8b": "ddp,ddp32,ddpamp,fsdp2,fsdp2+ends,shardwise:3",
    "full1b": "ddp,fsdp2,shardwise:0,shardwise:1,shardwise:2,shardwise:3",
    # Under DDP one rank would hold 128 GB of fp32 weights, gradients and moments.
    "full8b": "fsdp2,shardwise:3",
}

# How far two engines may part, relative: bf16 keeps 8 bits, so one rounding is 2^-9 = 0.002 of a value, and the loss
# that transformers computes for BART is itself bf16.
LOSS_BOUND = 5e-3


def run(argv: Sequence[str], description: str, default_engines: dict[str, str]) -> int:
    """Run the benchmark; gives the exit code. default_engines: by case."""
    options = parse(argv, description, default_engines)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        if options.deterministic or options.blocking_check:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # cuDNN's attention sums its gradients in any order, and the setting above does not reach it.
            torch.backends.cuda.enable_cudnn_sdp(False)
            torch.utils.deterministic.fill_uninitialized_memory = False
        case = pick_case(options.case, tiny=options.tiny, layers=options.layers)
        engines = [Engine.parse(word) for word in options.engines.split(",")]
        if options.blocking_check:
            return blocking_check(engines, case, place, options)
        return compare(engines, case, place, options)
    finally:
        place.leave()


def parse(argv: Sequence[str], description: str, default_engines: dict[str, str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--case", choices=sorted(CASES), default="lora8b")
    parser.add_argument("--engines", help="words of engines.py, separated by commas; the default depends on the case")
    parser.add_argument("--tiny", action="store_true", help="the same structure, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true", help="gloo and the CPU even where there is CUDA")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps per round")
    parser.add_argument(
        "--reduce-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="in which FSDP2 and shardwise average gradients",
    )
    parser.add_argument("--deterministic", action="store_true", help="slower kernels that repeat bit by bit")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="trace 2 steps more of one engine into DIR")
    parser.add_argument("--profile-engine", help="which one; default: shardwise's of the highest stage")
    parser.add_argument(
        "--blocking-check",
        action="store_true",
        help="print the bits of 6 losses per engine instead; benchmarks/race.py compares them",
    )
    options = parser.parse_args(argv)
    options.engines = options.engines or default_engines[options.case]
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def compare(engines: list[Engine], case: Case, place: Place, options: argparse.Namespace) -> int:
    """Measure every engine in every round; print records and table; 1 if their losses disagree."""
    accounts = [Account(engine) for engine in engines]
    traced = _traced(engines, options)
    summaries: dict[str, dict[str, Any]] = {}
    for number in range(options.rounds):
        for account in accounts:
            engine = account.engine

            def trace(trainee: Trainee, name: str = engine.text) -> None:
                def step(index: int) -> None:
                    take_step(trainee, case, place, index)

                file_name = f"{case.name}-{name.replace(':', '').replace('+', '-')}"
                summaries[name] = record(step, place, options.profile, file_name)

            last = number == options.rounds - 1
            done = run_alone(
                engine,
                case,
                place,
                reduce_dtype=options.reduce_dtype,
                warmup=options.warmup,
                steps=options.steps,
                before_drop=trace if last and engine is traced else None,
            )
            account.rounds.append(done)
            place.say(f"# round {number + 1} {engine.text}: {account.median_ms:.2f} ms, built in {done.build_s:.1f} s")
    shape = {
        "shape": case.shape,
        "rows": case.rows,
        "length": case.length,
        "lora_rank": case.lora_rank,
        "checkpointing": case.checkpointing,
        "reduce_dtype": options.reduce_dtype,
    }
    facts = place.facts()
    for account in accounts:
        line = json.dumps({**account.record(case, case.tokens * place.world_size), **shape, **facts})
        place.say(line)
        if options.out and place.rank == 0:
            with options.out.open("a") as file:
                file.write(line + "\n")
    for name, summary in summaries.items():
        place.say(f"# trace of {name}: {json.dumps(summary)}")
        if summary:
            place.say(_overlap_text(name, summary))
    place.say(table(accounts))
    worst, text = loss_spread(accounts)
    place.say(text)
    return 0 if worst <= LOSS_BOUND else 1


def table(accounts: list[Account]) -> str:
    """The measurements as text; `ratio` is to the first engine."""
    head = f"{'engine':<26}{'median ms':>10}{'min':>9}{'max':>9}{'ratio':>7}{'peak GB':>9}{'resv GB':>9}{'rss GB':>8}"
    lines = [head]
    for account in accounts:
        peaks = [account.peak("allocated"), account.peak("reserved")]
        shown = "".join(f"{'-':>9}" if size is None else f"{size / 1e9:>9.2f}" for size in peaks)
        rss = max(done.host_rss for done in account.rounds) / 1e9
        lines.append(
            f"{account.engine.text:<26}{account.median_ms:>10.2f}{min(account.step_ms):>9.2f}"
            f"{max(account.step_ms):>9.2f}{account.median_ms / accounts[0].median_ms:>7.3f}{shown}{rss:>8.1f}"
        )
    return "\n".join(lines)


def loss_spread(accounts: list[Account]) -> tuple[float, str]:
    """The largest relative difference between an engine's losses and those of the first of its kind, and a sentence.

    `plain` does not average over ranks: it trains something else and is left out. NaN counts as infinitely far.
    Compiled engines are compared among themselves: inductor draws other dropout masks from the same seed, and keeps in fp32
    what eager kernels round to bf16 in between, which a LoRA's first steps feel under every engine (design/benchmarks.md).
    So are those with Muon, and those with moments as codes, which take other steps.
    """
    compared = [account for account in accounts if account.engine.kind != "plain"]
    worst, at = 0.0, "one engine"
    for account in compared[1:]:
        alike = [other for other in compared if other.engine.numbers == account.engine.numbers]
        for step, (mine, first) in enumerate(zip(account.losses, alike[0].losses, strict=True)):
            apart = abs(mine - first) / abs(first)
            if not math.isfinite(apart) or apart > worst:
                worst, at = (apart if math.isfinite(apart) else math.inf), f"{account.engine.text} at step {step}"
    verdict = "agree" if worst <= LOSS_BOUND else "DISAGREE"
    first = compared[0].losses if compared else [float("nan")]
    return worst, (
        f"losses {verdict}: at most {worst:.1e} apart, relative ({at}), bound {LOSS_BOUND:.0e}; "
        f"from {first[0]:.4f} to {first[-1]:.4f}"
    )


def blocking_check(engines: list[Engine], case: Case, place: Place, options: argparse.Namespace) -> int:
    """Take 6 steps with each engine and print the bits of every rank's losses, and their hash."""
    for engine in engines:
        free(place)
        trainee = engine.build(case, place, options.reduce_dtype)
        losses = [take_step(trainee, case, place, index).float() for index in range(6)]
        mine = torch.stack(losses)
        gathered = [torch.empty_like(mine) for _ in range(place.world_size)]
        torch.distributed.all_gather(gathered, mine)
        values = torch.cat(gathered).tolist()
        bits = struct.pack(f"<{len(values)}f", *values)
        place.say(
            "LOSS_BITS "
            + json.dumps(
                {
                    "engine": engine.text,
                    "case": case.name,
                    "steps": 6,
                    "sha256": hashlib.sha256(bits).hexdigest(),
                    "blocking": os.environ.get("CUDA_LAUNCH_BLOCKING", "0"),
                    "losses": values,
                }
            )
        )
        del trainee
    return 0


def _traced(engines: list[Engine], options: argparse.Namespace) -> Engine | None:
    if options.profile is None:
        return None
    wanted = [
        engine
        for engine in engines
        if (engine.text == options.profile_engine if options.profile_engine else engine.kind == "shardwise")
    ]
    if not wanted:
        raise SystemExit("--profile: none of --engines is " + (options.profile_engine or "shardwise's"))
    return max(wanted, key=lambda engine: engine.stage or 0)


def _overlap_text(name: str, summary: dict[str, Any]) -> str:
    steps = summary["steps"]
    if "compute_ms" not in summary:
        return f"{name}: the trace has no device kernels (a CPU run)"
    gather = summary.get("gather_ms", 0.0)
    share = 100 * summary["gather_hidden_ms"] / gather if gather else 100.0
    per_step = {key: value / steps for key, value in summary.items() if key.endswith("_ms")}
    return (
        f"{name}, per step of {per_step['span_ms']:.1f} ms: compute {per_step['compute_ms']:.1f} ms, "
        f"gather {gather / steps:.1f} ms ({share:.1f}% under compute, exposed {per_step['gather_exposed_ms']:.1f} ms), "
        f"reduce {per_step.get('reduce_ms', 0.0):.1f} ms (exposed {per_step['reduce_exposed_ms']:.1f} ms), "
        f"idle {per_step['idle_ms']:.1f} ms"
    )


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:], (__doc__ or "").split("\n\n", maxsplit=1)[0], DEFAULT_ENGINES))
