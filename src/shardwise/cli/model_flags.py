"""Flags of `estimate` and `plan` that no configuration has: what is done to the model, and which machine it would run on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from ..estimate.named import named
from .flags import as_command

LoraR = Annotated[
    str | None, typer.Option("--lora_r", metavar="N", help="LoRA of this rank; default: every weight is trained.")
]
TargetModules = Annotated[str, typer.Option("--target_modules", metavar="NAMES", help="What LoRA adapts, with commas.")]
ModulesToSave = Annotated[
    str | None, typer.Option("--modules_to_save", metavar="NAMES", help="Modules trained whole beside LoRA.")
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", metavar="8bit|4bit", help="Frozen linear weights as codes and scales.")
]
LoadedDtype = Annotated[
    str | None, typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Of the loaded weights; default: the model's.")
]
SequenceLength = Annotated[
    str | None,
    typer.Option("--sequence_length", metavar="N", help="Count activations too, for --micro_batch_size sequences."),
]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="Every block is recomputed in the backward.")]
Attention = Annotated[str, typer.Option("--attention", metavar="sdpa|eager")]
OptimizerName = Annotated[
    str,
    typer.Option(
        "--optimizer", metavar="NAME", help="A known one, module:Class, or A+B: A for matrices, B for the rest."
    ),
]
OptimizerArgs = Annotated[
    str | None, typer.Option("--optimizer_args", metavar="K=V,...", help="What it is made with, as momentum=0.9.")
]

Gpus = Annotated[
    str | None, typer.Option("--gpus", metavar="N", help="GPUs of each machine, where that is not this one.")
]
GpuName = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Which GPU, as H100 or 4090.")]
GpuMemory = Annotated[str | None, typer.Option("--gpu_memory", metavar="SIZE", help="Of one GPU, as 80GB.")]
HostMemory = Annotated[str | None, typer.Option("--host_memory", metavar="SIZE", help="Of each machine, as 512GB.")]
LinkRate = Annotated[
    str | None, typer.Option("--link", metavar="RATE", help="Between a GPU and its host, one way, as 25GB/s.")
]
NetworkRate = Annotated[
    str | None, typer.Option("--network", metavar="RATE", help="Between machines, for each GPU, as 40GB/s.")
]
DriveSize = Annotated[str | None, typer.Option("--nvme", metavar="SIZE", help="Free space of a drive, as 4TB.")]
DriveRate = Annotated[str | None, typer.Option("--drive", metavar="RATE", help="What it reads and writes, as 3GB/s.")]

ModelName = typer.Argument(metavar="MODEL", help="A hub id, a directory with a config.json, or such a file.")
# By the fields of `Asked`, in the order of --help.
_OF_MODEL = {
    "lora_r": LoraR,
    "target_modules": TargetModules,
    "modules_to_save": ModulesToSave,
    "quantize": Quantize,
    "dtype": LoadedDtype,
    "sequence_length": SequenceLength,
    "checkpointing": Checkpointing,
    "attention": Attention,
    "optimizer": OptimizerName,
    "optimizer_args": OptimizerArgs,
}


@dataclass(frozen=True)
class Asked:
    """The flags that no configuration has. Values are texts, as they were typed."""

    lora_r: str | None = None
    target_modules: str = "all-linear"
    modules_to_save: str | None = None
    quantize: str | None = None
    dtype: str | None = None
    sequence_length: str | None = None
    attention: str = "sdpa"
    checkpointing: bool = False
    optimizer: str = "AdamW"
    optimizer_args: str | None = None

    def check(self) -> None:
        """Raises ConfigError for a value that a flag does not take."""
        rank = count_of("--lora_r", self.lora_r)
        count_of("--sequence_length", self.sequence_length)
        named(self.optimizer, self.optimizer_args)
        if self.attention not in ("sdpa", "eager"):
            raise ConfigError(f"--attention: {self.attention!r} is not one of sdpa, eager")
        if self.quantize not in (None, "8bit", "4bit"):
            raise ConfigError(f"--quantize: {self.quantize!r} is not one of 8bit, 4bit")
        if self.dtype not in (None, "fp32", "bf16", "fp16"):
            raise ConfigError(f"--dtype: {self.dtype!r} is not one of fp32, bf16, fp16")
        if self.quantize is not None and rank is None:
            raise ConfigError("--quantize: quantised weights cannot be trained; add --lora_r")
        for flag in ("target_modules", "modules_to_save"):
            if rank is None and getattr(self, flag) != getattr(Asked, flag):
                raise ConfigError(f"--{flag}: has no effect without --lora_r")


def count_of(flag: str, text: str | None) -> int | None:
    """The number that was typed for `flag`. Raises ConfigError for another text than a whole number of 1 or more."""
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{flag}: {text!r} is not a whole number of 1 or more")
    return int(text)


def with_model_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command(asked, ...)` as a function whose signature has a parameter for each flag of `Asked` in place of `asked`."""
    defaults = {field.name: field.default for field in fields(Asked)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name != "asked":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        parameters += [
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=defaults[flag], annotation=kind)
            for flag, kind in _OF_MODEL.items()
        ]

    def typed(**values: Any) -> None:
        command(asked=Asked(**{flag: values.pop(flag) for flag in _OF_MODEL}), **values)

    return as_command(typed, command, parameters)
