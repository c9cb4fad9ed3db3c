"""The scenarios whose transcripts are pinned, and playing one of them under recording.

No two parts of the model "graded" have as many elements, so a line's number says which unit it is.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from rig.engine import adamw
from rig.plays import (
    Graded,
    Play,
    Recompute,
    Stage,
    averages,
    branches,
    evaluates,
    gathers_metrics,
    generates,
    overflows,
    reads,
    saves,
    saves_pretrained,
    train,
)
from rig.tiny import checkpointed, tiny
from rig.transcripts import Phases, Recorder, recording
from shardwise import Accelerator
from shardwise.run.process import forget_run


@dataclass(frozen=True)
class Scenario:
    """play: after prepare. zero, engine, run: keys of the configuration's three levels. model: "graded", "llama" or "lora"."""

    play: Play
    zero: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    model: str = "graded"
    recompute: Recompute = "none"
    ranks: int = 2


def transcript(ranks: Any, file: str, name: str, folder: str) -> Phases:
    """What this rank sends in that scenario."""
    scenario = SCENARIOS[file][name]
    # Re-entrant checkpointing says so where nothing in front of a block is trained.
    warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
    with _configured(scenario, folder):
        forget_run()
        accelerator = Accelerator(project_dir=folder)
        try:
            return _recorded(ranks, scenario, accelerator, Path(folder))
        finally:
            accelerator.free_memory()
            forget_run()
            gc.collect()


@contextlib.contextmanager
def _configured(scenario: Scenario, folder: str) -> Iterator[None]:
    """The settings as the launcher hands them to a rank."""
    zero = {key: folder if value == "FOLDER" else value for key, value in scenario.zero.items()}
    text = json.dumps(
        {
            "distributed_type": "DEEPSPEED",
            "use_cpu": True,
            "deepspeed_config": zero,
            "shardwise_config": scenario.engine,
            **scenario.run,
        }
    )
    before = os.environ.get("SHARDWISE_CONFIG")
    os.environ["SHARDWISE_CONFIG"] = text
    try:
        yield
    finally:
        os.environ.pop("SHARDWISE_CONFIG")
        if before is not None:
            os.environ["SHARDWISE_CONFIG"] = before


def _recorded(ranks: Any, scenario: Scenario, accelerator: Accelerator, folder: Path) -> Phases:
    recorder = Recorder()
    model = _made(scenario, recorder)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    data = TensorDataset(torch.arange(24.0).view(12, 2))
    _name_groups(recorder, accelerator)
    if scenario.model == "graded":
        recorder.divided(model)
    with recording(recorder):
        recorder.begin("prepare")
        loader = accelerator.prepare(model, optimizer, scheduler, DataLoader(data, batch_size=2))[-1]
        stage = Stage(ranks, accelerator, model, optimizer, scheduler, loader, folder, recorder.begin)
        scenario.play(stage)
        recorder.begin("free_memory")
        accelerator.free_memory(model)
    return recorder.phases()


def _made(scenario: Scenario, recorder: Recorder) -> Any:
    if scenario.model == "graded":
        return Graded(scenario.recompute, recorder.note)
    model = tiny("llama", "full" if scenario.model == "llama" else "lora")
    return model if scenario.recompute == "none" else checkpointed(model, scenario.recompute == "reentrant")


def _name_groups(recorder: Recorder, accelerator: Accelerator) -> None:
    """By what they do: the default group, the one in which ranks wait, and the one that moves tensors."""
    if dist.group.WORLD is None:
        return
    recorder.names(dist.group.WORLD, "world")
    for name, act in (
        ("control", accelerator.wait_for_everyone),
        ("data", lambda: accelerator.reduce(torch.ones(5))),
    ):
        seen: list[dist.ProcessGroup] = []
        probe = Recorder()
        probe.sent = lambda group, method, args, kwargs, to=seen: to.append(group)  # type: ignore[method-assign]
        with recording(probe):
            act()
        if seen:
            recorder.names(seen[-1], name)


def _zero(stage: int, optimizer: str = "none", param: str = "none", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"zero_stage": stage, **more}
    for role, tier in (("optimizer", optimizer), ("param", param)):
        if tier != "none":
            found[f"offload_{role}_device"] = tier
        if tier == "nvme":
            found[f"offload_{role}_nvme_path"] = "FOLDER"
    return found


