"""How do all engines compare on all cases? shardwise, DDP, FSDP2 and DeepSpeed, in eager and compiled, in one command.

    python benchmarks/suite.py --nproc 2
    python benchmarks/suite.py --cases lora8b,full1b --engines ddp,fsdp2,shardwise:3+compile
    python benchmarks/suite.py --tiny --use-cpu

Starts compare.py under torchrun for each case: there the engines take turns in one process, round by round, on the same data.
Each engine gives a JSON line for each case; they are kept in --out. At the end come one table, and a plot where matplotlib
is installed. DeepSpeed is left out where it is not. Exits with 1 if a case failed or its losses disagree.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

_ALL = ("ddp", "fsdp2", "deepspeed:1", "deepspeed:2", "deepspeed:3", "shardwise:1", "shardwise:2", "shardwise:3")
# Under DDP, ZeRO-1 and ZeRO-2 a rank of two would hold more of full8b than a GPU has.
ENGINES = {
    "bart": _ALL,
    "lora8b": _ALL,
    "full1b": _ALL,
    "full8b": ("fsdp2", "deepspeed:3", "shardwise:3"),
}
# What shardwise has besides, all of it exact; `compile` stands for the compiler that is asked for.
FURTHER = {
    "bart": ("shardwise:3+compile+budget", "shardwise:3+compile+budget+graphs"),
    "lora8b": ("shardwise:3+compile+budget", "shardwise:3+compile+budget+recompute"),
    "full1b": (
        "shardwise:1+logits",
        "shardwise:2+logits",
        "shardwise:3+compile+budget",
        "shardwise:3+compile+budget+graphs",
    ),
    "full8b": ("shardwise:3+logits", "shardwise:3+opt+param", "shardwise:3+opt+param+budget"),
}
DEFAULT_CASES = "bart,lora8b,full1b"


def engines_of(case: str, asked: str | None, *, deepspeed: bool, compiled: str | None) -> list[str]:
    """The words for compare.py.

    asked:     the user's, taken as they are. deepspeed: whether it is installed.
    compiled:  the option with which each engine runs a second time, or None.
    """
    if asked is not None:
        return [word.strip() for word in asked.split(",") if word.strip()]
    plain = [word for word in ENGINES[case] if deepspeed or not word.startswith("deepspeed")]
    words = plain + ([f"{word}+{compiled}" for word in plain] if compiled else [])
    for word in FURTHER[case]:
        if "+compile" not in word or compiled == "compile":
            words.append(word)
        elif compiled and "+graphs" not in word:  # which are inductor's
            words.append(word.replace("+compile", f"+{compiled}"))
    return words


def main(argv: Sequence[str]) -> int:
    """Run every case, then show all results together; gives the exit code."""
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "runs.jsonl"
    lines.unlink(missing_ok=True)
    deepspeed = find_spec("deepspeed") is not None
    if not deepspeed and options.engines is None:
        print("# deepspeed is not installed: its engines are left out", flush=True)
    failed = []
    for case in options.cases:
        compiled = None if options.eager_only else "aot" if options.use_cpu else "compile"
        words = engines_of(case, options.engines, deepspeed=deepspeed, compiled=compiled)
        print(f"# {case}: {', '.join(words)}", flush=True)
        before = len(read_lines(lines))
        if run_case(case, words, options, lines):
            failed.append(case)
            if len(read_lines(lines)) == before and len(words) > 1:
                # One engine took the others down with it, out of memory perhaps: the rest can still be had, one by one.
                print(f"# {case}: no results together; each engine alone, not interleaved", flush=True)
                for word in words:
                    run_case(case, [word], options, lines)
    records = read_lines(lines)
    print(table(records))
    picture = plot(records, options.out / "suite.png")
    print(f"# runs: {lines}" + (f"; plot: {picture}" if picture else "; no plot: matplotlib is not installed"))
    if failed:
        print(f"# failed, or their losses disagree: {', '.join(failed)}")
    return 1 if failed else 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cases", default=DEFAULT_CASES, help=f"of {', '.join(ENGINES)}, separated by commas")
    parser.add_argument("--engines", help="words of engines.py for every case; default: all that is installed")
    parser.add_argument("--eager-only", action="store_true", help="do not run every engine compiled too")
    parser.add_argument("--nproc", type=int, default=2, help="ranks, one for each GPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="the same structures, small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true", help="gloo; compiled engines run without inductor's kernels")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="directory of the lines and the plot")
    options = parser.parse_args(argv)
    options.cases = [name.strip() for name in options.cases.split(",") if name.strip()]
    if unknown := set(options.cases) - set(ENGINES):
        parser.error(f"--cases: {', '.join(sorted(unknown))}: there are {', '.join(ENGINES)}")
    return options


def run_case(case: str, words: Sequence[str], options: argparse.Namespace, lines: Path) -> int:
    """Run compare.py on all ranks; gives its exit code. Its own table goes to the terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.nproc}"]
    command += [str(HERE / "compare.py"), "--case", case, "--engines", ",".join(words), "--out", str(lines)]
    for name in ("rounds", "warmup", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [flag for flag, on in (("--tiny", options.tiny), ("--use-cpu", options.use_cpu)) if on]
    environment = dict(os.environ)
    if options.use_cpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return subprocess.run(command, env=environment, check=False).returncode


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best_peer(records: Sequence[dict[str, Any]], case: str, compiled: bool) -> float | None:
    """The fastest median of a case that is not shardwise's, among eager or among compiled engines; None if there is none."""
    return min(
        (
            record["step_ms"]["median"]
            for record in records
            if record["case"] == case
            and not record["engine"].startswith("shardwise")
            and is_compiled(record["engine"]) == compiled
        ),
        default=None,
    )


def is_compiled(engine: str) -> bool:
    return bool({"compile", "aot"} & set(engine.split("+")[1:]))


def table(records: Sequence[dict[str, Any]]) -> str:
    """All runs, a line each; `ratio` is to the fastest peer of the same case, eager to eager and compiled to compiled."""
    head = f"{'case':<8} {'engine':<26}{'median ms':>10}{'min':>9}{'max':>9}{'ratio':>7}{'peak GB':>9}{'tokens/s':>11}"
    rows = [head]
    for record in records:
        times = record["step_ms"]
        peer = best_peer(records, record["case"], is_compiled(record["engine"]))
        ratio = "-" if peer is None else f"{times['median'] / peer:.3f}"
        peak = record["peak_bytes"].get("allocated")
        rows.append(
            f"{record['case']:<8} {record['engine']:<26}{times['median']:>10.2f}{times['min']:>9.2f}{times['max']:>9.2f}"
            f"{ratio:>7}{'-' if peak is None else f'{peak / 1e9:.2f}':>9}{record['tokens_per_s']:>11.0f}"
        )
    return "\n".join(rows)


def plot(records: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Bars of step time and peak memory for each case, as a PNG; None without matplotlib or records."""
    if find_spec("matplotlib") is None or not records:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(record["case"] for record in records))
    figure, axes = plt.subplots(len(cases), 2, figsize=(12, 1 + 3 * len(cases)), squeeze=False, layout="constrained")
    for row, case in zip(axes, cases, strict=True):
        mine = [record for record in records if record["case"] == case]
        names = [record["engine"] for record in mine]
        colours = ["tab:blue" if name.startswith("shardwise") else "tab:grey" for name in names]
        medians = [record["step_ms"]["median"] for record in mine]
        spread = [
            [record["step_ms"]["median"] - record["step_ms"]["min"] for record in mine],
            [record["step_ms"]["max"] - record["step_ms"]["median"] for record in mine],
        ]
        row[0].barh(names, medians, xerr=spread, color=colours)
        row[0].set_title(f"{case}: ms a step")
        row[1].barh(names, [(record["peak_bytes"].get("allocated") or 0) / 1e9 for record in mine], color=colours)
        row[1].set_title(f"{case}: peak GB of a GPU")
        for axis in row:
            axis.invert_yaxis()
    figure.savefig(path)
    plt.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
