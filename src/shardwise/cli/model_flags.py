"""Flags of `estimate` and `plan` that no configuration has: what is done to the model, and which machine it would run on."""

from __future__ import annotations

from typing import Annotated

import typer

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
