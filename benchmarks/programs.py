"""What does a program written for DeepSpeed take under DeepSpeed, and the same file under `--as-deepspeed`?

    python benchmarks/programs.py --cases lora8b,full1b --stages 3,2
    python benchmarks/programs.py --cases grpo1b --runs 2
    python benchmarks/programs.py --tiny --use-cpu --engines shardwise

Starts the programs of `benchmarks/programs/`, which know nothing of shardwise, under torchrun: by themselves with the DeepSpeed
that is installed, and through `-m shardwise.compat`. The engines take turns, each run is a process of its own, and begins from
the same checkpoint of random weights. Prints a JSON line for each run, then a table. Exits with 1 if a run failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cases import Case, pick_case
from place import commit
from processes import start

HERE = Path(__file__).resolve().parent
ENGINES = ("deepspeed", "shardwise")
# name -> the program, the case whose shape it trains, and what is compared between engines. GRPO's loss is 0 by its definition.
PROGRAMS = {
    "lora8b": ("sft.py", "lora8b", ("loss", "grad_norm")),
    "full1b": ("sft.py", "full1b", ("loss", "grad_norm")),
    "grpo1b": ("grpo.py", "full1b", ("reward", "grad_norm")),
}
GRPO = {"rows": 4, "length": 64, "prompt": 64}
GRPO_TINY = {"rows": 4, "length": 8, "prompt": 8}


@dataclass
class Series:
    """All runs of one engine on one case and stage.

    seconds: that each run took as a whole, failed ones too. The budget must hold another such run before one is started.
    """

    case: str
    stage: int
    engine: str
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> list[float]:
        return [value for record in self.done for value in record["step_ms"]]


def configuration(stage: int, *, auto_buckets: bool) -> dict[str, Any]:
    """ds.json as the documentation recommends it.

    auto_buckets: bucket sizes that Trainer takes from the model's width, in place of DeepSpeed's defaults.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if auto_buckets:
        zero["reduce_bucket_size"] = "auto"
        if stage == 3:
            zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cases", default="lora8b,full1b,grpo1b", help="separated by commas")
    parser.add_argument("--stages", default="3,2", help="separated by commas")
    parser.add_argument(
        "--engines", help="of deepspeed, shardwise; default: both, or the second where DeepSpeed is not installed"
    )
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--runs", type=int, default=1, help="of each engine, in turn")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, one for each GPU")
    parser.add_argument("--tiny", action="store_true", help="the same structures, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true", help="gloo, in fp32")
    parser.add_argument(
        "--auto-buckets", action="store_true", help='bucket sizes "auto" in ds.json, as Trainer\'s guide has them'
    )
    parser.add_argument("--limit", type=float, default=240, help="seconds that one run may take")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing runs any more")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/programs"), help="directory of the lines and the programs' output"
    )
    parser.add_argument(
        "--weights", type=Path, help="directory of the checkpoints; default: one that is removed at the end"
    )
    options = parser.parse_args(argv)
    options.cases = options.cases.split(",")
    options.stages = [int(stage) for stage in options.stages.split(",")]
    if options.engines is None:
        options.engines = [name for name in ENGINES if name != "deepspeed" or find_spec("deepspeed")]
    else:
        options.engines = options.engines.split(",")
    for name, known in (("cases", PROGRAMS), ("engines", ENGINES), ("stages", (0, 1, 2, 3))):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: {', '.join(map(str, sorted(unknown)))}: there are {', '.join(map(str, known))}")
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    return options


