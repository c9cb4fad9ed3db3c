"""What the example scripts need to be stopped at any moment and to go on: where checkpoints go, when, and what they count."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from shardwise import Accelerator, ProjectConfiguration


class Progress:
    """Optimizer steps taken and the loss of the epoch so far: part of every checkpoint."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.total_loss = torch.zeros((), device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total_loss": self.total_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.total_loss.copy_(state["total_loss"])

    def end_epoch(self, batches: int) -> torch.Tensor:
        """The epoch's mean loss on this process; the next epoch begins at zero."""
        mean = self.total_loss / batches
        self.total_loss.zero_()
        return mean


def project_of(args: argparse.Namespace) -> ProjectConfiguration:
    """Checkpoints below the output directory, the newest --keep-checkpoints of them."""
    return ProjectConfiguration(
        project_dir=args.output_dir, automatic_checkpoint_naming=True, total_limit=args.keep_checkpoints
    )


def resume(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Load what --resume names. `latest` without a checkpoint begins anew, so that one command starts and restarts a run."""
    if args.resume is None:
        return
    if args.resume != "latest":
        accelerator.print(f"resumed: {accelerator.load_state(args.resume)}")
    elif accelerator.has_checkpoint():
        accelerator.print(f"resumed: {accelerator.load_state()}")
    else:
        accelerator.print("resumed: nothing, there is no checkpoint yet")


def after_step(accelerator: Accelerator, args: argparse.Namespace, progress: Progress) -> bool:
    """Count an optimizer step and save where it is due. True if the script is to end: it was told so, and has saved."""
    if not accelerator.sync_gradients:
        return False
    progress.steps += 1
    if accelerator.stop_requested():
        accelerator.print(f"stopped at step {progress.steps}, saved: {accelerator.save_state()}")
        accelerator.end_training()
        return True
    if args.save_every is not None and progress.steps % args.save_every == 0:
        accelerator.save_state(async_=True)
    return False