def _training() -> Iterator[tuple[str, Scenario]]:
    for stage in range(4):
        yield f"stage {stage}", Scenario(train, _zero(stage))
        yield (
            f"stage {stage}, accumulation 2",
            Scenario(partial(train, count=4), _zero(stage, gradient_accumulation_steps=2)),
        )
        for recompute in ("plain", "reentrant") if stage > 1 else ("reentrant",):
            yield f"stage {stage}, checkpointing {recompute}", Scenario(train, _zero(stage), recompute=recompute)
    yield (
        "stage 3, accumulation 2, checkpointing reentrant",
        Scenario(partial(train, count=4), _zero(3, gradient_accumulation_steps=2), recompute="reentrant"),
    )
    yield "stage 3, 3 ranks", Scenario(train, _zero(3), ranks=3)
    yield "stage 3, 1 rank", Scenario(train, _zero(3), ranks=1)
    yield "stage 3, prefetch 0", Scenario(train, _zero(3), {"prefetch_units": 0})
    yield "stage 3, prefetch 2", Scenario(train, _zero(3), {"prefetch_units": 2})
    for stage in (0, 2, 3):
        yield f"stage {stage}, clipping", Scenario(partial(train, clip=0.1), _zero(stage))
    yield "stage 3, clipping by the settings", Scenario(train, _zero(3, gradient_clipping=0.1))
    for precision in ("fp16", "bf16"):
        yield f"stage 3, {precision}", Scenario(overflows, _zero(3), run={"mixed_precision": precision})
    yield "stage 2, fp16", Scenario(overflows, _zero(2), run={"mixed_precision": "fp16"})


def _placing() -> Iterator[tuple[str, Scenario]]:
    for name, zero in (
        ("stage 1, optimizer on cpu", _zero(1, "cpu")),
        ("stage 2, optimizer on cpu", _zero(2, "cpu")),
        ("stage 3, optimizer on cpu", _zero(3, "cpu")),
        ("stage 3, all on cpu", _zero(3, "cpu", "cpu")),
        ("stage 2, optimizer on nvme", _zero(2, "nvme")),
        ("stage 3, all on nvme", _zero(3, "nvme", "nvme")),
    ):
        yield name, Scenario(train, zero)
    for name, zero in (("optimizer on cpu", _zero(3, "cpu")), ("all on cpu", _zero(3, "cpu", "cpu"))):
        for budget in (6000, 1 << 30):
            yield (
                f"stage 3, {name}, gpu_memory_budget {budget}",
                Scenario(partial(train, count=5), zero, {"gpu_memory_budget": budget}),
            )
    yield "stage 3, gpu_memory_budget", Scenario(partial(train, count=5), _zero(3), {"gpu_memory_budget": 1 << 30})
    yield (
        "stage 3, LoRA, gpu_memory_budget",
        Scenario(partial(train, count=5), _zero(3), {"gpu_memory_budget": 1 << 30}, model="lora"),
    )


def _routes() -> Iterator[tuple[str, Scenario]]:
    for stage in (0, 2, 3):
        yield f"stage {stage}, branches", Scenario(branches, _zero(stage))
    for recompute in ("plain", "reentrant"):
        yield f"stage 3, branches, checkpointing {recompute}", Scenario(branches, _zero(3), recompute=recompute)
    yield "stage 3, all on cpu, branches", Scenario(branches, _zero(3, "cpu", "cpu"))
    yield "stage 3, evaluation", Scenario(evaluates, _zero(3))
    yield "stage 3, all on cpu, evaluation", Scenario(evaluates, _zero(3, "cpu", "cpu"))
    yield (
        "stage 3, evaluation, generation_memory_budget none",
        Scenario(evaluates, _zero(3), {"generation_memory_budget": "none"}),
    )
    for budget in ("auto", "none", "70kB"):
        yield (
            f"stage 3, generation, budget {budget}",
            Scenario(generates, _zero(3), {"generation_memory_budget": budget}, model="llama"),
        )
    yield (
        "stage 3, LoRA, generation, budget none",
        Scenario(generates, _zero(3), {"generation_memory_budget": "none"}, model="lora"),
    )


def _lora() -> Iterator[tuple[str, Scenario]]:
    for stage in (0, 2, 3):
        yield f"stage {stage}, LoRA", Scenario(train, _zero(stage), model="lora")
    yield "stage 3, LoRA, all on cpu", Scenario(train, _zero(3, "cpu", "cpu"), model="lora")
    yield "stage 3, LoRA, checkpointing reentrant", Scenario(train, _zero(3), model="lora", recompute="reentrant")
    yield "stage 3, LoRA, whole_adapters", Scenario(train, _zero(3), {"whole_adapters": True}, model="lora")


def _verbs() -> Iterator[tuple[str, Scenario]]:
    for stage in (0, 2, 3):
        yield f"stage {stage}, save and load", Scenario(saves, _zero(stage))
        yield f"stage {stage}, reads", Scenario(reads, _zero(stage))
    yield "stage 3, all on nvme, save and load", Scenario(saves, _zero(3, "nvme", "nvme"))
    for stage in (1, 3):
        yield f"stage {stage}, averages", Scenario(averages, _zero(stage))
    yield "stage 3, LoRA, save_pretrained", Scenario(saves_pretrained, _zero(3), model="lora")
    yield "stage 3, llama, save_pretrained", Scenario(saves_pretrained, _zero(3), model="llama")
    yield "stage 2, metrics", Scenario(gathers_metrics, _zero(2))


# By the file that has their transcripts.
SCENARIOS: dict[str, dict[str, Scenario]] = {
    name: dict(made())
    for name, made in (
        ("training", _training),
        ("placing", _placing),
        ("routes", _routes),
        ("lora", _lora),
        ("verbs", _verbs),
    )
}
