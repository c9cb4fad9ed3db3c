"""What does a user's training script take under DDP, FSDP2, DeepSpeed and shardwise, with nothing but the Accelerator changed?

    python benchmarks/user.py --cases bart,lora8b,full1b
    python benchmarks/user.py --cases full8b --plans fsdp2-torch+cpu,shardwise:3+opt+param --free --rounds 2
    python benchmarks/user.py --cases lora8b --plans shardwise:3 --save-every 20
    python benchmarks/user.py --tiny --use-cpu
    python benchmarks/user.py --markdown runs/user/runs.jsonl

Starts `programs/train.py` as processes of their own, by torchrun or, for shardwise, by `shardwise launch` with a YAML file; the
plans (`plans.py`) take turns, round by round. Prints a JSON line for each run and a table, and keeps the lines in --out. What
cannot run here is left out with a line; a run that fails is a row with its error. Exits with 1 if no run of a plan went well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from place import commit
from plans import Settings, cannot_run, configuration, parse
from processes import HERE, start
from user_tables import markdown, table
from words import Word

CASES = ("bart", "lora8b", "full1b", "full8b")
_EVERYWHERE = ("ddp", "fsdp2", "deepspeed:2", "deepspeed:3", "shardwise:2", "shardwise:3")
_BART = ("ddp", "fsdp2-torch", "deepspeed:2", "deepspeed:3", "shardwise:2", "shardwise:3")
# Under DDP, ZeRO-1 and ZeRO-2 a rank of two would hold more of full8b than a GPU has. Two of accelerate's are not here, since
# they fail: `fsdp2+cpu`, in clipping gradients that are on the host, and `fsdp2` on BART under torch 2.13, which takes a weight
# that embeddings share in one group of FSDP2 only.
PLANS = {
    "bart": (*_BART, "shardwise:3+opt+param", "shardwise:3+compile+budget+graphs"),
    "lora8b": (*_EVERYWHERE, "shardwise:3+opt+param", "fsdp2+compile", "shardwise:3+compile+budget+recompute"),
    "full1b": (*_EVERYWHERE, "fsdp2-torch+cpu", "shardwise:3+opt", "fsdp2+compile", "shardwise:3+compile"),
    "full8b": ("fsdp2", "deepspeed:3", "shardwise:3", "fsdp2-torch+cpu", "shardwise:3+opt+param"),
}
# On a CPU, where a run is imports: what can run there, and of shardwise both tiers.
ON_CPU = ("ddp", "fsdp2", "fsdp2-torch", "deepspeed:3", "shardwise:3", "shardwise:3+opt+param")


@dataclass
class Plan:
    """A plan on a case. seconds: that its runs took, failed ones too: a budget must hold another such before one is started."""

    case: str
    word: Word
    seconds: list[float] = field(default_factory=list)
    good: int = 0


def options_of(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--cases", help=f"of {', '.join(CASES)}, separated by commas; default: the first three, or lora8b on a CPU"
    )
    parser.add_argument(
        "--plans", help="words of plans.py for every case, separated by commas; the default depends on the case"
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each plan, in turn")
    parser.add_argument("--warmup", type=int, default=5, help="steps before any is timed, at least 2")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument(
        "--free", action="store_true", help="no waiting between steps: the time of all, divided by their number"
    )
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16", help="no: weights and computing in fp32")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--save-every", type=int, metavar="N", help="save every N steps too, and say what it costs")
    parser.add_argument("--saves", type=int, default=3, help="of --save-every")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, one for each GPU")
    parser.add_argument("--tiny", action="store_true", help="the same structures, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true", help="gloo and the CPU")
    parser.add_argument("--limit", type=float, default=240, help="seconds that one run may take")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing runs any more")
    parser.add_argument(
        "--nvme", type=Path, default=Path(tempfile.gettempdir()), help="directory on the drive, for +nvme"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/user"), help="directory of the lines and of what runs print"
    )
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="FILE", help="run nothing: these files' lines as a table"
    )
    options = parser.parse_args(argv)
    if options.warmup < 2 or min(options.rounds, options.steps, options.accumulate, options.saves, options.nproc) < 1:
        parser.error("--warmup must be at least 2; --rounds, --steps, --accumulate, --saves and --nproc at least 1")
    if options.save_every is not None and options.save_every < 1:
        parser.error("--save-every must be at least 1")
    chosen = options.cases or ("lora8b" if options.use_cpu else ",".join(CASES[:3]))
    options.cases = [name.strip() for name in chosen.split(",") if name.strip()]
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"--cases: {', '.join(sorted(unknown))}: there are {', '.join(CASES)}")
    if missing := [str(path) for path in options.markdown or () if not path.is_file()]:
        parser.error(f"--markdown: {', '.join(missing)}: no such file")
    try:
        options.plans = [parse(word) for word in options.plans.split(",")] if options.plans else None
    except ValueError as error:
        parser.error(f"--plans: {error}")
    return options


def main(argv: Sequence[str]) -> int:
    """Run all plans in turns as far as the budget goes, then show them together; gives the exit code."""
    options = options_of(argv)
    if options.markdown:
        lines = [line for path in options.markdown for line in path.read_text().splitlines()]
        print(markdown([json.loads(line) for line in lines if line.startswith("{")]))
        return 0
    options.ends = time.monotonic() + options.budget
    options.command = " ".join(["python benchmarks/user.py", *argv])
    options.out.mkdir(parents=True, exist_ok=True)
    plans = chosen_plans(options)
    records = []
    for number in range(options.rounds):
        for plan in plans:
            enough = options.ends - time.monotonic() > max([*plan.seconds, 5])
            record = take(plan, number, options) if enough else None
            if record is None:
                print(f"# {plan.case}, {plan.word.text}, round {number + 1}: no run: the budget is spent", flush=True)
            else:
                records.append(record)
    print(table(records))
    return 0 if plans and all(plan.good for plan in plans) else 1


def chosen_plans(options: argparse.Namespace) -> list[Plan]:
    """Each plan on each case; what cannot run here is named and left out."""
    chosen, settings = [], settings_of(options, Path())
    for case in options.cases:
        for word in options.plans or [parse(text) for text in (ON_CPU if options.use_cpu else PLANS[case])]:
            if reason := cannot_run(word, settings, saves=options.save_every is not None):
                print(f"# {case}, {word.text}: left out: {reason}", flush=True)
            else:
                chosen.append(Plan(case, word))
    return chosen


def settings_of(options: argparse.Namespace, folder: Path) -> Settings:
    return Settings(options.precision, options.accumulate, options.use_cpu, folder, options.nvme)


def take(plan: Plan, number: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """One run: its record, onto the terminal and into the file of lines. None if the budget ended it: that is no failure."""
    name = f"{plan.case}-{plan.word.text}-{number}".replace(":", "").replace("+", "-")
    written = options.out / f"{name}.json"
    written.unlink(missing_ok=True)
    extensions = (options.out / "extensions").resolve()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        command = command_of(plan, Path(folder).resolve(), written, options)
        # torchrun gives each rank one thread, which would starve whatever steps on the host.
        threads = 1 if options.use_cpu else max(1, len(os.sched_getaffinity(0)) // options.nproc)
        trouble = start(
            command,
            options.out / f"{name}.log",
            min(options.limit, options.ends - begun),
            use_cpu=options.use_cpu,
            extensions=extensions,
            more={"OMP_NUM_THREADS": str(threads)},
        )
    plan.seconds.append(time.monotonic() - begun)
    if trouble is not None:
        shutil.rmtree(extensions, ignore_errors=True)  # a compiler that was stopped leaves a lock
        if time.monotonic() >= options.ends:
            return None
    told = ("precision", "accumulate", "free", "tiny", "layers", "save_every", "nproc", "command")
    record: dict[str, Any] = {"benchmark": "user", "plan": plan.word.text, "case": plan.case}
    record |= {key: getattr(options, key) for key in told} | {"round": number}
    if trouble is None:
        record |= json.loads(written.read_text())
        plan.good += 1
    else:
        record |= {"failed": trouble, "commit": commit()}
    line = json.dumps(record | {"run_s": round(plan.seconds[-1], 1)})
    print(line, flush=True)
    with (options.out / "runs.jsonl").open("a") as file:
        file.write(line + "\n")
    return record


def command_of(plan: Plan, folder: Path, written: Path, options: argparse.Namespace) -> list[str]:
    """What starts all ranks of a run. folder: one for its checkpoints and its YAML file."""
    if plan.word.kind == "shardwise":
        settings = folder / "plan.yaml"
        settings.write_text(json.dumps(configuration(plan.word, settings_of(options, folder))))  # JSON is YAML
        launcher = ["shardwise", "launch", "--config_file", str(settings), "--num_processes", str(options.nproc)]
    else:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc}"]
    command = [sys.executable, "-m", *launcher, str(HERE / "programs" / "train.py")]
    command += ["--plan", plan.word.text, "--case", plan.case, "--folder", str(folder / "checkpoints")]
    command += ["--nvme", str(options.nvme), "--out", str(written.resolve())]
    for name in ("precision", "accumulate", "warmup", "steps", "save_every", "saves", "layers"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    flags = (("--free", options.free), ("--tiny", options.tiny), ("--use-cpu", options.use_cpu))
    return command + [flag for flag, on in flags if on]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
