"""What a program saw of its own run: when each step ended, what Trainer logged, and the peak bytes. Knows no engine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "deepspeed")


def options() -> argparse.ArgumentParser:
    """What every program is told: the model, the DeepSpeed file, and how long to train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="directory of a checkpoint")
    parser.add_argument("--deepspeed", required=True, help="ds.json")
    parser.add_argument("--out", required=True, help="rank 0 writes what it saw into this JSON file")
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="those after warmup")
    parser.add_argument("--rows", type=int, required=True, help="sequences per rank and step")
    parser.add_argument("--length", type=int, required=True, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--fp32", action="store_true", help="instead of bf16")
    return parser


def arguments(told: argparse.Namespace) -> dict[str, Any]:
    """What every program gives its TrainingArguments, or what its library has of them."""
    return {
        "output_dir": f"{told.out}-trainer",
        "deepspeed": told.deepspeed,
        "per_device_train_batch_size": told.rows,
        "max_steps": told.warmup + told.steps,
        "learning_rate": told.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "bf16": not told.fp32,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }


class Seen(TrainerCallback):
    """Stamps of a run. Times are `time.time()`, because the first one is another process's."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.begun = time.time()
        self.ends: list[float] = []
        self.peak_before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.ends:
            _synchronize()
            self.begun = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _synchronize()
        self.ends.append(time.time())
        if len(self.ends) == self.warmup and torch.cuda.is_available():
            # What building and the first steps needed is not what training needs.
            self.peak_before = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def write(self, trainer: Any, path: str) -> None:
        """The record, from rank 0; peaks are the largest over the ranks. Every rank calls this."""
        started = float(os.environ["BENCHMARK_STARTED"])
        device = trainer.args.device
        peaks = torch.tensor([self.peak_before, 0, 0], dtype=torch.int64, device=device)
        if device.type == "cuda":
            peaks[1], peaks[2] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        before, allocated, reserved = peaks.tolist()
        if torch.distributed.get_rank() != 0:
            return
        kept = ("loss", "grad_norm", "reward", "completions/mean_length")
        logged = [row for row in trainer.state.log_history if "loss" in row]
        record = {
            "step_ms": [round(1000 * (end - begin), 3) for begin, end in pairwise(self.ends[self.warmup - 1 :])],
            "first_step_begun_s": round(self.begun - started, 2),
            "first_step_done_s": round(self.ends[0] - started, 2),
            "peak_bytes": {"allocated": allocated, "reserved": reserved, "before": before} if allocated else {},
            "logged": {key: [row[key] for row in logged] for key in kept if logged and key in logged[0]},
            "world_size": torch.distributed.get_world_size(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        }
        Path(path).write_text(json.dumps(record))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
