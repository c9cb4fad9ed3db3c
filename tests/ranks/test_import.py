"""A run that another library has begun goes on here as if it had not moved: on any number of ranks, under any stage and tier.

The other library is plain torch: its AdamW, one process, and files laid as DeepSpeed or accelerate lay them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rig.foreign_files import Layout, Net, groups_of, write_deepspeed
from rig.heard import heard
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.checkpoint.from_checkpoint import export
from shardwise.errors import CheckpointError
from shardwise.foreign.importing import import_checkpoint
from shardwise.run.process import forget_run

BATCH = 12  # 1, 2 and 3 ranks share it evenly
MOVED_AT, END = 4, 9


def tokens_of(step: int, rank: int = 0, world: int = 1) -> Tensor:
    drawn = torch.randint(0, 11, (BATCH, 6), generator=torch.Generator().manual_seed(70 + step))
    return drawn[rank * BATCH // world : (rank + 1) * BATCH // world]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def build(seed: int) -> tuple[Net, torch.optim.AdamW, Any]:
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, eps=1e-4)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)


def straight(folder: Path, save: Any) -> list[float]:
    """The losses of the run that does not move; `save(folder, model, optimizer, scheduler)` after MOVED_AT steps."""
    model, optimizer, scheduler = build(3)
    losses = []
    for step in range(END):
        if step == MOVED_AT:
            save(folder, model, optimizer, scheduler)
        loss = loss_of(model, tokens_of(step))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[MOVED_AT:]


def go_on(ranks: Any, folder: str, stage: int, tier: str, *, frozen: bool = True) -> list[float]:
    """The losses of the run that has moved here. Nothing of this process's own weights may count."""
    forget_run()
    plugin = DeepSpeedPlugin(
        zero_stage=stage, offload_optimizer_device=tier, offload_param_device=tier if stage == 3 else "none"
    )
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, step_scheduler_with_optimizer=False)
    model, optimizer, scheduler = build(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or frozen:
                parameter.add_(torch.ones_like(parameter))
    model.scale.zero_()
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    accelerator.load_state(folder)
    losses = []
    for step in range(MOVED_AT, END):
        loss = loss_of(model, tokens_of(step, accelerator.process_index, accelerator.num_processes))
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.end_training()
    return losses


CASES = [
    # as it was saved, and on how many ranks, under which stage and tier it goes on
    (Layout(stage=1, world=1), 2, 3, "none"),
    (Layout(stage=2, world=3), 1, 0, "none"),
    (Layout(stage=3, world=2), 3, 2, "cpu"),
    (Layout(stage=3, world=3, version="0.19.8", sub_group_numel=20), 2, 1, "none"),
    (Layout(stage=2, world=2, version="0.19.8", aligned=True), 2, 2, "none"),
    (Layout(stage=3, world=1), 3, 3, "cpu"),
]


@pytest.mark.parametrize(("layout", "world_size", "stage", "tier"), CASES)
def test_a_run_of_deepspeed_goes_on(world, tmp_path, layout, world_size, stage, tier):
    expected = straight(tmp_path / "run", lambda *run: write_deepspeed(*run, MOVED_AT, layout))
    import_checkpoint(tmp_path / "run", tmp_path / "state")
    for losses in world(world_size).run(go_on, str(tmp_path / "state"), stage, tier):
        assert losses == pytest.approx(expected, rel=1e-6)


def save_plain(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """As accelerate's save_state writes it; tests/unit/test_import_files.py takes accelerate's own writer."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    torch.save(scheduler.state_dict(), folder / "scheduler.bin")


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (3, 3)])
def test_a_plain_run_of_accelerate_goes_on(world, tmp_path, world_size, stage):
    expected = straight(tmp_path / "run", save_plain)
    import_checkpoint(tmp_path / "run", tmp_path / "state")
    for losses in world(world_size).run(go_on, str(tmp_path / "state"), stage, "none"):
        assert losses == pytest.approx(expected, rel=1e-6)


def test_excluded_frozen_weights_are_those_of_the_script(world, tmp_path):
    layout = Layout(stage=3, world=2, frozen=False)
    expected = straight(tmp_path / "run", lambda *run: write_deepspeed(*run, MOVED_AT, layout))
    import_checkpoint(tmp_path / "run", tmp_path / "state")
    for losses in world(2).run(go_on, str(tmp_path / "state"), 3, "none", frozen=False):
        assert losses == pytest.approx(expected, rel=1e-6)


def load_more(ranks: Any, folder: str) -> list[str]:
    """A script that prepares what the files say nothing of: it is told so, and nothing else is disturbed."""
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=2))
    model, optimizer, scheduler = build(3)
    loader = DataLoader(torch.arange(8), batch_size=2)
    prepared = accelerator.prepare(model, optimizer, scheduler, loader)
    accelerator.register_for_checkpointing(torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)))
    with heard() as said:
        torch.manual_seed(8)
        accelerator.load_state(folder)
    assert torch.rand(3).tolist() == torch.rand(3, generator=torch.Generator().manual_seed(8)).tolist()
    assert prepared[1].param_groups[0]["lr"] == 1e-2 * 0.7  # the optimizer's own, as it was left
    accelerator.end_training()
    return said


def test_what_the_files_say_nothing_of_is_said_by_the_load(world, tmp_path):
    straight(tmp_path / "run", lambda folder, *run: write_deepspeed(folder, *run[:2], None, MOVED_AT, Layout()))
    done = import_checkpoint(tmp_path / "run", tmp_path / "state")
    assert any("No state of a schedule" in note for note in done.notes)
    (said,) = world(1).run(load_more, str(tmp_path / "state"))
    for words in (
        "no state of a scheduler",
        "no state of a registered object",
        "without random generators",
        "no position",
    ):
        assert any(words in text for text in said), (words, said)


def load_into_another(ranks: Any, folder: str) -> str:
    forget_run()
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3))
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(CheckpointError) as caught:
        accelerator.load_state(folder)
    accelerator.end_training()
    return str(caught.value)


def test_another_model_is_refused(world, tmp_path):
    straight(tmp_path / "run", lambda *run: write_deepspeed(*run, MOVED_AT, Layout()))
    import_checkpoint(tmp_path / "run", tmp_path / "state")
    for text in world(2).run(load_into_another, str(tmp_path / "state")):
        assert "does not fit this model" in text


def test_an_imported_model_is_exported(tmp_path):
    from safetensors.torch import load_file

    kept: dict[str, Tensor] = {}

    def save(folder: Path, model: nn.Module, *run: Any) -> None:
        kept.update({name: value.clone() for name, value in model.state_dict().items()})
        write_deepspeed(folder, model, *run, MOVED_AT, Layout(stage=3, world=3))

    straight(tmp_path / "run", save)
    import_checkpoint(tmp_path / "run", tmp_path / "state")
    export(tmp_path / "state", tmp_path / "weights")
    found = load_file(tmp_path / "weights" / "model.safetensors")
    assert kept.keys() - found.keys() == {"head.weight"}  # tied
    assert all(torch.equal(found[name], kept[name]) for name in found)
