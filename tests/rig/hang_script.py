"""The script of the hang catalogue: two ranks train, and rank 1 does something alone in step 3. See `hang.py`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset

from shardwise import Accelerator, DataLoaderConfiguration
from shardwise.config import machine

CASE, FOLDER = sys.argv[1], Path(sys.argv[2])
STEPS, IN_STEP = 5, 3


class Stream(IterableDataset):
    """Samples in order; one behind those of step 3 may take its time."""

    def __init__(self, rows: int, slow: bool) -> None:
        self.rows, self.slow = rows, slow

    def __iter__(self):
        for row in range(self.rows):
            if self.slow and row == 8 * IN_STEP:
                time.sleep(60)
            yield torch.full((8,), float(row))


def alone(accelerator: Accelerator, model: torch.nn.Module, x: torch.Tensor) -> None:
    """What rank 1 does by itself."""
    if CASE in ("stop", "memory"):
        time.sleep(0.9)  # the watcher looks 2.7 times a second, and such a process's line is the one that it saw last
    if CASE == "save":
        accelerator.save_state(FOLDER / "state")
    elif CASE == "gather":
        accelerator.gather(x)
    elif CASE == "evaluation":
        with torch.no_grad():
            model(x)
    elif CASE == "exit":
        sys.exit(0)
    elif CASE == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif CASE == "memory":
        (FOLDER / "memory.events").write_text("oom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)
    elif CASE == "asked":
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(1.0)
    elif CASE == "script":
        time.sleep(60)
    elif CASE == "error":
        raise ValueError("the script's own")


logging.basicConfig(
    filename=FOLDER / f"log-{os.environ['RANK']}", format="%(created)f %(message)s", level=logging.WARNING
)
if CASE == "memory":
    (FOLDER / "memory.events").write_text("oom_kill 0\n")
    machine.GROUPS = FOLDER
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
odd = accelerator.process_index == 1
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rows = 8 * IN_STEP if odd and CASE == "fewer batches" else 8 * STEPS
loader = DataLoader(Stream(rows, odd and CASE == "sleeping loader"), batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for number, x in enumerate(loader, 1):
    now = odd and number == IN_STEP
    if now:
        alone(accelerator, model, x)
    if now and CASE == "caught exception":
        try:
            model(x)
            raise ValueError("caught")
        except ValueError:
            continue
    if odd and number > IN_STEP and CASE == "fewer steps":
        break
    loss = model(x).mean()
    if not (now and CASE == "skipped backward"):
        accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if now and CASE == "extra step":
        accelerator.backward(model(x).mean())
        optimizer.step()
        optimizer.zero_grad()
accelerator.end_training()
