"""What does a checkpoint cost a run: the stall of a save in the background and of one that waits, and the bytes written?

    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --case lora8b --every 20
    torchrun --nproc_per_node 2 benchmarks/checkpoint.py --case lora8b --tiny --use-cpu

The same steps are timed three times over: without saves, with `save_state(async_=True)` every so many steps, and with saves
that wait. `stall` is what a save adds to a run, per cent of the time without: all of it, also what a background thread
takes from the steps after. The first save sums up the frozen weights once; it is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cases import CASES
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.plugins import ProjectConfiguration


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=sorted(CASES), default="lora8b")
    parser.add_argument("--tiny", action="store_true", help="the same structure in a few hundred kilobytes")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--offload", choices=["none", "cpu"], default="none", help="of the optimizer")
    parser.add_argument("--every", type=int, default=20, help="steps between saves")
    parser.add_argument("--saves", type=int, default=3, help="saves in each timed stretch")
    parser.add_argument("--folder", help="where to save; default: a temporary directory")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    case = CASES[args.case].tiny() if args.tiny else CASES[args.case]
    with tempfile.TemporaryDirectory() as scratch:
        project = ProjectConfiguration(args.folder or scratch, automatic_checkpoint_naming=True, total_limit=1)
        plugin = DeepSpeedPlugin(zero_stage=args.stage, offload_optimizer_device=args.offload)
        accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16", deepspeed_plugin=plugin, project_config=project
        )
        # One directory for all ranks: rank 0's.
        project.project_dir = accelerator._ranks.broadcast_object(str(project.project_dir))
        print_record(accelerator, measure(accelerator, case, args), args)
        accelerator.end_training()


def measure(accelerator: Accelerator, case: Any, args: argparse.Namespace) -> dict[str, Any]:
    model = case.build(accelerator.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=case.learning_rate)
    accelerator.prepare(model, optimizer)
    batches = [case.batch(step, accelerator.process_index, accelerator.device) for step in range(4)]

    def run(steps: int, mode: str) -> tuple[float, list[float]]:
        """Seconds for so many steps, and for the calls that save among them."""
        calls: list[float] = []
        wait()
        begin = time.perf_counter()
        for step in range(steps):
            accelerator.backward(model(**batches[step % 4]).loss)
            optimizer.step()
            optimizer.zero_grad()
            if mode != "none" and (step + 1) % args.every == 0:
                call = time.perf_counter()
                accelerator.save_state(async_=mode == "async")
                calls.append(time.perf_counter() - call)
        wait()
        total = time.perf_counter() - begin
        accelerator.finish_saving()
        return total, calls

    def wait() -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        accelerator.wait_for_everyone()

    run(3, "none")
    begin = time.perf_counter()
    saved = Path(accelerator.save_state(async_=True))
    first = time.perf_counter() - begin
    accelerator.finish_saving()
    steps = args.every * args.saves
    # Without saves before and after, so that a machine that drifts shows.
    before, _ = run(steps, "none")
    background, in_background = run(steps, "async")
    waiting, in_waiting = run(steps, "sync")
    after, _ = run(steps, "none")
    nbytes = sum(path.stat().st_size for path in saved.parent.glob("checkpoint_*/*.safetensors"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = (before + after) / 2
    return {
        "step_ms": round(1000 * plain / steps, 3),
        "drift_percent": round(100 * abs(after - before) / plain, 2),
        "stall_percent": {"async": percent(background, plain), "sync": percent(waiting, plain)},
        "call_ms": {
            "first": round(1000 * first, 1),
            "async": [round(1000 * value, 1) for value in in_background],
            "sync": [round(1000 * value, 1) for value in in_waiting],
        },
        "bytes": nbytes,
        "bytes_of_masters_and_states": 12 * trained,
    }


def percent(seconds: float, plain: float) -> float:
    return round(100 * (seconds - plain) / plain, 2)


def print_record(accelerator: Accelerator, found: dict[str, Any], args: argparse.Namespace) -> None:
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu"
    facts = {"engine": f"shardwise:{args.stage}", "case": args.case, "tiny": args.tiny, "every": args.every}
    facts |= {"offload": args.offload, "ranks": accelerator.num_processes, "device": name, "torch": torch.__version__}
    if accelerator.is_main_process:
        print(json.dumps({**facts, **found}), flush=True)


if __name__ == "__main__":
    main()
