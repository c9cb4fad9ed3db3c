"""Where shards may rest, in the words of the settings: for the configuration's rules and for the plan's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal, get_args

Offloaded = Literal["optimizer", "param"]
Medium = Literal["GPU", "host", "disk"]
MEDIA: tuple[Medium, ...] = get_args(Medium)


class Tier(StrEnum):
    """Where bytes rest, the nearest first: GPU is the rank's device, also when that is a CPU; CPU is host memory beside it.

    medium:   what of the machine it takes. Tiers on a disk need a directory, and their stores are in `offload/tiers.py`.
    in_place: a step on a CPU can change what rests there; else that visits the device, as it always does beside a GPU.
    """

    medium: Medium
    in_place: bool

    def __new__(cls, value: str, medium: Medium, in_place: bool) -> Tier:
        tier = str.__new__(cls, value)
        tier._value_ = value
        tier.medium, tier.in_place = medium, in_place
        return tier

    GPU = "gpu", "GPU", True
    CPU = "cpu", "host", True
    NVME = "nvme", "disk", False  # files, read and written past the page cache

    @property
    def on_disk(self) -> bool:
        return self.medium == "disk"

    def visits(self, *, cuda: bool) -> bool:
        """Whether what rests here visits the device for a step. cuda: the device is a GPU."""
        return not self.in_place or (cuda and self is not Tier.GPU)


# What the settings offload_optimizer_device and offload_param_device take; none keeps shards on the device.
DEVICES: dict[str, Tier] = {"none": Tier.GPU, **{str(tier): tier for tier in Tier if tier is not Tier.GPU}}
OFFLOADS = tuple(device for device in DEVICES if device != "none")


def either(words: Sequence[str], conjunction: str) -> str:
    """`cpu and nvme`; `none, cpu or nvme`."""
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# Of a tier on a disk: one directory, or several, each on a drive of its own.
Directories = str | os.PathLike[str] | Sequence[str] | Sequence[os.PathLike[str]]


def directories_of(given: Directories | None) -> tuple[str, ...]:
    """The single paths of such a setting; none where it is empty."""
    if isinstance(given, (str, os.PathLike)):
        return (os.fspath(given),) if os.fspath(given) else ()
    return tuple(os.fspath(path) for path in given or ())


# The devices that need a directory, in words.
WITH_DIRECTORY = either([device for device in OFFLOADS if DEVICES[device].on_disk], "or")


def no_directory(device: str) -> str:
    """What is wrong with an empty offload_param_nvme_path or offload_optimizer_nvme_path where the device needs one."""
    return f"is needed for the device {device}: a directory on the drive, such as /mnt/nvme"


def refused_offload(role: Offloaded, device: str, stage: int) -> str | None:
    """Why shards of this role cannot rest on `device` at a stage, which keeps it whole; None if they can."""
    if device == "none" or stage >= (3 if role == "param" else 1):
        return None
    needed = "3, where parameters are" if role == "param" else "1, 2 or 3, where the optimizer is"
    return f"{device} needs zero_stage {needed} sharded; zero_stage is {stage}"


def states_stay(device: str) -> str:
    """That optimizer_state_dtype has no effect, where states rest on `device` and are stepped where they rest."""
    why = "nothing of the optimizer is offloaded"
    if device != "none":
        visiting = either([name for name in OFFLOADS if not DEVICES[name].in_place], "or")
        why = f"a run on CPUs steps what rests on {device} in place, in fp32; offload_optimizer_device {visiting} is coded"
    return f"optimizer_state_dtype: has no effect: {why}."
