"""The run whose checkpoint lies in tests/data/checkpoint_before_moves, and what it held, beside it in .json and .safetensors.

    PYTHONPATH=src:tests python -m rig.old_run NEW_FOLDER

writes all of it into NEW_FOLDER, by the shardwise that is imported. What lies in tests/data was written by commit 2540e56,
before the folders of src were moved, and is not written again: it stands for the checkpoints that users have.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rig.engine import Block
from shardwise import Accelerator, DeepSpeedPlugin, broadcast_object_list
from shardwise.run.process import forget_run

NAME = "checkpoint_before_moves"
SAVE_AT, STEPS, SAMPLES = 5, 9, 28


class Net(nn.Module):
    """A frozen first layer, dropout, two blocks, a running mean and a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 12).requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(self.dropout(x))
        return self.head(self.norm(x))


class Messages(Dataset[tuple[int, Tensor]]):
    """Samples that know their number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, torch.randn(5, generator=torch.Generator().manual_seed(number))


class Counter:
    """What a script registers."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class OldRun:
    """Two epochs over 28 samples: AdamW with two groups, a schedule, an average, shuffled data. seed: of the weights."""

    def __init__(self, seed: int = 5, stage: int = 3) -> None:
        forget_run()
        self.accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
        self.model = Net(seed)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
                {"params": [p for n, p in named if not n.endswith("weight")], "lr": 1e-3, "weight_decay": 0.0},
            ],
            lr=3e-3,
            eps=1e-4,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + 0.1 * step))
        batch_size = 4 // self.accelerator.num_processes
        loader = DataLoader(Messages(), batch_size=batch_size, shuffle=True)
        *_, self.loader = self.accelerator.prepare(self.model, self.optimizer, self.scheduler, loader)
        self.average = self.accelerator.ema(self.model, decay=0.9)
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def train(self, until: int) -> list[tuple[list[int], float]]:
        """Steps up to that number in all: the samples of each, of all ranks, and this rank's loss."""
        seen = []
        while self.counter.steps < until:
            for numbers, x in self.loader:
                loss = self.model(x).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.average.update()
                self.counter.steps += 1
                seen.append((sorted(self.accelerator.gather(numbers).tolist()), loss.item()))
                if self.counter.steps == until:
                    break
        return seen

    def tensors(self) -> dict[str, Tensor]:
        """Weights, their average and states, whole, by names such as "weights/head.bias"; the same on every rank."""
        found = {f"weights/{name}": value for name, value in self._weights().items()}
        with self.average.swapped():
            found |= {f"average/{name}": value for name, value in self._weights().items()}
        for number, own in self.optimizer.state_dict()["state"].items():
            found |= {f"states/{number}/{key}": value for key, value in own.items()}
        return found

    def facts(self) -> dict[str, Any]:
        """Where the run is."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {"rates": rates, "schedule": self.scheduler.last_epoch, "steps": self.counter.steps}

    def _weights(self) -> dict[str, Tensor]:
        box = [self.accelerator.get_state_dict(self.model)]
        found: dict[str, Tensor] = broadcast_object_list(box)[0]
        return found


def drawn() -> list[float]:
    """The next number of each generator."""
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def write(ranks: Any, folder: str) -> None:
    """Train, save, and write what was held, and what each rank does afterwards. On two ranks."""
    random.seed(ranks.rank)
    np.random.seed(ranks.rank)
    run = OldRun()
    torch.manual_seed(40 + ranks.rank)
    run.train(SAVE_AT)
    place = f"{folder}/{NAME}"
    run.accelerator.save_state(place, include_frozen=True)
    held, facts = run.tensors(), run.facts()
    run.accelerator.load_state(place)
    numbers = drawn()
    run.accelerator.load_state(place)
    after = run.train(STEPS)
    each = ranks.gather_objects({"drawn": numbers, "losses": [loss for _, loss in after]})
    ends = {f"ends/{name}": value for name, value in run.tensors().items() if name.startswith("weights/")}
    if ranks.rank == 0:
        text = {"facts": facts, "samples": [samples for samples, _ in after], "ranks": each}
        Path(f"{place}.json").write_text(json.dumps(text, indent=1) + "\n")
        save_file({name: value.contiguous() for name, value in {**held, **ends}.items()}, f"{place}.safetensors")
    run.accelerator.free_memory()


if __name__ == "__main__":
    from rig import World

    World(2).run(write, str(Path(sys.argv[1]).resolve()))
