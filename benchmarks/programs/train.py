"""A training script as a user writes it, for any front end: only which Accelerator is made differs (`plans.py`).

`user.py` starts it, by torchrun or `shardwise launch`. Rank 0 prints one JSON line, and writes it to --out. What is timed,
and how, is `Clock`'s; the lines between `prepare` and `zero_grad` are all that any engine gets.
"""

# ruff: noqa: E402 - what comes before the imports is the time at which they begin

from __future__ import annotations

import time

BEGUN = time.time()

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft  # noqa: F401 - imported here, where a script does: its time is that of imports
import torch
import transformers  # noqa: F401
from torch.utils.data import DataLoader, Dataset

import plans
from cases import CASES, Case, pick_case
from clock import Clock, Stretch


class Tokens(Dataset):  # type: ignore[type-arg]
    """The rows of a case: batch number i of a step is rank i's. Four steps in turn, so that the loss can fall."""

    def __init__(self, case: Case, ranks: int, steps: int) -> None:
        self.count = case.rows * ranks * steps
        batches = [case.batch(step, rank, torch.device("cpu")) for step in range(4) for rank in range(ranks)]
        self.rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self.distinct = case.rows * len(batches)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[index % self.distinct] for name, rows in self.rows.items()}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--plan", required=True, help="a word of plans.py")
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--tiny", action="store_true", help="the same structure, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true", help="gloo and the CPU")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="no: weights and computing in fp32")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--warmup", type=int, default=5, help="steps before any is timed, at least 2")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--free", action="store_true", help="wait for the device only at the end of all steps")
    parser.add_argument("--save-every", type=int, metavar="N", help="save every N steps too, and say what it costs")
    parser.add_argument("--saves", type=int, default=3, help="of --save-every")
    parser.add_argument("--folder", type=Path, default=Path("runs/user"), help="of checkpoints")
    parser.add_argument("--nvme", type=Path, default=Path("runs/user/nvme"), help="directory on the drive, for +nvme")
    parser.add_argument("--out", type=Path, help="rank 0 writes its record into this file")
    options = parser.parse_args(argv)
    if options.warmup < 2 or min(options.steps, options.accumulate, options.saves, options.save_every or 1) < 1:
        parser.error("--warmup must be at least 2; --steps, --accumulate, --saves and --save-every at least 1")
    return options


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of these libraries, about each other
    word = plans.parse(options.plan)
    settings = plans.Settings(
        options.precision, options.accumulate, options.use_cpu, options.folder, options.nvme
    )  # fmt: skip
    if reason := plans.cannot_run(word, settings, saves=options.save_every is not None):
        raise RuntimeError(f"{word.text}: {reason}.")
    case = pick_case(options.case, tiny=options.tiny, layers=options.layers)
    if "recompute" in word.options:
        case = replace(case, checkpointing=False)
    clock = Clock(BEGUN, stretches(options), warmup=options.warmup, free=options.free)
    make = plans.front_end(word)
    clock.mark("imports")
    accelerator = make(word, case, settings)
    clock.mark("accelerator")
    train(accelerator, case, clock, options, {"async_": True} if word.kind == "shardwise" else {})
    found = clock.record(accelerator)
    if accelerator.process_index == 0:
        line = json.dumps({**described(word.text, case, options), **found, **speed(found, case, options)})
        print(line, flush=True)
        if options.out:
            options.out.write_text(line + "\n")
    accelerator.end_training()


def train(accelerator: Any, case: Case, clock: Clock, options: argparse.Namespace, saving: dict[str, Any]) -> None:
    """The script. saving: what `save_state` is told by a front end that saves in the background."""
    model: Any = case.build(accelerator.device)
    if options.precision == "no":
        model.float()
    # Nothing here keeps the parameters: those that a front end replaces by shards must be free to go.
    optimizer: Any = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=case.learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    # Constant, since front ends differ in how often they step a schedule: the curves shall be comparable.
    scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    rows = Tokens(case, accelerator.num_processes, clock.steps * options.accumulate)
    loader: Any = DataLoader(rows, batch_size=case.rows)
    clock.mark("model")
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    clock.prepared(accelerator)
    torch.manual_seed(accelerator.process_index)  # dropout: the same masks under every engine, others on every rank
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), plans.CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            clock.stepped(loss)
            if clock.save_is_due(options.save_every):
                with clock.call():
                    accelerator.save_state(**saving)


def stretches(options: argparse.Namespace) -> list[Stretch]:
    """What is timed after the warm-up: with saves three stretches of one length, the middle one with saves."""
    if options.save_every is None:
        return [Stretch(options.steps)]
    steps = options.save_every * options.saves
    # The first save sums up what is frozen, once: it has a stretch by itself.
    return [Stretch(steps), Stretch(options.save_every, saves=True), Stretch(steps, saves=True), Stretch(steps)]


def described(plan: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What was run, for a record."""
    told = ("precision", "accumulate", "warmup", "free", "tiny", "layers", "save_every")
    shape = {"case": case.name, "rows": case.rows, "length": case.length, "checkpointing": case.checkpointing}
    packages = {name: _version(name) for name in ("accelerate", "deepspeed")}
    return {"benchmark": "user", "plan": plan, **shape, **{name: getattr(options, name) for name in told}, **packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def speed(found: dict[str, Any], case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The median step, and the tokens of it that each GPU trains in a second."""
    median = statistics.median(found["step_ms"])
    tokens = case.tokens * options.accumulate / median * 1000
    return {"median_ms": round(median, 3), "tokens_per_s_per_gpu": round(tokens, 1)}


if __name__ == "__main__":
    main(sys.argv[1:])
