"""What does watching a run cost its steps? Microseconds of the host, beside a step's.

    python benchmarks/watching.py --use-cpu
    torchrun --nproc_per_node 2 benchmarks/watching.py

The base model of the examples trains with AdamW and clipping at a zero stage; a line is logged for each step, or for each
`--log-every`. Passes over the loader alternate, watched and not, so that the machine's drift falls on both alike. `calls_us` is
time within the Watch's own calls, of a step's median: what is written, and what the ranks sum up, is in it. On a CPU all is
processor time of the thread that trains; on CUDA it is time on the host's clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

MODEL = Path(__file__).resolve().parents[1] / "examples" / "base_model" / "causal_lm"
CALLS = ("asks", "given", "note_loss", "note_norm", "stepped", "begins", "calls", "returns", "ends_pass", "rests")


class Timed:
    """Adds up what calls of an object take, those within each other once."""

    def __init__(self, item: Any, clock: Callable[[], float]) -> None:
        self.seconds, self._clock, self._depth = 0.0, clock, 0
        for name in CALLS:
            setattr(item, name, self._around(getattr(item, name)))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = self._clock()
            self._depth += 1
            try:
                return function(*args)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += self._clock() - began

        return timed


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a pass")
    parser.add_argument("--passes", type=int, default=6, help="of each kind, the first of which is not counted")
    parser.add_argument("--log-every", type=int, default=1)
    parser.add_argument("--use-cpu", action="store_true")
    options = parser.parse_args(argv)

    from torch.utils.data import DataLoader, TensorDataset
    from transformers import AutoModelForCausalLM

    from shardwise import Accelerator, DeepSpeedPlugin

    with tempfile.TemporaryDirectory() as directory:
        plugin = DeepSpeedPlugin(zero_stage=options.zero_stage, gradient_clipping=1.0)
        accelerator = Accelerator(cpu=options.use_cpu, deepspeed_plugin=plugin, project_dir=directory)
        cuda = accelerator.device.type == "cuda"
        clock = time.perf_counter if cuda else time.thread_time
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        count = options.steps * options.rows * accelerator.num_processes
        ids = torch.randint(0, model.config.vocab_size, (count, options.length))
        loader = DataLoader(TensorDataset(ids), batch_size=options.rows)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        watched = accelerator.watch(loader, log_every=options.log_every, bar=False)
        calls = Timed(accelerator._run.watch, clock)
        spent: dict[bool, list[float]] = {False: [], True: []}
        within: list[float] = []
        for index in range(2 * options.passes):
            watches = bool(index % 2)
            batches = iter(watched if watches else loader)
            while True:
                began, called = clock(), calls.seconds
                batch = next(batches, None)
                if batch is None:
                    break
                accelerator.backward(model(input_ids=batch[0], labels=batch[0]).loss)
                optimizer.step()
                optimizer.zero_grad()
                if index > 1:
                    spent[watches].append(1e6 * (clock() - began))
                    if watches:
                        within.append(1e6 * (calls.seconds - called))
            # The one that listens is the Watch, which has no part in a pass that nobody watches.
            _listen(accelerator._run.watch if not watches else None)
        if accelerator.is_main_process:
            print(json.dumps(_row(options, accelerator, spent, within)))
        accelerator.end_training()
    return 0


def _listen(watch: Any) -> None:
    from shardwise.ranks.activity import activity

    activity.listener = watch


def _row(options: argparse.Namespace, accelerator: Any, spent: dict[bool, list[float]], within: list[float]) -> Any:
    plain, calls = statistics.median(spent[False]), statistics.median(within)
    return {
        "device": str(accelerator.device),
        "ranks": accelerator.num_processes,
        "zero_stage": options.zero_stage,
        "tokens": options.rows * options.length,
        "log_every": options.log_every,
        "step_us": round(plain),
        "watched_step_us": round(statistics.median(spent[True])),
        "calls_us": round(calls, 1),
        "calls_us_90th": round(sorted(within)[int(0.9 * len(within))], 1),
        "share": round(calls / plain, 5),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
