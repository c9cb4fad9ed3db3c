"""Saves, loads and goes on, on the devices that there are; one JSON row per case into the file that it is given.

torchrun --standalone --nproc_per_node 2 tests/gpu/checkpoint_worker.py --json rows.json [--use-cpu]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import test_checkpoint_resume as runs
from ranks.test_checkpoint_resume import Case, check_equal, resumed, straight

CASES = [
    Case(0, "none", "lora", "bf16"),
    Case(1, "cpu", "full", "no"),
    Case(2, "none", "lora+save", "fp16"),
    Case(3, "none", "full", "bf16"),
    Case(3, "cpu", "lora", "bf16"),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--use-cpu", action="store_true")
    args = parser.parse_args()
    runs.USE_CPU = args.use_cpu
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
    for number, case in enumerate(CASES):
        for async_ in (False, True):
            folder, note = f"{box[0]}/{number}-{async_}", ""
            try:
                first = straight(None, case, folder, async_=async_)
                check_equal([first], [resumed(None, case, folder)])
            except AssertionError as error:
                note = str(error) or "the losses differ"
            notes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(notes, note)
            rows.append({"name": f"{case}{'-async' if async_ else ''}", "note": "; ".join(filter(None, notes))})
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows))
        shutil.rmtree(box[0])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
