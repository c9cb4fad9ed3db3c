"""The flags of `config` and `launch`: one table, from which both commands get their parameters.

A flag is named as its YAML key; `main.py` takes dashes for underscores. Every value stays the text that was typed: the
schema checks it, so that a wrong flag and a wrong file are told in the same words. A flag that was not typed is None,
never a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer


@dataclass(frozen=True)
class Flag:
    """One setting's flag.

    name:     the YAML key, and with `--` the flag.
    switch:   takes no value; `--no_name` says false.
    also:     other names, as users of accelerate know them.
    """

    name: str
    help: str
    panel: str
    metavar: str = "TEXT"
    switch: bool = False
    also: tuple[str, ...] = ()


_ZERO = "ZeRO"
_TRAIN = "Training"
_PROCESSES = "Processes"
_MACHINES = "Machines"
_ENGINE = "Engine"

FLAGS: tuple[Flag, ...] = (
    Flag("zero_stage", "0 nothing sharded, 1 optimizer states, 2 and gradients, 3 and parameters.", _ZERO, "0|1|2|3"),
    Flag("offload_optimizer_device", "Where optimizer states rest.", _ZERO, "none|cpu|nvme"),
    Flag("offload_param_device", "Where parameter shards rest (stage 3).", _ZERO, "none|cpu|nvme"),
    Flag("zero3_init_flag", "Construct the model sharded (stage 3).", _ZERO, "true|false"),
    Flag("zero3_save_16bit_model", "Save consolidated 16-bit weights (stage 3).", _ZERO, "true|false"),
    Flag("deepspeed_config_file", "Take the ZeRO settings from this DeepSpeed JSON file.", _ZERO, "FILE"),
    Flag("offload_optimizer_nvme_path", "Directory for the device nvme.", _ZERO, "DIR"),
    Flag("offload_param_nvme_path", "Directory for the device nvme.", _ZERO, "DIR"),
    Flag("deepspeed_moe_layer_cls_names", "MoE block classes, with commas.", _ZERO, "NAMES"),
    Flag("deepspeed_multinode_launcher", "Only standard is supported.", _ZERO, "standard"),
    Flag("mixed_precision", "What the model computes in.", _TRAIN, "no|bf16|fp16"),
    Flag(
        "gradient_accumulation_steps", "Micro-batches for each optimizer step; auto: the script says.", _TRAIN, "N|auto"
    ),
    Flag("gradient_clipping", "Clip the global gradient norm at this value.", _TRAIN, "NUMBER|none"),
    Flag(
        "dynamo_backend", "Compile the blocks of the model with torch.compile.", _TRAIN, "no|inductor|aot_eager|eager"
    ),
    Flag("distributed_type", "Kind of run; follows from the other flags where not given.", _PROCESSES, "TYPE"),
    Flag("num_processes", "Processes in total, over all machines. Default: one for each GPU.", _PROCESSES, "N"),
    Flag("use_cpu", "Train on the CPU (gloo), even where there are GPUs.", _PROCESSES, switch=True, also=("cpu",)),
    Flag("gpu_ids", "GPUs of this machine to use, such as 0,1.", _PROCESSES, "IDS|all"),
    Flag(
        "threads_per_rank",
        "CPU threads of each process. Default: cores / processes.",
        _PROCESSES,
        "N",
        also=("num_cpu_threads_per_process",),
    ),
    Flag("max_restarts", "Start all ranks again so many times after a failure.", _PROCESSES, "N"),
    Flag("restart_processes", "Processes after a restart. Default: as before, or the GPUs left.", _PROCESSES, "N"),
    Flag("debug", "Check every collective over the ranks first (slower).", _PROCESSES, switch=True),
    Flag("num_machines", "How many machines.", _MACHINES, "N"),
    Flag("machine_rank", "Which of them this is, from 0.", _MACHINES, "N"),
    Flag("main_process_ip", "Address of machine 0.", _MACHINES, "HOST"),
    Flag("main_process_port", "A free port of machine 0; on one machine a free one is found.", _MACHINES, "PORT"),
    Flag("rdzv_backend", "How the machines find each other.", _MACHINES, "static|c10d"),
    Flag("same_network", "All machines are in one network.", _MACHINES, switch=True),
    Flag("reduce_dtype", "Number format in which gradients are summed over ranks.", _ENGINE, "fp32|bf16|fp16|auto"),
    Flag("prefetch_units", "How many units are gathered ahead.", _ENGINE, "N"),
    Flag("units", "Block classes or module paths to shard as units, with commas.", _ENGINE, "NAMES"),
    Flag("whole_adapters", "Keep PEFT adapters whole on every rank (stage 3).", _ENGINE, "auto|true|false"),
    Flag(
        "scheduler_steps_per_process",
        "Step schedulers once for each process, as accelerate does.",
        _ENGINE,
        "true|false",
    ),
    Flag(
        "gpu_memory_budget",
        "GPU memory for each process; what is offloaded stays on the GPU as far as it fits.",
        _ENGINE,
        "auto|24GB",
    ),
    Flag(
        "generation_memory_budget",
        "GPU memory for weights that stay gathered while generating; auto: what is free.",
        _ENGINE,
        "auto|none|24GB",
    ),
    Flag("enable_cpu_affinity", "Keep each process to cores of its own.", _PROCESSES, switch=True),
    Flag("collective_timeout_s", "Seconds that a rank waits for the others before it raises.", _ENGINE, "SECONDS"),
    Flag("gather_with", "Who brings the shards of weights together.", _ENGINE, "auto|copy_engine|nccl"),
    Flag("loss_chunk_tokens", "Compute the loss of so many tokens at a time, without all logits.", _ENGINE, "N"),
    Flag(
        "loss_keeps_logits", "With loss_chunk_tokens: logits are made once and stay, in 16 bit.", _ENGINE, switch=True
    ),
    Flag(
        "activation_checkpointing",
        "Recompute blocks in the backward; auto: as few as the memory budget needs.",
        _ENGINE,
        "none|all|auto",
    ),
    Flag("fast_lora", "PEFT's LoRA layers with fewer passes; auto: off.", _ENGINE, "auto|true|false"),
    Flag("train_batch_size", "Expected global batch size; checked in prepare.", _ENGINE, "N"),
    Flag("micro_batch_size", "Expected batch size of one process; checked in prepare.", _ENGINE, "N"),
)


def _parameter(flag: Flag) -> inspect.Parameter:
    names: list[str] = []
    for name in (flag.name, *flag.also):
        names.append(f"--{name}/--no_{name}" if flag.switch else f"--{name}")
    option = typer.Option(
        None, *names, help=flag.help, rich_help_panel=flag.panel, metavar=None if flag.switch else flag.metavar
    )
    kind: Any = bool | None if flag.switch else str | None
    return inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command(settings, ...)` as a function whose signature has one parameter for each flag in place of `settings`.

    settings: {name: what was typed}, without the flags that were not given.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "settings"]
    names = [flag.name for flag in FLAGS]

    def typed(**values: Any) -> None:
        settings = {name: values.pop(name) for name in names}
        command(settings={name: value for name, value in settings.items() if value is not None}, **values)

    parameters = [
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
        *(_parameter(flag) for flag in FLAGS),
    ]
    typed.__doc__ = command.__doc__
    typed.__name__ = command.__name__
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return typed


def as_flags(settings: Mapping[str, Any]) -> str:
    """The settings as they would be typed, for texts."""
    return " ".join(f"--{name}" for name in settings)
