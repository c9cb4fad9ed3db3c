"""A run that is saved, ended and loaded goes on as if nothing had happened: bit for bit, or on other ranks to rounding.

Each side of a resume builds everything anew, as new processes do: model, optimizer, scheduler, loader, Accelerator.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rig.tiny import LENGTH, VOCABULARY, tiny
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.run.process import forget_run
from shardwise.zero.sharded import find_sharded

GLOBAL_BATCH = 12  # 1, 2, 3 and 4 ranks share it evenly
STEPS, SAVE_AT = 14, 6  # the whole table: 40 and 17
SAMPLES = 12 * 5  # both saves are in the middle of an epoch


@dataclass(frozen=True)
class Case:
    """How a run is placed and what it trains."""

    stage: int = 3
    tier: str = "none"
    tuning: str = "lora"
    precision: str = "no"
    world: int = 2

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.tier}-{self.tuning}-{self.precision}-x{self.world}"


class Tokens(Dataset[Any]):
    """Random sequences that are a function of their index."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(1000 + index)
        tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=source)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


class Average:
    """A registered object: an average of losses, kept as a tensor and a number."""

    def __init__(self) -> None:
        self.value, self.count = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["value"], state["count"]


@dataclass
class Script:
    """What a user's script holds."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    loader: Any
    average: Average


USE_CPU = True  # tests/gpu runs the same on CUDA devices


def build(case: Case, workers: int = 0, dropout: float = 0.1, **keywords: Any) -> Script:
    forget_run()
    device = case.tier if case.stage else "none"
    plugin = DeepSpeedPlugin(
        zero_stage=case.stage,
        offload_optimizer_device=device,
        offload_param_device=device if case.stage == 3 else "none",
        offload_optimizer_nvme_path=tempfile.gettempdir(),
        offload_param_nvme_path=tempfile.gettempdir(),
        gradient_clipping=0.5,
    )
    precision = None if case.precision == "no" else case.precision
    # One step of the schedule a step, on any number of ranks.
    keywords.setdefault("step_scheduler_with_optimizer", False)
    accelerator = Accelerator(cpu=USE_CPU, deepspeed_plugin=plugin, mixed_precision=precision, **keywords)
    torch.manual_seed(21)
    model = tiny("llama", case.tuning)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    if dropout:
        model.get_input_embeddings().register_forward_hook(lambda m, i, out: nn.functional.dropout(out, dropout))
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": weights[0::2], "weight_decay": 0.1}, {"params": weights[1::2], "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, eps=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 9], gamma=0.5)
    size = GLOBAL_BATCH // accelerator.num_processes
    loader = DataLoader(Tokens(), batch_size=size, shuffle=True, num_workers=workers)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    average = Average()
    accelerator.register_for_checkpointing(average)
    return Script(accelerator, model, optimizer, scheduler, loader, average)


def steps(script: Script, until: int, begin: int = 0) -> Iterator[tuple[int, float]]:
    """Train; gives (steps taken, the loss's mean over the ranks) after each."""
    step = begin
    while step < until:
        for batch in script.loader:
            loss = script.model(**batch).loss
            script.accelerator.backward(loss)
            script.optimizer.step()
            script.scheduler.step()
            script.optimizer.zero_grad()
            script.average.value += loss.detach().cpu()
            script.average.count += 1
            step += 1
            losses = script.accelerator._ranks.gather_objects(loss.item())
            yield step, sum(losses) / len(losses)
            if step == until:
                break


def finish(script: Script) -> dict[str, Tensor]:
    """Every rank's view of the end: weights by name, the average, the draws that would come next."""
    sharded = find_sharded(script.model)
    assert sharded is not None
    found = sharded.state_dict()
    found["average"] = script.average.value.clone()
    found["count"] = torch.tensor(script.average.count)
    found["draws"] = torch.tensor([random.random(), numpy.random.rand(), torch.rand(()).item()], dtype=torch.float64)
    found["rates"] = torch.tensor(script.scheduler.get_last_lr(), dtype=torch.float64)
    script.accelerator.end_training()
    script.accelerator.free_memory()
    return found


def straight(
    ranks: Any,
    case: Case,
    folder: str,
    workers: int = 0,
    dropout: float = 0.1,
    plan: tuple[int, int] = (STEPS, SAVE_AT),
    **save: Any,
) -> Any:
    """The undisturbed run, which saves on its way and goes on."""
    script = build(case, workers, dropout)
    losses = []
    for step, loss in steps(script, plan[0]):
        losses.append(loss)
        if step == plan[1]:
            script.accelerator.save_state(folder, **save)
    return losses, finish(script)


def resumed(
    ranks: Any,
    case: Case,
    folder: str,
    workers: int = 0,
    dropout: float = 0.1,
    plan: tuple[int, int] = (STEPS, SAVE_AT),
) -> Any:
    script = build(case, workers, dropout)
    random.seed(77 + script.accelerator.process_index)
    torch.manual_seed(99)  # nothing of this process may count
    script.accelerator.load_state(folder)
    losses = [loss for _, loss in steps(script, *plan)]
    return losses, finish(script)


def check_equal(straight_run: Any, resumed_run: Any) -> None:
    for (losses, end), (later, again) in zip(straight_run, resumed_run, strict=True):
        assert later == losses[-len(later) :]
        assert again.keys() == end.keys()
        for name, value in end.items():
            assert torch.equal(again[name], value), name


CASES = [
    Case(stage, tier, tuning, precision)
    for stage, tier in ((0, "none"), *itertools.product((1, 2, 3), ("none", "cpu", "nvme")))
    for tuning, precision in itertools.product(("full", "lora", "lora+save"), ("no", "bf16"))
]
# Each stage and tier once, each tuning and precision several times.
SHORT = [*CASES[0::7], Case(2, "none", "lora", "fp16")]


@pytest.mark.thinned(2, rows=True)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_resumed_run_is_the_straight_run_bit_for_bit(world, tmp_path, case):
    folder = str(tmp_path / "state")
    check_equal(world(case.world).run(straight, case, folder), world(case.world).run(resumed, case, folder))


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_is_the_straight_run_in_every_plan(world, tmp_path, case):
    folder, plan = str(tmp_path / "state"), (40, 17)
    first = world(case.world).run(straight, case, folder, plan=plan)
    # In new processes: those of the straight run may hold something that a resume would miss.
    world.close()
    again = world(case.world).run(resumed, case, folder, plan=plan)
    assert len(again[0][0]) == 23
    check_equal(first, again)


OTHERS = [
    (Case(3, "cpu", "lora", world=2), Case(0, "none", "lora", world=1)),
    (Case(0, "none", "lora+save", world=1), Case(3, "none", "lora+save", world=3)),
    (Case(2, "cpu", "full", world=3), Case(3, "none", "full", world=2)),
    (Case(1, "none", "lora", world=2), Case(2, "none", "lora", world=4)),
    (Case(3, "nvme", "lora+save", world=4), Case(0, "none", "lora+save", world=1)),
    (Case(0, "none", "lora+save", world=1), Case(3, "nvme", "lora+save", world=3)),
]


@pytest.mark.parametrize(("first", "then"), OTHERS, ids=str)
def test_a_checkpoint_loads_on_any_ranks_stage_and_tier(world, tmp_path, first, then):
    folder = str(tmp_path / "state")
    # Without dropout: other ranks draw other masks.
    (losses, end), *_ = world(first.world).run(straight, first, folder, dropout=0.0)
    (later, again), *_ = world(then.world).run(resumed, then, folder, dropout=0.0)
    assert later == pytest.approx(losses[SAVE_AT:], rel=1e-6)
    for name, value in end.items():
        if name not in ("average", "draws"):
            assert (again[name] - value).abs().max() <= 1e-6, name


@pytest.mark.full
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (Case(s, t, "lora+save", world=w), Case(s2, t2, "lora+save", world=w2))
        for s, t, w in ((0, "none", 1), (1, "cpu", 2), (2, "nvme", 3), (3, "cpu", 4), (3, "nvme", 2))
        for s2, t2, w2 in ((0, "none", 4), (1, "nvme", 3), (2, "cpu", 2), (3, "none", 1), (3, "nvme", 4))
    ],
    ids=str,
)
def test_every_checkpoint_loads_everywhere(world, tmp_path, first, then):
    test_a_checkpoint_loads_on_any_ranks_stage_and_tier(world, tmp_path, first, then)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads and a loader's workers take each other's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_loader_with_workers_goes_on_in_the_middle_of_an_epoch(tmp_path, one_thread):
    # In this process, because the workers of the rig's ranks take seconds to end.
    case, folder = Case(2, "none", "lora", world=1), str(tmp_path / "state")
    check_equal([straight(None, case, folder, workers=2)], [resumed(None, case, folder, workers=2)])


@pytest.mark.parametrize("stage", [0, 3])
def test_a_save_in_the_background_holds_what_was_when_it_began(world, tmp_path, stage):
    case, folder = Case(stage, "none", "lora", world=2), str(tmp_path / "state")
    check_equal(world(2).run(straight, case, folder, async_=True), world(2).run(resumed, case, folder))
