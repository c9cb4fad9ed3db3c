"""Is `shardwise plan` right? Its bytes and times beside measured ones of docs/log.md. Nothing is run here.

    python benchmarks/plan.py
    python benchmarks/plan.py --only full8b

One set of terms for all rows: those of `Terms`, for two H200s; in rows of one rank the link is that of one rank
alone (55.3 and, both ways at once, 50.6 GB/s). No term is chosen by row. `learned` names a term that was learned of
DDP's run of the same case: the row is no check of that term.

Prints a JSON line for each row, and a table of both with what each prediction is off by.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cases import CASES
from shardwise.config.sections import EngineConfig
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import Choice, Run
from shardwise.estimate.meta_model import quantise
from shardwise.estimate.plans import Planner
from shardwise.estimate.terms import SHEETS, Terms, terms_of
from shardwise.estimate.times import Way
from shardwise.plan.precision import Precision

EACH_ONCE, AGAIN = Way(), Way(recompute=True)
ONE_RANK = {"up": 55.3e9, "both": 50.6e9}


@dataclass(frozen=True)
class Row:
    """A measured configuration.

    ms: least and most of what was measured, the same where it was once. gb: its peak, None where a budget filled the device.
    said: what the run had besides, that a plan without offloading does not have: weights that a budget keeps whole.
    """

    case: str
    ranks: int
    choice: Choice
    ms: tuple[float, float]
    gb: float | None
    way: Way = EACH_ONCE
    states: str = "fp32"
    learned: str = ""
    said: str = ""

    @property
    def name(self) -> str:
        more = [f"{self.states} moments" * (self.states != "fp32"), "compiled" * self.way.compiled]
        more += [self.said, "nothing recomputed" * (self.case.endswith("lora8b") and not self.way.recompute)]
        return ", ".join(
            [f"{self.case}, {self.ranks} rank{'s' * (self.ranks > 1)}, {self.choice}", *filter(None, more)]
        )


ALL_ON_CPU = Choice(3, "cpu", "cpu")
ROWS = (
    Row("lora8b", 2, Choice(3), (492.8, 509.7), 17.00, AGAIN, learned="eager"),
    Row("lora8b", 2, Choice(2), (496, 496), 23.91, AGAIN, learned="eager"),
    Row("lora8b", 1, Choice(3), (485.1, 485.1), 24.16, AGAIN, learned="eager"),
    Row("lora8b", 2, ALL_ON_CPU, (542, 546.1), 9.08, AGAIN),
    Row("lora8b", 1, ALL_ON_CPU, (640.5, 640.5), 9.08, AGAIN),
    Row("lora8b", 2, Choice(3), (348.4, 348.4), 12.80, Way(recompute=True, compiled=True)),
    Row("lora8b", 2, Choice(3), (255.1, 255.1), None, Way(compiled=True), said="budget"),
    Row("full1b", 2, Choice(1), (96.3, 98.7), 23.45),
    Row("full1b", 2, Choice(2), (95.9, 105), 23.45),
    Row("full1b", 2, Choice(3), (98.2, 105.6), 22.77),
    Row("full1b", 1, Choice(3), (98.3, 98.3), 30.86),
    Row("full1b", 2, Choice(3, "cpu"), (349.4, 365.1), 15.3),
    Row("full1b", 1, Choice(3, "cpu"), (527.6, 527.6), 16.03),
    Row("full1b", 1, ALL_ON_CPU, (557.7, 557.7), 14.21),
    Row("full1b", 2, Choice(3), (73.5, 73.5), None, Way(compiled=True), said="budget"),
    Row("full8b", 2, ALL_ON_CPU, (2280, 2280), 9.07, AGAIN),
    Row("full8b", 2, ALL_ON_CPU, (1839, 1839), 9.07, AGAIN, "bf16"),
    Row("full8b", 2, ALL_ON_CPU, (1653, 1653), 9.07, AGAIN, "int8"),
    Row("qlora8b", 1, Choice(3), (519.2, 519.2), 13.84, AGAIN, learned="eager"),
    Row("qlora8b", 1, ALL_ON_CPU, (578.2, 578.2), 8.76, AGAIN, learned="eager"),
    Row("bart", 2, Choice(3), (77.5, 107.3), 1.21, learned="call"),
    Row("bart", 1, ALL_ON_CPU, (91.7, 91.7), 0.79, learned="call"),
)


def planner_of(name: str, run: Run, terms: Terms) -> Planner:
    """Of a case; `qlora8b` is `lora8b` with a base in NF4."""
    case = replace(CASES[name.removeprefix("q")], checkpointing=False)
    model = case.build(torch.device("meta"))
    if name == case.name:
        return Planner(model, run, terms)
    quantise(model, "4bit")
    return Planner(model, run, terms, shapes=case.build(torch.device("meta")))


def off(predicted: float, measured: tuple[float, float]) -> float:
    """By which part of the nearest measured value; 0 within the range."""
    least, most = measured
    return 0.0 if least <= predicted <= most else predicted / (least if predicted < least else most) - 1


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--only", choices=sorted({row.case for row in ROWS}), help="rows of one case")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    planners: dict[str, Planner] = {}
    lines = [f"{'configuration':<72}{'ms':>8}{'measured':>15}{'off':>8}{'GB':>8}{'meas.':>8}{'off':>8}  bound"]
    for row in ROWS:
        if options.only not in (None, row.case):
            continue
        case = CASES[row.case.removeprefix("q")]
        run = Run(
            world_size=row.ranks,
            local_processes=row.ranks,
            precision=Precision.named("bf16"),
            options=EngineConfig(optimizer_state_dtype=row.states),
            batch=Batch(case.rows, case.length),
        )
        terms: Terms = terms_of(SHEETS["H200"])
        terms = replace(terms, up=Terms.up, both=Terms.both) if row.ranks > 1 else replace(terms, **ONE_RANK)
        if row.case in planners:
            planner = planners[row.case].of(run, terms)
        else:
            planner = planners[row.case] = planner_of(row.case, run, terms)
        found = planner.plan(row.choice, row.way)
        ms, gb = 1000 * found.time.total, found.estimate.taken("GPU") / 1e9
        parts = {name: round(1000 * value, 1) for name, value in found.time.parts.items()}
        late, large = off(ms, row.ms), None if row.gb is None else gb / row.gb - 1
        record = {
            "configuration": row.name,
            "ms": round(ms, 1),
            "measured_ms": row.ms,
            "off": round(late, 4),
            "parts_ms": parts,
        }
        print(
            json.dumps(
                {"benchmark": "plan", **record, "peak_gb": round(gb, 2), "measured_gb": row.gb, "learned": row.learned}
            )
        )
        measured = " to ".join(f"{value:g}" for value in dict.fromkeys(row.ms))
        sizes = f"{'-':>8}{'-':>8}" if row.gb is None else f"{row.gb:>8}{large:>+8.1%}"
        lines.append(f"{row.name:<72}{ms:>8.1f}{measured:>15}{late:>+8.1%}{gb:>8.2f}{sizes}  {found.time.bound}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
