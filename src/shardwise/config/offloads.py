"""What shards need to rest off the device, in the words of the settings: for the configuration's rules and for the plan's."""

from __future__ import annotations

from typing import Literal

Offloaded = Literal["optimizer", "param"]

# What is wrong with an empty offload_param_nvme_path or offload_optimizer_nvme_path where the device is nvme.
NVME_PATH = "is needed for the device nvme: a directory on the drive, such as /mnt/nvme"


def refused_offload(role: Offloaded, device: str, stage: int) -> str | None:
    """Why shards of this role cannot rest on `device` at a stage, which keeps it whole; None if they can."""
    if device == "none" or stage >= (3 if role == "param" else 1):
        return None
    needed = "3, where parameters are" if role == "param" else "1, 2 or 3, where the optimizer is"
    return f"{device} needs zero_stage {needed} sharded; zero_stage is {stage}"