def main(argv: Sequence[str]) -> int:
    """Run everything that fits into the budget, then show it together; gives the exit code."""
    options = parse(argv)
    options.ends = time.monotonic() + options.budget
    if "deepspeed" not in options.engines:
        print("# without DeepSpeed: it is not installed, or not among --engines", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    every = [
        Series(case, stage, engine)
        for case in options.cases
        for stage in options.stages
        for engine in options.engines
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.runs):
            for series in every:
                if options.ends - time.monotonic() > max([*series.seconds, 5]):
                    take(series, number, options.weights or Path(folder), options)
    print(table(every))
    return 1 if any(series.failed or not series.done for series in every) else 0


def take(series: Series, number: int, weights: Path, options: argparse.Namespace) -> None:
    """One run of a series: into it, and onto the terminal as a JSON line."""
    program, shape, _ = PROGRAMS[series.case]
    name = f"{series.case}-{series.stage}-{series.engine}-{number}"
    case = pick_case(shape, tiny=options.tiny, layers=None)
    model = weights / shape
    trouble, begun = None, time.monotonic()
    if not (model / "config.json").exists():
        command = [sys.executable, str(HERE / "programs" / "weights.py"), shape, str(model)]
        command += [flag for flag, on in (("--tiny", options.tiny), ("--use-cpu", options.use_cpu)) if on]
        trouble = start_within(command, options.out / f"weights-{shape}.log", options.budget, options)
        print(f"# weights of {shape}: {time.monotonic() - begun:.1f} s", flush=True)
        begun = time.monotonic()
    record: dict[str, Any] = {}
    if trouble is None:
        settings = options.out / f"ds{series.stage}.json"
        settings.write_text(json.dumps(configuration(series.stage, auto_buckets=options.auto_buckets)))
        written = options.out / f"{name}.json"
        written.unlink(missing_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc}"]
        command += ["-m", "shardwise.compat"] if series.engine == "shardwise" else []
        command += [str(HERE / "programs" / program), "--model", str(model), "--deepspeed", str(settings)]
        command += ["--out", str(written), *arguments(program, case, options)]
        trouble = start_within(command, options.out / f"{name}.log", options.limit, options)
        if trouble is None:
            record = json.loads(written.read_text())
    if trouble is None:
        series.done.append(record)
    else:
        series.failed.append(trouble)
        # A compiler that was stopped leaves a lock for which the next run would wait without end.
        shutil.rmtree(_extensions(options), ignore_errors=True)
        record = {"failed": trouble}
    series.seconds.append(time.monotonic() - begun)
    about = {"case": series.case, "engine": series.engine, "stage": series.stage, "run": number, "commit": commit()}
    line = json.dumps({**about, **record})
    print(line, flush=True)
    with (options.out / "runs.jsonl").open("a") as file:
        file.write(line + "\n")


def arguments(program: str, case: Case, options: argparse.Namespace) -> list[str]:
    """What the program is told besides the model and its files."""
    grpo = GRPO_TINY if options.tiny else GRPO
    told: dict[str, Any] = {
        "warmup": options.warmup,
        "steps": options.steps,
        "learning-rate": case.learning_rate,
        **(grpo if program == "grpo.py" else {"rows": case.rows, "length": case.length}),
    }
    flags = ["--fp32"] if options.use_cpu else []
    if program == "sft.py":
        if case.lora_rank is not None:
            told["lora-rank"] = case.lora_rank
        flags += ["--checkpointing"] if case.checkpointing else []
    return [*(word for key, value in told.items() for word in (f"--{key}", str(value))), *flags]


def start_within(command: list[str], log: Path, limit: float, options: argparse.Namespace) -> str | None:
    """Run a command to its end, its limit or that of the budget. None, or what went wrong."""
    seconds = min(limit, options.ends - time.monotonic())
    return start(command, log, seconds, use_cpu=options.use_cpu, extensions=_extensions(options))


def _extensions(options: argparse.Namespace) -> Path:
    """Where DeepSpeed keeps what it compiles at its first start, if anything: on a CPU it does."""
    return (options.out / "extensions").resolve()


def apart(mine: dict[str, Any], theirs: dict[str, Any], key: str) -> float | None:
    """The largest relative difference of a number logged at each step; None where one has not logged it."""
    pairs = list(zip(mine["logged"].get(key, []), theirs["logged"].get(key, []), strict=False))
    return max((abs(a - b) / max(abs(b), 1e-6) for a, b in pairs), default=None)


def table(every: Sequence[Series]) -> str:
    """All runs. `ratio` and the differences are to the first engine of a case and stage; peaks are the largest of a rank.

    `before` is the peak of building and warming up. `first step s` is the least of the runs: the first has cold caches.
    """
    head = f"{'case':<8}{'stage':>6} {'engine':<10}{'runs':>5}{'median ms':>10}{'min':>9}{'max':>9}{'ratio':>7}"
    lines = [head + f"{'peak GB':>9}{'before':>8}{'first step s':>13}{'loss apart':>11}{'norm apart':>11}"]
    for series in every:
        start_of_line = f"{series.case:<8}{series.stage:>6} {series.engine:<10}{len(series.done):>5}"
        if series.done:
            first = next(s for s in every if (s.case, s.stage) == (series.case, series.stage) and s.done)
            median = statistics.median(series.step_ms)
            peaks = [
                max(record["peak_bytes"].get(key, 0) for record in series.done) / 1e9 for key in ("allocated", "before")
            ]
            begun = min(record["first_step_done_s"] for record in series.done)
            found = [apart(series.done[0], first.done[0], key) for key in PROGRAMS[series.case][2]]
            lines.append(
                f"{start_of_line}{median:>10.1f}{min(series.step_ms):>9.1f}{max(series.step_ms):>9.1f}"
                f"{statistics.median(first.step_ms) / median:>7.2f}{peaks[0]:>9.2f}{peaks[1]:>8.2f}{begun:>13.1f}"
                + "".join(f"{'-' if value is None else format(value, '.1e'):>11}" for value in found)
            )
        elif not series.failed:
            lines.append(f"{start_of_line} not run: the budget is spent")
        lines += [f"{start_of_line if not series.done else '':<29} FAILED {reason}" for reason in series.failed]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
