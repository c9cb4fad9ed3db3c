"""What does a checkpoint cost a run: the call, the stall of a save in the background and of one that waits, and bytes?

    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --case lora8b:20 full1b:100 --modes async
    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --case lora8b --tiny --layers 32 --use-cpu

Stretches of as many steps as lie between two saves take turns: one without a save, one for each mode, with one save behind
its first step. Steps run freely; the host waits for the device at the ends of a stretch. `stall_percent` is what the median
of a mode adds to the median without saves: the call, and what the writing takes from the steps after it. `unfinished_ms` is
how long the writing went on when the stretch had ended: a run with saves that often would wait for it. `call_ms` is the call
by the clock, `call_cpu_ms` the processor time of the training's thread in it. The first save sums up the frozen weights
once, makes its plan and its buffer; it is timed by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cases import CASES, pick_case
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.plugins import ProjectConfiguration


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    names = "NAME or NAME:STEPS, with the steps between its saves; of " + ", ".join(sorted(CASES))
    parser.add_argument("--case", nargs="+", default=["lora8b"], help=names)
    parser.add_argument("--tiny", action="store_true", help="the same structure in a few hundred kilobytes")
    parser.add_argument("--layers", type=int, help="blocks; default: the case's own")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--offload", choices=["none", "cpu"], default="none", help="of the optimizer")
    parser.add_argument("--every", type=int, default=20, help="steps between saves, where a case does not say it")
    parser.add_argument("--saves", type=int, default=3, help="stretches of each mode")
    parser.add_argument("--modes", nargs="+", choices=["async", "sync"], default=["async", "sync"])
    parser.add_argument("--folder", help="where to save; default: a temporary directory")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        project = ProjectConfiguration(args.folder or scratch, automatic_checkpoint_naming=True, total_limit=1)
        plugin = DeepSpeedPlugin(zero_stage=args.stage, offload_optimizer_device=args.offload)
        accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16", deepspeed_plugin=plugin, project_config=project
        )
        # One directory for all ranks: rank 0's.
        project.project_dir = accelerator._ranks.broadcast_object(str(project.project_dir))
        for words in args.case:
            name, _, every = words.partition(":")
            case = pick_case(name, tiny=args.tiny, layers=args.layers)
            print_record(accelerator, Stretches(accelerator, case, int(every or args.every)).measure(args), name, args)
            accelerator.free_memory()
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
        accelerator.end_training()


class Stretches:
    """A prepared case, and its steps. every: of them in a stretch."""

    def __init__(self, accelerator: Accelerator, case: Any, every: int) -> None:
        self.accelerator = accelerator
        self.every = every
        self.model = case.build(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=case.learning_rate
        )
        accelerator.prepare(self.model, self.optimizer)
        self.batches = [case.batch(step, accelerator.process_index, accelerator.device) for step in range(4)]
        self.calls: dict[str, list[tuple[float, float]]] = {"async": [], "sync": []}
        self.seconds: dict[str, list[float]] = {"none": [], "async": [], "sync": []}
        self.unfinished: list[float] = []

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        for step in range(3):
            self.step(step)
        self.wait()
        begin = time.perf_counter()
        self.accelerator.save_state(async_=True)
        first = time.perf_counter() - begin
        self.accelerator.finish_saving()
        for _ in range(args.saves):
            for mode in ("none", *args.modes):
                self.stretch(mode)
        self.stretch("none")
        saved = Path(self.accelerator.save_state(async_=True))
        self.accelerator.finish_saving()
        nbytes = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        plain = statistics.median(self.seconds["none"])
        spread = (max(self.seconds["none"]) - min(self.seconds["none"])) / plain
        modes = args.modes
        return {
            "every": self.every,
            "step_ms": round(1000 * plain / self.every, 3),
            "spread_percent": round(100 * spread, 2),
            "stall_percent": {m: percent(statistics.median(self.seconds[m]), plain) for m in modes},
            "call_ms": {"first": milli(first), **{m: [milli(wall) for wall, _ in self.calls[m]] for m in modes}},
            "call_cpu_ms": {m: [milli(cpu) for _, cpu in self.calls[m]] for m in modes},
            "unfinished_ms": [milli(seconds) for seconds in self.unfinished],
            "buffer_bytes": self.accelerator._run.pool.nbytes,
            "bytes": nbytes,
            "bytes_of_masters_and_states": 12 * trained,
        }

    def step(self, number: int) -> None:
        self.accelerator.backward(self.model(**self.batches[number % 4]).loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def stretch(self, mode: str) -> None:
        self.wait()
        begin = time.perf_counter()
        for step in range(self.every):
            self.step(step)
            if mode != "none" and step == 0:
                call, cpu = time.perf_counter(), time.thread_time()
                self.accelerator.save_state(async_=mode == "async")
                self.calls[mode].append((time.perf_counter() - call, time.thread_time() - cpu))
        self.wait()
        end = time.perf_counter()
        self.seconds[mode].append(end - begin)
        self.accelerator.finish_saving()
        if mode == "async":
            self.unfinished.append(time.perf_counter() - end)

    def wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.accelerator.wait_for_everyone()


def milli(seconds: float) -> float:
    return round(1000 * seconds, 1)


def percent(seconds: float, plain: float) -> float:
    return round(100 * (seconds - plain) / plain, 2)


def print_record(accelerator: Accelerator, found: dict[str, Any], case: str, args: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    facts = {"engine": f"shardwise:{args.stage}", "case": case, "tiny": args.tiny, "offload": args.offload}
    facts |= {"ranks": accelerator.num_processes, "device": name, "torch": torch.__version__}
    if accelerator.is_main_process:
        print(json.dumps({**facts, **found}), flush=True)


if __name__ == "__main__":
    main()
