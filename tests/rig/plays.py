"""What scripts do, for transcripts of what they send: a Stage has what is prepared, a play acts on it, by public names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardwise
from rig.engine import Block, inputs, mine
from rig.tiny import batches, share
from shardwise import Accelerator
from shardwise.errors import NonFiniteError

Recompute = str  # "none", "plain" (non-reentrant) or "reentrant"


class NotedBlock(Block):
    """Says when its forward runs, and when its backward begins."""

    def __init__(self, inner: int, name: str, note: Callable[[str], None]) -> None:
        super().__init__(12, inner)
        self.name = name
        self.note = note

    def forward(self, x: Tensor) -> Tensor:
        self.note(f"forward {self.name}")
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(lambda _: self.note(f"backward {self.name}"))
        return out


class Graded(nn.Module):
    """A first layer, three blocks of sizes 20, 36 and 56, and a head. route: which blocks a forward runs, in that order."""

    def __init__(self, recompute: Recompute, note: Callable[[str], None]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(5, 12)
        blocks = (NotedBlock(inner, f"blocks.{n}", note) for n, inner in enumerate((20, 36, 56)))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(12, 3)
        self.recompute = recompute

    def forward(self, x: Tensor, route: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        x = self.first(x)
        for number in route:
            block = self.blocks[number]
            if self.recompute == "none" or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
        return self.head(x)


@dataclass
class Stage:
    """What a scenario plays on. folder: the same on every rank. begin: names the part of the transcript that follows."""

    ranks: Any
    accelerator: Accelerator
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: Any
    folder: Path
    begin: Callable[[str], None]

    @property
    def rank(self) -> int:
        return int(self.ranks.rank)

    def loss(self, number: int, **keywords: Any) -> Tensor:
        """Of this rank's part of a batch."""
        if isinstance(self.model, Graded):
            x = mine(inputs(8)[number], self.rank, self.ranks.world_size)
            loss: Tensor = self.model(x, **keywords).float().square().mean()
            return loss
        batch = batches("llama", 8, 2 * self.ranks.world_size)[number]
        loss = self.model(**share(batch, self.rank, self.ranks.world_size)).loss
        return loss

    def step(self, number: int, clip: float | None = None, **keywords: Any) -> None:
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.loss(number, **keywords))
            if clip is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()


Play = Callable[[Stage], None]


def train(stage: Stage, count: int = 3, **keywords: Any) -> None:
    for number in range(count):
        stage.begin(f"step {number + 1}")
        stage.step(number, **keywords)


def branches(stage: Stage) -> None:
    """Ranks take other routes: one leaves out a block, one goes back, one comes twice; then all the same one."""
    routes = (((0, 1, 2), (2, 0)), ((0, 2), (0, 1, 2)), ((1, 0, 2), (0, 0, 1)), ((0, 1, 2), (0, 1, 2)))
    for number, pair in enumerate(routes):
        stage.begin(f"step {number + 1}")
        stage.step(number, route=pair[stage.rank % 2])


def evaluates(stage: Stage) -> None:
    """Forwards without gradients: alike on all ranks, on other routes, and in `generation` in other numbers; then a step."""
    train(stage, 2)
    for name, route in (
        ("evaluation", (0, 1, 2)),
        ("evaluation again", (0, 1, 2)),
        ("routes", ((0, 2), (1, 2))[stage.rank % 2]),
    ):
        stage.begin(name)
        with torch.no_grad():
            stage.loss(2, route=route)
    stage.begin("in generation")
    with stage.accelerator.generation(stage.model):
        for number in range(1 + stage.rank):
            stage.loss(number)
    stage.begin("step after it")
    stage.step(3)


def generates(stage: Stage) -> None:
    """Tokens, more of them on rank 1, in two calls; then a step."""
    train(stage, 1)
    stage.model.eval()
    stage.model.config.use_cache = True
    for call in (1, 2):
        stage.begin(f"generate {call}")
        tokens = torch.tensor([[5, 9, 17], [23, 4, 31]])
        length = 2 + 2 * stage.rank
        stage.model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
    stage.model.train()
    stage.model.config.use_cache = False
    stage.begin("step after it")
    stage.step(1)


