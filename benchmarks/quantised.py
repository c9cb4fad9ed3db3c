"""Does a 4-bit base under ZeRO-3 train as it does without sharding, in which bytes, and what does offloading it save?

    torchrun --nproc_per_node 1 benchmarks/quantised.py                 an 8B Llama in NF4, LoRA on all linears
    torchrun --nproc_per_node 2 benchmarks/quantised.py --tiny --use-cpu

The case `lora8b` with bitsandbytes' layers, quantised with the same seed in every engine. `ddpamp` is plain QLoRA: the same
layers and PEFT, whole on each rank, adapters in fp32 under bf16 autocast; `ddp` is the same with adapters in bf16. How far
those two are apart is the noise of the recipe, beside which shardwise's losses are shown. Prints a JSON line for each engine,
the table of compare.py, and bytes at rest beside the formula of docs/design/quantised.md. Exits with 1 if losses disagree,
if bytes are not the formula's within 0.1%, or if offloading lowers neither what rests on the device nor its peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch

from cases import Case, pick_case
from compare import LOSS_BOUND, loss_spread, table
from engines import Engine
from estimate import expect as estimated
from measure import Account, run_alone
from place import Place
from shardwise.estimate.meta_model import quantise
from shardwise.plan.plan import Tier

DEFAULT_ENGINES = "ddpamp,ddp,shardwise:3,shardwise:3+opt+param"
BYTES_BOUND = 1e-3
# Of each layer, whole on every rank: tables of 16 and of 256 fp32 numbers, and an offset.
_TABLES = 4 * (16 + 256 + 1)


def main(argv: list[str]) -> int:
    """Measure; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--engines", default=DEFAULT_ENGINES, help="words of engines.py; the first is the reference")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("bitsandbytes") is None:
        parser.error("bitsandbytes is not installed: pip install shardwise[quantised]")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        plain = pick_case("lora8b", tiny=options.tiny, layers=options.layers)
        accounts = measure(replace(plain, name="qlora8b", nf4=True), place, options)
        return report(accounts, plain, place)
    finally:
        place.leave()


def measure(case: Case, place: Place, options: argparse.Namespace) -> list[Account]:
    """Every engine alone, in rounds; the JSON line of each."""
    accounts = [Account(Engine.parse(word)) for word in options.engines.split(",")]
    for number in range(options.rounds):
        for account in accounts:
            done = run_alone(
                account.engine, case, place, reduce_dtype="fp32", warmup=options.warmup, steps=options.steps
            )
            account.rounds.append(done)
            text = f"{account.median_ms:.2f} ms, built in {done.build_s:.1f} s, left over {done.leftover}"
            place.say(f"# round {number + 1} {account.engine.text}: {text}")
    facts = {"rows": case.rows, "length": case.length, "lora_rank": case.lora_rank, **versions(), **place.facts()}
    for account in accounts:
        place.say(json.dumps({**account.record(case, case.tokens * place.world_size), **facts}))
    return accounts


def versions() -> dict[str, Any]:
    import bitsandbytes

    return {"bitsandbytes": bitsandbytes.__version__}


def report(accounts: list[Account], plain: Case, place: Place) -> int:
    """Print the tables; 1 if a promise was not kept."""
    place.say(table(accounts))
    worst, text = loss_spread(accounts)
    place.say(text)
    first = accounts[0]
    for account in accounts[1:]:
        apart = max(abs(a - b) / abs(b) for a, b in zip(account.losses, first.losses, strict=True))
        place.say(f"  {account.engine.text:<24} {apart:.1e} from {first.engine.text}, at most, relative")
    failures = [] if worst <= LOSS_BOUND else ["the losses disagree"]
    place.say(f"{'engine':<26}{'frozen, formula':>17}{'measured':>17}{'ratio':>9}{'estimate peak':>17}{'peak':>17}")
    resting: dict[str, tuple[int, int | None]] = {}
    for account in accounts:
        engine = account.engine
        if engine.kind != "shardwise":
            continue
        formula, peak = expect(engine, plain, place)
        found = account.rounds[0].at_rest
        frozen = sum(nbytes for name, nbytes in found.items() if name.startswith("frozen/"))
        on_gpu = sum(nbytes for name, nbytes in found.items() if name.endswith(("/gpu", "moments/cuda")))
        resting[engine.text] = on_gpu, account.peak("allocated")
        seen = account.peak("allocated")
        shown = "-" if seen is None else f"{seen:,}"
        place.say(f"{engine.text:<26}{formula:>17,}{frozen:>17,}{frozen / formula:>9.5f}{peak:>17,}{shown:>17}")
        if abs(frozen / formula - 1) > BYTES_BOUND:
            failures.append(f"{engine.text}: the frozen bytes are {frozen / formula:.4f} of the formula")
    words = [word for word in resting if "+" not in word], [word for word in resting if "+param" in word]
    for here, there in [(a, b) for a in words[0][:1] for b in words[1]]:
        for name, before, after in zip(("at rest", "the peak"), resting[here], resting[there], strict=True):
            if before is not None and after is not None:
                place.say(f"{there}: {name} on the device is {before:,} -> {after:,} bytes")
                if after >= before:
                    failures.append(f"{there} does not lower {name}")
    for failure in failures:
        place.say(f"FAILED: {failure}")
    return int(bool(failures))


def expect(engine: Engine, plain: Case, place: Place) -> tuple[int, int]:
    """Frozen bytes of a rank by the formula, and the estimate's peak on the device."""
    model = plain.build(torch.device("meta"), torch.bfloat16)
    quantise(model, "4bit")
    # The estimate leaves the tables out, and shards all scales; those below 1/256 of their codes stay whole.
    whole = 0
    for module in model.modules():
        if (nested := module._parameters.get("scales_of_scales")) is not None:
            whole += _TABLES
            if nested.nbytes < module.weight.nbytes / 256:
                whole += nested.nbytes
                del module.scales_of_scales
    expected = estimated(engine, plain, place, model)
    frozen = sum(nbytes for (row, _), nbytes in expected.nbytes.items() if row == "frozen")
    return frozen + whole, expected.peak(Tier.GPU)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
