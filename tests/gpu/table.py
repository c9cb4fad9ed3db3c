"""What programs over several devices print: a line for each check, and JSON."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.ranks.ranks import Ranks

Check = tuple[str, Callable[[Ranks], "Row"]]


@dataclass
class Row:
    """One line of the table. loss and weight: the largest difference, in the measure of that check."""

    kind: str
    name: str
    loss: float
    weight: float
    ok: bool
    note: str = ""
    seconds: float = 0.0


def run(checks: Sequence[Check], description: str) -> int:
    """Run the checks that the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=description.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many checks, where a run was cut short")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    ranks = Ranks.join(use_cpu=options.use_cpu, timeout_s=120)
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    for name, check in checks[options.skip :]:
        if options.only not in name:
            continue
        started = time.perf_counter()
        try:
            row = check(ranks)
        except Exception as error:
            # A collective that failed on one rank only leaves the others in it: end the run with what there is.
            traceback.print_exc()
            row = Row(name.split()[0], name, float("nan"), float("nan"), False, f"{type(error).__name__}: {error}")
        row.seconds = time.perf_counter() - started
        agreed = ranks.gather_objects(row.ok)
        row.ok = all(agreed)
        rows.append(row)
        if ranks.rank == 0:
            print(_line(row), flush=True)
            if options.json:
                options.json.write_text(json.dumps([vars(each) for each in rows]))
        gc.collect()
    failed = [row for row in rows if not row.ok]
    if ranks.rank == 0:
        print(f"{len(rows) - len(failed)} of {len(rows)} ok, {ranks.world_size} ranks on {_device(ranks)}")
    ranks.leave()
    return 1 if failed or not rows else 0


def _line(row: Row) -> str:
    verdict = "ok" if row.ok else "FAIL"
    return (
        f"{row.kind:<12}{row.name:<50}{row.loss:>9.1e}{row.weight:>9.1e}  {verdict:<5}{row.seconds:>5.1f}s {row.note}"
    )


def _device(ranks: Ranks) -> str:
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "the CPU"