def saves(stage: Stage) -> None:
    """save_state, in front and in the background, and load_state, in the middle of an epoch."""
    for number, _ in enumerate(stage.loader):
        stage.begin(f"step {number + 1}")
        stage.step(number)
        if number == 1:
            break
    stage.begin("save_state")
    stage.accelerator.save_state(stage.folder / "one")
    stage.begin("save_state over it")
    stage.accelerator.save_state(stage.folder / "one")
    stage.begin("save_state async")
    stage.accelerator.save_state(stage.folder / "two", async_=True)
    stage.accelerator.finish_saving()
    stage.begin("load_state")
    stage.accelerator.load_state(stage.folder / "one")
    stage.begin("load_state two")
    stage.accelerator.load_state(stage.folder / "two")
    stage.begin("step after it")
    stage.step(2)


def reads(stage: Stage) -> None:
    """All that makes something whole: weights, states, gradients, dictionaries, files."""
    model, optimizer, accelerator = stage.model, stage.optimizer, stage.accelerator
    train(stage, 1)
    weight = next(p for p in model.parameters() if p.requires_grad)
    for name, act in (
        ("gathered", lambda: _inside(shardwise.gathered(model))),
        ("gathered, one module", lambda: _inside(shardwise.gathered(next(iter(model.children()))))),
        ("gathered, modify", lambda: _inside(shardwise.gathered(model, modify=True))),
        ("full master", lambda: shardwise.full(weight, "master")),
        ("full exp_avg", lambda: shardwise.full(weight, "exp_avg")),
        ("set_full", lambda: shardwise.set_full(weight, "master", torch.ones(weight.shape))),
        ("get_state_dict", lambda: accelerator.get_state_dict(model)),
        ("optimizer.state_dict", lambda: optimizer.load_state_dict(optimizer.state_dict())),
        ("save_model", lambda: accelerator.save_model(model, stage.folder / "weights")),
    ):
        stage.begin(name)
        act()
    stage.begin("gradient")
    accelerator.backward(stage.loss(1))
    shardwise.gradient(weight)
    shardwise.full(weight, "gradient")
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    accelerator.clip_grad_value_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()


def saves_pretrained(stage: Stage) -> None:
    train(stage, 1)
    stage.begin("save_pretrained")
    stage.model.save_pretrained(stage.folder / "weights")
    stage.begin("save_pretrained, rank 0 with a dictionary")
    state = stage.accelerator.get_state_dict(stage.model)
    stage.model.save_pretrained(
        stage.folder / "again", state_dict=state, is_main_process=stage.accelerator.is_main_process
    )


def averages(stage: Stage) -> None:
    ema = stage.accelerator.ema(stage.model, decay=0.8)
    for number in range(2):
        stage.begin(f"step {number + 1}")
        stage.step(number)
        ema.update()
    stage.begin("swapped")
    with ema.swapped(), torch.no_grad():
        stage.loss(2)
    stage.begin("save_state")
    stage.accelerator.save_state(stage.folder / "one")
    stage.begin("load_state")
    stage.accelerator.load_state(stage.folder / "one")


def overflows(stage: Stage) -> None:
    """A step, one whose gradient is not finite on rank 1, which fp16 skips and others raise for, and one after it."""
    for number, factor in enumerate((1.0, float("inf"), 1.0)):
        stage.begin(f"step {number + 1}")
        stage.accelerator.backward(stage.loss(number) * (factor if stage.rank == 1 else 1.0))
        with contextlib.suppress(NonFiniteError):
            stage.optimizer.step()
            stage.scheduler.step()
        stage.optimizer.zero_grad()


def gathers_metrics(stage: Stage) -> None:
    """An epoch of a loader, and the verbs for tensors and objects of all ranks."""
    accelerator = stage.accelerator
    stage.begin("epoch")
    for (batch,) in stage.loader:
        accelerator.gather_for_metrics(batch)
    whole = torch.arange(float(3 + stage.rank))
    for name, act in (
        ("gather", lambda: accelerator.gather(torch.ones(3))),
        ("pad_across_processes", lambda: accelerator.pad_across_processes(whole)),
        ("reduce", lambda: accelerator.reduce({"a": torch.ones(2)}, reduction="mean")),
        ("gather_object", lambda: shardwise.gather_object([stage.rank])),
        ("broadcast", lambda: shardwise.broadcast(torch.ones(4))),
        ("broadcast_object_list", lambda: shardwise.broadcast_object_list([stage.rank])),
        ("set_trigger", lambda: (accelerator.set_trigger(), accelerator.check_trigger())),
        ("wait_for_everyone", accelerator.wait_for_everyone),
        ("stop_requested", accelerator.stop_requested),
        ("set_seed", lambda: shardwise.set_seed(3)),
        ("synchronize_rng_states", lambda: shardwise.synchronize_rng_states(["torch"])),
    ):
        stage.begin(name)
        act()


def _inside(context: AbstractContextManager[Any]) -> None:
    with context:
        pass
