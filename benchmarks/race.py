"""Do the losses repeat bit by bit, whether or not kernels run behind the host? A difference is a race.

    python benchmarks/race.py --nproc 2 --case lora8b --layers 8 --engines shardwise:3
    python benchmarks/race.py --nproc 2 --case bart --tiny --use-cpu --engines fsdp2

Starts `compare.py --blocking-check` three times with CUDA_LAUNCH_BLOCKING=0 and three times with 1, each in fresh
processes, and compares the bits of all losses of all ranks, per engine. With blocking launches nothing overlaps, so a
missing wait between streams cannot show; without, it shows as other bits. Deterministic kernels are on in both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from place import commit


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; 0 if every run of every engine gave the same bits."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0], epilog="Other options go to compare.py."
    )
    parser.add_argument("--nproc", type=int, default=2, help="ranks on this machine")
    parser.add_argument("--runs", type=int, default=3, help="runs per setting of CUDA_LAUNCH_BLOCKING")
    parser.add_argument("--run-timeout", type=float, default=280.0, metavar="SECONDS", help="how long one run may take")
    options, passed_on = parser.parse_known_args(argv)
    hashes: dict[str, list[tuple[str, str, list[float]]]] = {}
    for run in range(options.runs):
        for blocking in ("0", "1"):
            for found in _run(options.nproc, blocking, passed_on, options.run_timeout):
                hashes.setdefault(found["engine"], []).append((blocking, found["sha256"], found["losses"]))
                print(
                    f"# run {run + 1} blocking={blocking} {found['engine']}: {found['sha256'][:16]} "
                    f"last loss {found['losses'][-1]:.6f}",
                    flush=True,
                )
    equal = True
    for engine, seen in hashes.items():
        distinct = {digest for _, digest, _ in seen}
        first = seen[0][2]
        apart = max(abs(a - b) for _, _, losses in seen for a, b in zip(losses, first, strict=True))
        finite = all(math.isfinite(value) for _, _, losses in seen for value in losses)
        equal = equal and len(distinct) == 1 and finite
        print(
            json.dumps(
                {
                    "engine": engine,
                    "runs": len(seen),
                    "distinct": len(distinct),
                    "largest_difference": apart,
                    "finite": finite,
                    "commit": commit(),
                    "options": passed_on,
                }
            )
        )
    verdict = "bitwise equal in every run" if equal else "NOT EQUAL: a race, or a kernel that does not repeat"
    print(f"losses: {verdict}")
    return 0 if equal and hashes else 1


def _run(nproc: int, blocking: str, passed_on: list[str], timeout_s: float) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={nproc}",
        str(Path(__file__).with_name("compare.py")),
        "--blocking-check",
        *passed_on,
    ]
    environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": blocking}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    found = [
        json.loads(line.removeprefix("LOSS_BITS "))
        for line in done.stdout.splitlines()
        if line.startswith("LOSS_BITS ")
    ]
    if done.returncode or not found:
        print(done.stdout[-2000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
