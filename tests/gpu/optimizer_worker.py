"""Every optimizer of docs/optimizers.md that is installed, on GPUs: is it stepped, or refused, as it is on CPUs?

torchrun --standalone --nproc_per_node 2 tests/gpu/optimizer_worker.py --json rows.json [--only bitsandbytes] [--seconds 120]

One JSON row for each optimizer and plan: its name, and what is wrong, or nothing. Weights are held against plain torch on the
same device. What has not begun after --seconds is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rig import optimizer_page
from rig.every_optimizer import BOTH, KINDS, ON_A_GPU, SHARDS, WHOLE, outcome
from rig.optimizer_page import shortened
from shardwise.run.process import join_run

NOT_ON_A_GPU = {"bitsandbytes LAMB8bit"}  # its package has no kernel for it


def _wrong(key: str, plan: str, folder: str, device: torch.device) -> str:
    """In words; nothing if what happens is what the page has."""
    wanted = optimizer_page.read()[key]["3"]
    try:
        found = shortened(outcome(join_run(), key, plan, folder, False, device), KINDS[key].name)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {str(error)[:300]} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
    # On a CPU states at stage 3 are in place, so a refusal of what visits the device is no difference.
    refused = plan == "3-cpu" and found not in (SHARDS, WHOLE, BOTH)
    return "" if found == wanted or refused else f"{found!r}, on a CPU {wanted!r}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default="", help="those whose name has it")
    parser.add_argument("--seconds", type=float, default=1e9)
    args = parser.parse_args()
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    dist.init_process_group("nccl", device_id=device)
    box: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    begun, rows, left = time.monotonic(), [], []
    for plan in ON_A_GPU:
        for key, kind in KINDS.items():
            if not kind.is_there or key in NOT_ON_A_GPU or args.only not in key:
                continue
            late: list[Any] = [time.monotonic() - begun > args.seconds]
            dist.broadcast_object_list(late)
            if late[0]:
                left.append(f"{key}, {plan}")
                continue
            notes: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(notes, _wrong(key, plan, box[0], device))
            rows.append({"name": f"{key}, {plan}", "note": "; ".join(sorted({*filter(None, notes)}))})
    if dist.get_rank() == 0:
        args.json.write_text(json.dumps(rows))
        for row in rows:
            if row["note"]:
                print(f"{row['name']}: {row['note']}")
        print(f"{len(rows)} rows, {sum(bool(row['note']) for row in rows)} wrong, {len(left)} left out: {left[:5]}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
