"""The sections of a configuration: every key of the guide's `deepspeed_config`, and of `shardwise_config`, once.

A key is said here with all that the front ends need of it (`setting.py`): a new one is a row of its section and the line where
it acts. `schema.py` has the file's top level. Which settings go together is told in `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict

from .fields import (
    Flag,
    Kind,
    OptionalCount,
    OptionalNames,
    OptionalPaths,
    OptionalText,
    absent,
    auto_or_flag,
    budget,
    described,
    group_of_ranks,
    none_or_all,
    number,
    one_of,
    optional,
    whole_number,
)
from .offloads import DEVICES, OFFLOADS, WITH_DIRECTORY, either
from .setting import ENGINE, PROCESSES, TRAINING, ZERO, Setting, Wording

_HYSTERESIS = dict.fromkeys(range(2, 100), "the scale falls at every overflow; only 1 is taken")
# 0 is DeepSpeed's way to say "no clipping". There is no hidden 1.0.
_NO_CLIPPING = ("none", "auto", "no", 0, 0.0, False)

_AUTO_OR_FLAG = Kind(auto_or_flag, metavar="auto|true|false")
_BUDGET = optional(Kind(budget, metavar="SIZE"), "none", "")
_DEVICE = one_of(*DEVICES)
_DEVICES = {"none": "on the device", **{device: device for device in OFFLOADS}}
_ONE_OF_THEM = either([*DEVICES], "or")
_FAST_DRIVE = "A fast local drive, or several with commas, which share the bytes; the files of a run go when it ends."
_OWN_PATH = "paths of this machine"
_SHARD_GROUP = Kind(group_of_ranks, metavar="world|machine|N")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, protected_namespaces=())


class ZeroConfig(Section):
    """What is sharded and where it rests. A value of None means: not said, so the script or the default decides."""

    zero_stage: Annotated[
        int,
        one_of(0, 1, 2, 3),
        Setting(
            "0 nothing sharded, 1 optimizer states, 2 and gradients, 3 and parameters.",
            ZERO,
            comment="0 nothing sharded, 1 optimizer, 2 + gradients, 3 + parameters",
            asked=Wording(
                "Which ZeRO stage?",
                "A higher stage needs less memory and more traffic. With LoRA most of the memory is parameters: take 3.",
                {
                    0: "0  nothing sharded",
                    1: "1  optimizer states",
                    2: "2  optimizer states and gradients",
                    3: "3  optimizer states, gradients and parameters",
                },
            ),
        ),
    ] = 2
    shard_group: Annotated[
        Literal["world", "machine"] | int,
        _SHARD_GROUP,
        Setting(
            "Ranks that hold one copy of the model together: all, those of a machine, or so many; the groups hold copies.",
            ZERO,
            comment="who holds one copy together: world, machine, or a number of ranks",
            asked=Wording(
                "Which ranks hold one copy of the model together?",
                "Over several machines the GPUs of one can hold a copy: gathers then stay inside, and gradients are averaged "
                "over the machines.",
                {"world": "all of them", "machine": "those of a machine"},
            ),
        ),
    ] = "world"
    optimizer_shard_group: Annotated[
        Literal["shard_group", "world"],
        one_of("shard_group", "world"),
        Setting(
            "Ranks that divide gradients, masters and optimizer states at stage 3: those of shard_group, or all (hpZ).",
            ZERO,
            comment="who divides gradients and optimizer states: shard_group, or world",
        ),
    ] = "shard_group"
    gradient_accumulation_steps: Annotated[
        OptionalCount,
        Setting(
            "Micro-batches for each optimizer step; auto: the script says.",
            TRAINING,
            "N|auto",
            comment="micro-batches for each optimizer step",
            asked=Wording(
                "How many micro-batches for each optimizer step?",
                "Gradient accumulation: more, for a larger batch in the same memory.",
            ),
        ),
    ] = None
    gradient_clipping: Annotated[
        float | None,
        optional(number(0, above=True), *_NO_CLIPPING),
        Setting(
            "Clip the global gradient norm at this value.",
            TRAINING,
            "NUMBER|none",
            comment="global norm; 0.0 is no clipping",
            asked=Wording("Clip above which norm?", "1.0 is common."),
        ),
    ] = None
    offload_optimizer_device: Annotated[
        str,
        _DEVICE,
        Setting(
            "Where optimizer states rest.",
            ZERO,
            comment=_ONE_OF_THEM,
            asked=Wording(
                "Where do the optimizer states rest?",
                f"{either(OFFLOADS, 'and')} free GPU memory; the states then visit the GPU in every step.",
                _DEVICES,
            ),
        ),
    ] = "none"
    offload_param_device: Annotated[
        str,
        _DEVICE,
        Setting(
            "Where parameter shards rest (stage 3).",
            ZERO,
            comment=f"{_ONE_OF_THEM} (stage 3)",
            asked=Wording(
                "Where do the parameters rest?",
                f"{', '.join(OFFLOADS)}: each block is copied to the GPU when it is used.",
                _DEVICES,
            ),
        ),
    ] = "none"
    offload_optimizer_nvme_path: Annotated[
        OptionalPaths,
        Setting(
            f"Directory for the device {WITH_DIRECTORY}; of several drives one each, with commas.",
            ZERO,
            after="deepspeed_config_file",
            own=_OWN_PATH,
            asked=Wording("Directory on the drive, for optimizer states?", _FAST_DRIVE),
        ),
    ] = None
    offload_param_nvme_path: Annotated[
        OptionalPaths,
        Setting(
            f"Directory for the device {WITH_DIRECTORY}; of several drives one each, with commas.",
            ZERO,
            after="offload_optimizer_nvme_path",
            own=_OWN_PATH,
            asked=Wording("Directory on the drive, for parameters?", _FAST_DRIVE),
        ),
    ] = None
    zero3_init_flag: Annotated[
        Flag,
        Setting(
            "Construct the model sharded (stage 3).",
            ZERO,
            comment="construct the model sharded (stage 3)",
            asked=Wording(
                "Construct the model sharded?",
                "For models that no process can hold: from_pretrained and from_config then build them without memory.",
            ),
        ),
    ] = False
    zero3_save_16bit_model: Annotated[
        Flag,
        Setting(
            "Save consolidated 16-bit weights (stage 3).",
            ZERO,
            comment="save consolidated 16-bit weights (stage 3)",
            asked=Wording(
                "Save whole 16-bit weights under stage 3?", "The saved model can then be loaded without shardwise."
            ),
        ),
    ] = False
    deepspeed_config_file: Annotated[
        OptionalText,
        Setting(
            "Take the ZeRO settings from this DeepSpeed JSON file.",
            ZERO,
            "FILE",
            comment="a DeepSpeed JSON file to take the ZeRO settings from",
            own="a path of this machine; what the file says is compared key by key",
            asked=Wording("Path of the JSON file?", "As seen from where you launch, or from this YAML file."),
        ),
    ] = None
    deepspeed_moe_layer_cls_names: Annotated[
        OptionalNames, Setting("MoE block classes, with commas.", ZERO, own="has no effect")
    ] = None
    deepspeed_multinode_launcher: Annotated[
        OptionalText, Setting("Only standard is supported.", ZERO, "standard", own="has no effect on running processes")
    ] = None
    deepspeed_hostfile: Annotated[
        None, absent("a hostfile is read where it is typed: `shardwise launch --hostfile FILE`")
    ] = None
    deepspeed_exclusion_filter: Annotated[None, absent("leave hosts out of the file of --hostfile")] = None
    deepspeed_inclusion_filter: Annotated[None, absent("leave hosts out of the file of --hostfile")] = None


class LossScaleConfig(Section):
    """The loss scale of fp16. `static` switches the dynamic scale off."""

    static: Annotated[float | None, optional(number(0, above=True), "dynamic", 0, 0.0)] = None
    initial: Annotated[float, number(1)] = 2.0**16
    growth_interval: Annotated[int, whole_number(1)] = 2000
    hysteresis: Annotated[int, one_of(1, refused=_HYSTERESIS)] = 1
    minimum: Annotated[float, number(0, above=True)] = 1.0


class EngineConfig(Section):
    """Settings that the guide's schema has no key for. The engine takes the whole section (`ShardedModel`'s `options`).

    units:          block classes or module paths; None finds them.
    whole_adapters: True keeps trainable weights whole on the gpu at stage 3, False shards them, "auto" keeps those that are at
                    most 1/16 of what is frozen in their unit.
    gather_with:    "copy_engine" lets ranks of one machine copy shards from each other, "nccl" gathers with its kernels, "auto"
                    takes the first where it is possible.
    gather_dtype:   "int8" sends 16-bit weights between machines as 8-bit codes with a scale for each 256, in passes alone.
    optimizer_state_dtype: in which moments rest that visit the device for their step; "int8" has a scale for each 256 codes.
    offload_param_source: "model_files" reads frozen weights that rest on a drive in the files that they were loaded from.
    generation_memory_budget: bytes of gathered weights while generating; "auto" for what is free, None for the fewest.
    optimizer, scheduler: what `prepare` builds for a DummyOptim and a DummyScheduler, as a DeepSpeed JSON says it.
    """

    reduce_dtype: Annotated[
        str,
        one_of("fp32", "bf16", "fp16"),
        Kind(lambda v: "fp32" if v == "auto" else v),
        Setting("Number format in which gradients are summed over ranks.", ENGINE, "fp32|bf16|fp16|auto"),
    ] = "fp32"
    prefetch_units: Annotated[int, whole_number(0), Setting("How many units are gathered ahead.", ENGINE)] = 1
    gather_with: Annotated[
        Literal["auto", "nccl", "copy_engine"],
        one_of("auto", "nccl", "copy_engine"),
        Setting("Who brings the shards of weights together.", ENGINE, "auto|copy_engine|nccl", after="wait_warning_s"),
    ] = "auto"
    gather_dtype: Annotated[
        Literal["none", "int8"],
        one_of("none", "int8"),
        Setting("How weights of passes travel between machines (stage 3).", ENGINE, "none|int8", after="gather_with"),
    ] = "none"
    optimizer_state_dtype: Annotated[
        Literal["fp32", "bf16", "int8"],
        one_of("fp32", "bf16", "int8"),
        Setting(
            "Number format in which the optimizer's moments rest when they are offloaded.",
            ENGINE,
            "fp32|bf16|int8",
            after="gather_dtype",
            comment="number format in which offloaded moments rest: fp32, bf16 or int8",
            asked=Wording(
                "In which numbers do offloaded moments rest?",
                "A step of AdamW copies 28 bytes for each weight with fp32, 20 with bf16, 16 with int8, and gives other "
                "numbers with the last two.",
                {"fp32": "fp32  exact", "bf16": "bf16  half the memory", "int8": "int8  a quarter"},
            ),
        ),
    ] = "fp32"
    offload_param_source: Annotated[
        Literal["copy", "model_files"],
        one_of("copy", "model_files"),
        Setting(
            "Frozen weights on a drive: a copy there, or the files that the model was loaded from.",
            ENGINE,
            "copy|model_files",
            after="optimizer_state_dtype",
        ),
    ] = "copy"
    units: Annotated[
        OptionalNames, Setting("Block classes or module paths to shard as units, with commas.", ENGINE)
    ] = None
    whole_adapters: Annotated[
        bool | Literal["auto"], _AUTO_OR_FLAG, Setting("Keep PEFT adapters whole on every rank (stage 3).", ENGINE)
    ] = "auto"
    gpu_memory_budget: Annotated[
        int | str | None,
        _BUDGET,
        Setting(
            "GPU memory for each process; what is offloaded stays on the GPU as far as it fits.",
            ENGINE,
            "auto|24GB",
            after="scheduler_steps_per_process",
            comment="GPU memory for each process: none, auto or a size such as 24GB",
            asked=Wording(
                "How much GPU memory may each process fill?",
                "auto or a size such as 24GB: what is offloaded or gathered stays on the GPU as far as it fits. A 1B model "
                "with all of it on the host took 111 ms a step with auto, and 558 without.",
            ),
        ),
    ] = None
    generation_memory_budget: Annotated[
        int | str | None,
        _BUDGET,
        Setting(
            "GPU memory for weights that stay gathered while generating; auto: what is free.",
            ENGINE,
            "auto|none|24GB",
            after="gpu_memory_budget",
        ),
    ] = "auto"
    scheduler_steps_per_process: Annotated[
        Flag, Setting("Step schedulers once for each process, as accelerate does.", ENGINE, in_json=False)
    ] = True
    collective_timeout_s: Annotated[
        float,
        number(0, above=True),
        Setting(
            "Seconds that a rank waits for the others before it raises.",
            ENGINE,
            "SECONDS",
            after="generation_memory_budget",
            in_json=False,
        ),
    ] = 600.0
    wait_warning_s: Annotated[
        float,
        number(0),
        Setting(
            "Seconds of a wait after which a line says for which rank; 0: never.",
            ENGINE,
            "SECONDS",
            after="collective_timeout_s",
            in_json=False,
        ),
    ] = 60.0
    threads_per_rank: Annotated[
        OptionalCount,
        Setting(
            "CPU threads of each process. Default: cores / processes.",
            PROCESSES,
            also=("num_cpu_threads_per_process",),
            own="the cores of this machine",
            in_json=False,
        ),
    ] = None
    loss_chunk_tokens: Annotated[
        OptionalCount, Setting("Compute the loss of so many tokens at a time, without all logits.", ENGINE)
    ] = None
    loss_keeps_logits: Annotated[
        Flag, Setting("With loss_chunk_tokens: logits are made once and stay, in 16 bit.", ENGINE, switch=True)
    ] = False
    fast_lora: Annotated[
        bool | str,
        _AUTO_OR_FLAG,
        Setting("PEFT's LoRA layers with fewer passes; auto: off.", ENGINE, after="activation_checkpointing"),
    ] = "auto"
    activation_checkpointing: Annotated[
        str,
        one_of("none", "all", "auto"),
        Kind(none_or_all),
        Setting(
            "Recompute blocks in the backward; auto: as few as the memory budget needs.",
            ENGINE,
            comment="blocks recomputed in the backward: none, all or auto",
            asked=Wording(
                "Recompute activations in the backward?",
                "Memory for time: of all blocks one block's activations stay. For 8B with LoRA, compiled, all took 341 ms a "
                "step and 20 GB, auto 255 ms and 37 GB.",
                {
                    "none": "none  unless the script does",
                    "all": "all  every block",
                    "auto": "auto  as few as memory needs",
                },
            ),
        ),
    ] = "none"
    max_restarts: Annotated[
        int, whole_number(0), Setting("Start all ranks again so many times after a failure.", PROCESSES, in_json=False)
    ] = 0
    restart_processes: Annotated[
        OptionalCount,
        Setting("Processes after a restart. Default: as before, or the GPUs left.", PROCESSES, in_json=False),
    ] = None
    loss_scale: Annotated[LossScaleConfig, Setting(in_json=False)] = LossScaleConfig()
    train_batch_size: Annotated[
        OptionalCount, Setting("Expected global batch size; checked in prepare.", ENGINE, in_json=False)
    ] = None
    micro_batch_size: Annotated[
        OptionalCount, Setting("Expected batch size of one process; checked in prepare.", ENGINE, in_json=False)
    ] = None
    optimizer: Annotated[dict[str, Any] | None, optional(Kind(described), "none"), Setting(in_json=False)] = None
    scheduler: Annotated[dict[str, Any] | None, optional(Kind(described), "none"), Setting(in_json=False)] = None
