"""Saves, loads and goes on, on the devices that there are; one JSON row per case into the file that it is given.

torchrun --standalone --nproc_per_node 2 tests/gpu/checkpoint_worker.py --json rows.json [--use-cpu]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import test_background_saves as background
from ranks import test_buffers as buffers
from ranks import test_checkpoint_resume as runs
from ranks import test_model_files as model_files
from ranks import test_resume_optimizers as optimizers
from ranks.test_checkpoint_resume import Case, check_equal, resumed, straight
from shardwise.run.process import join_run

CASES = [
    Case(0, "none", "lora", "bf16"),
    Case(1, "cpu", "full", "no"),
    Case(2, "none", "lora+save", "fp16"),
    Case(3, "none", "full", "bf16"),
    Case(3, "cpu", "lora", "bf16"),
]
# Each optimizer, by both ways; on a device nothing that rests elsewhere is stepped in place.
OPTIMIZERS = [
    optimizers.Case("Adagrad", "cpu", 2),
    optimizers.Case("Adagrad", "nvme", 3),
    optimizers.Case("AdamW", "nvme", 1),
    optimizers.Case("AdamW-fused", "none", 3),
    optimizers.Case("ASGD", "cpu", 3),
    optimizers.Case("NAdam", "none", 1),
    optimizers.Case("Rprop", "nvme", 2),
    optimizers.Case("SGD-momentum", "none", 0),
]


# Each save in the background beside one that waits: the bytes must be equal.
BACKGROUND = [
    (1, "none", "AdamW-fused", "fp32"),
    (3, "none", "AdamW", "fp32"),
    (3, "none", "Adafactor", "fp32"),
    (3, "cpu", "AdamW", "fp32"),
    (3, "cpu", "AdamW", "int8"),
    (3, "nvme", "AdamW", "fp32"),
]


def _background(where: str, stage: int, tier: str, name: str, dtype: str) -> None:
    taken = background.both_ways(join_run(), where, stage, tier, False, name, dtype)
    assert (taken > 0) == (tier == "none"), taken  # bytes that were copied to the host


def cases(folder: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, what raises AssertionError if it is wrong)"""

    def resumes(case: Case, where: str, async_: bool) -> None:
        first = straight(None, case, where, async_=async_)
        check_equal([first], [resumed(None, case, where)])

    for number, case in enumerate(CASES):
        for async_ in (False, True):
            name = f"{case}{'-async' if async_ else ''}"
            yield name, partial(resumes, case, f"{folder}/{number}-{async_}", async_)
    for number, other in enumerate(OPTIMIZERS):
        where = f"{folder}/optimizer{number}"
        Path(where).mkdir(exist_ok=True)
        yield str(other), partial(optimizers.both, None, other, where, optimizers.SAVE_AT)

    for number, (stage, tier, name, dtype) in enumerate(BACKGROUND):
        where = f"{folder}/background{number}"
        Path(where).mkdir(exist_ok=True)
        words = f"background save of {name}, stage {stage}, {tier}, {dtype}, and one that waits"
        yield words, partial(_background, where, stage, tier, name, dtype)

    def same_buffers() -> None:
        assert buffers.prepared_saved_loaded(join_run(), 3, f"{folder}/buffers", True) == ([], True, [])

    yield "buffers", same_buffers

    def same_files(where: str, change: Any) -> None:
        if dist.get_rank() == 0:
            model_files.saved(Path(where, "model"))
        dist.barrier()
        borrowed, own, _ = model_files.both(join_run(), where, {"change": change})
        assert all(borrowed)
        assert own == 0

    for number, change in enumerate((None, model_files.double_norms)):
        yield f"model's own files, {number} changes", partial(same_files, f"{folder}/files{number}", change)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--use-cpu", action="store_true")
    args = parser.parse_args()
    runs.USE_CPU = optimizers.USE_CPU = buffers.USE_CPU = args.use_cpu
    background.USE_CPU = model_files.USE_CPU = args.use_cpu
    # The runs below come and go; the group stays.
    if args.use_cpu:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(dist.get_node_local_rank())
        dist.init_process_group("nccl", device_id=torch.device("cuda", dist.get_node_local_rank()))
    box: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    rows = []
    for name, check in cases(box[0]):
        begun = time.monotonic()
        note = ""
        try:
            check()
        except AssertionError as error:
            note = str(error) or "the losses differ"
        notes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(notes, note)
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - begun:6.1f} s  {name}", flush=True)
        rows.append({"name": name, "note": "; ".join(filter(None, notes))})
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows))
        shutil.rmtree(box[0])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
