"""The configuration of a run as frozen models: every key of the guide's YAML, its type, default and allowed values.

`Config` is the file's top level, `ZeroConfig` its `deepspeed_config`, `EngineConfig` the settings that only shardwise
has (`shardwise_config`, left out of a written file while all of it is default, so that accelerate can read the file
too). Which settings go together is told in `rules.py`; `check.py` makes a Config of plain values. A key that asks for
something that is not done here is refused with the reason; none is accepted and then ignored. This file reads no file and
imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, model_validator
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .compiling import BACKENDS, CompileConfig, section, word
from .fields import Flag, Kind, OptionalText, Text, absent, one_of, optional, whole_number
from .sections import EngineConfig, LossScaleConfig, Section, ZeroConfig
from .setting import MACHINES, PROCESSES, TRAINING, Setting, Wording

__all__ = ["ENVIRONMENT_KEY", "SECTIONS", "Config", "EngineConfig", "Key", "LossScaleConfig", "ZeroConfig"]

ENVIRONMENT_KEY = "SHARDWISE_CONFIG"
Key = tuple[str, ...]

_FP8 = "fp8 is not supported; take bf16 or fp16"
_OTHER_TYPES = {
    name: f"{name} is not what shardwise runs; take NO, MULTI_CPU, MULTI_GPU or DEEPSPEED (ZeRO)"
    for name in (
        *("FSDP", "MEGATRON_LM", "TPU", "XLA", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA"),
        *("MULTI_MUSA", "MULTI_HPU", "MULTI_NEURON"),
    )
}
_MET = "the ranks have met when this is compared"


class Config(Section):
    """One run: what `shardwise launch` resolved, or what the keywords of an Accelerator say."""

    compute_environment: Annotated[
        str,
        one_of(
            "LOCAL_MACHINE",
            refused={"AMAZON_SAGEMAKER": "AMAZON_SAGEMAKER is not supported; take LOCAL_MACHINE"},
            case=str.upper,
        ),
        Setting(comment="this machine, not a cloud service", own="has one value"),
    ] = "LOCAL_MACHINE"
    distributed_type: Annotated[
        str,
        one_of("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", refused=_OTHER_TYPES, case=str.upper),
        Kind(lambda v: "NO" if v is False else v),
        Setting(
            "Kind of run; follows from the other flags where not given.",
            PROCESSES,
            "TYPE",
            comment="DEEPSPEED: ZeRO; MULTI_GPU and MULTI_CPU: whole copies; NO: one process",
        ),
    ] = "NO"
    deepspeed_config: ZeroConfig | None = None
    shardwise_config: EngineConfig = EngineConfig()
    mixed_precision: Annotated[
        str,
        one_of("no", "fp16", "bf16", refused={"fp8": _FP8}),
        Kind(lambda v: "no" if v is None else v),
        Setting(
            "What the model computes in.",
            TRAINING,
            "no|bf16|fp16",
            comment="no, bf16 or fp16",
            asked=Wording(
                "Mixed precision?",
                "What the model computes in. 16 bits take half the memory of activations and run on tensor cores; bf16 needs "
                "no loss scale, fp16 is for older GPUs.",
                {"no": "no  (fp32)", "bf16": "bf16", "fp16": "fp16"},
            ),
        ),
    ] = "no"
    num_processes: Annotated[
        int | None,
        optional(whole_number(1), -1, "none", "auto"),
        Setting(
            "Processes in total, over all machines. Default: one for each GPU.",
            PROCESSES,
            comment="processes in total, over all machines",
            asked=Wording("How many processes in total?", "One for each GPU, over all machines."),
        ),
    ] = None
    num_machines: Annotated[
        int,
        whole_number(1),
        Setting(
            "How many machines.",
            MACHINES,
            comment="how many machines",
            asked=Wording("How many machines?", "1, unless the run spans several hosts."),
        ),
    ] = 1
    machine_rank: Annotated[
        int,
        whole_number(0),
        Setting(
            "Which of them this is, from 0.",
            MACHINES,
            comment="which machine this is, from 0",
            own="tells the machines apart",
            asked=Wording("Which of them is this one?", "From 0; machine 0 is where the others connect to."),
        ),
    ] = 0
    main_process_ip: Annotated[
        OptionalText,
        Setting(
            "Address of machine 0.",
            MACHINES,
            "HOST",
            comment="address of machine 0",
            own="machines may reach machine 0 by different names",
            asked=Wording("Address of machine 0?", "An IP address or host name that every machine can reach."),
        ),
    ] = None
    main_process_port: Annotated[
        int | None,
        optional(whole_number(0, 65535)),
        Setting(
            "A free port of machine 0; on one machine a free one is found.",
            MACHINES,
            "PORT",
            comment="a free port of machine 0",
            own=_MET,
            asked=Wording("Port on machine 0?", "A port that is free there and open to the other machines."),
        ),
    ] = None
    rdzv_backend: Annotated[
        str,
        one_of("static", "c10d"),
        Setting(
            "How the machines find each other.",
            MACHINES,
            comment="how machines find each other: static or c10d",
            own=_MET,
            asked=Wording(
                "How do the machines find each other?",
                "static: ranks follow machine_rank. c10d: they are given out as machines arrive.",
                {"static": "static", "c10d": "c10d"},
            ),
        ),
    ] = "static"
    same_network: Annotated[
        Flag,
        Setting(
            "All machines are in one network.",
            MACHINES,
            switch=True,
            comment="are all machines in one network?",
            own="has no effect on the run",
            asked=Wording(
                "Are all machines in one network?", "No for hosts of different networks, such as two clouds."
            ),
        ),
    ] = True
    main_training_function: Annotated[Text, Setting(comment="TPU only", own="has no effect")] = "main"
    gpu_ids: Annotated[
        OptionalText,
        Setting(
            "GPUs of this machine to use, such as 0,1.",
            PROCESSES,
            "IDS|all",
            after="use_cpu",
            comment="GPUs of this machine to use",
            own="the GPUs of this machine",
            asked=Wording("Which GPUs of this machine?", "all, or numbers with commas such as 0,1."),
        ),
    ] = None
    use_cpu: Annotated[
        Flag,
        Setting(
            "Train on the CPU (gloo), even where there are GPUs.",
            PROCESSES,
            switch=True,
            also=("cpu",),
            comment="train on the CPU even where there are GPUs",
            asked=Wording(
                "What will you train on?",
                "On GPUs the ranks talk through NCCL, on CPUs through gloo.",
                {False: "GPUs", True: "CPU only"},
            ),
        ),
    ] = False
    debug: Annotated[
        Flag,
        Setting(
            "Check every collective over the ranks first (slower).",
            PROCESSES,
            switch=True,
            after="restart_processes",
            comment="check every collective over the ranks (slower)",
            asked=Wording(
                "Check every collective over the ranks while running?", "Finds ranks that went different ways; slower."
            ),
        ),
    ] = False
    enable_cpu_affinity: Annotated[
        Flag,
        Setting(
            "Keep each process to cores of its own.",
            PROCESSES,
            switch=True,
            after="debug",
            own="the cores of this machine",
        ),
    ] = False
    dynamo_config: Annotated[CompileConfig, Kind(section)] = CompileConfig()
    dynamo_backend: Annotated[
        str,
        one_of(*BACKENDS),
        Kind(word),
        Setting(
            "Compile the blocks of the model with torch.compile.",
            TRAINING,
            after="gradient_clipping",
            comment="torch.compile of each block: no or inductor",
            asked=Wording(
                "Compile the blocks of the model?",
                "For 8B with LoRA on two GPUs 348 ms a step in place of 493, and 12.8 GB in place of 17.0. The first step "
                "compiles, and so does a second length of sequences.",
                {"no": "no", "inductor": "inductor  torch.compile"},
            ),
            own="the older spelling of dynamo_config.dynamo_backend, which is compared as it is in force",
        ),
    ] = "no"
    downcast_bf16: Annotated[
        None,
        absent("downcast_bf16 is for TPUs, which are not supported; take 'no'"),
        Setting(comment="TPU only", own="is empty"),
    ] = None
    fsdp_config: Annotated[None, absent("FSDP is not what shardwise runs; describe the run in deepspeed_config")] = None
    megatron_lm_config: Annotated[None, absent("Megatron-LM is not what shardwise runs; remove this section")] = None
    fp8_config: Annotated[None, absent(_FP8)] = None
    mpirun_config: Annotated[None, absent("processes are not started through mpirun; remove this section")] = None
    parallelism_config: Annotated[
        None, absent("tensor, context and pipeline parallelism are not supported; remove this section")
    ] = None
    tpu_name: Annotated[None, absent("TPUs are not supported")] = None
    tpu_zone: Annotated[None, absent("TPUs are not supported")] = None
    tpu_use_cluster: Annotated[None, absent("TPUs are not supported")] = None
    tpu_use_sudo: Annotated[None, absent("TPUs are not supported")] = None
    tpu_vm: Annotated[None, absent("TPUs are not supported")] = None
    tpu_env: Annotated[None, absent("TPUs are not supported")] = None
    commands: Annotated[None, absent("commands are for TPU pods, which are not supported")] = None
    command_file: Annotated[None, absent("command files are for TPU pods, which are not supported")] = None

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_absent(cls, values: Any) -> Any:
        """`deepspeed_config: {}` and `shardwise_config:` (null) say nothing."""
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if not (key in ("deepspeed_config", "shardwise_config") and (value is None or value == {}))
        }

    @property
    def zero(self) -> ZeroConfig:
        """What the engine does: the deepspeed_config, which is of stage 0 unless distributed_type is DEEPSPEED."""
        default = ZeroConfig() if self.distributed_type == "DEEPSPEED" else ZeroConfig(zero_stage=0)
        return self.deepspeed_config or default

    @property
    def engine(self) -> EngineConfig:
        return self.shardwise_config

    @property
    def compiling(self) -> CompileConfig | None:
        """How blocks are compiled, or None if they are not. The single word wins: a keyword or flag says it."""
        if self.dynamo_backend != "no":
            return self.dynamo_config.model_copy(update={"dynamo_backend": self.dynamo_backend})
        return self.dynamo_config if self.dynamo_config.dynamo_backend != "no" else None

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.zero.gradient_accumulation_steps or 1

    def to_values(self) -> dict[str, Any]:
        """What differs from the defaults, as plain JSON-able values: `checked(c.to_values()) == c`."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.deepspeed_config is not None:
            values.setdefault("deepspeed_config", {})
            values["deepspeed_config"]["zero_stage"] = self.deepspeed_config.zero_stage
        return values

    def to_environment(self) -> dict[str, str]:
        """The variables through which a launched process finds this Config again (`check.from_environment`)."""
        variables = {ENVIRONMENT_KEY: json.dumps(self.to_values(), sort_keys=True)}
        if self.debug:
            # Every collective then compares shapes over the ranks first: what `debug: true` promises.
            variables["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        return variables

    def check_batch_sizes(self, micro_batch_size: int, world_size: int) -> None:
        """Compare the data loader with the sizes that a DeepSpeed file promised; ConfigError where they differ."""
        expected, total = self.engine.micro_batch_size, self.engine.train_batch_size
        if expected is not None and expected != micro_batch_size:
            raise ConfigError(
                f"train_micro_batch_size_per_gpu is {expected}, but the data loader has batches of {micro_batch_size}. "
                "Make them equal, or write 'auto'."
            )
        steps = self.gradient_accumulation_steps
        if total is not None and total != micro_batch_size * steps * world_size:
            raise ConfigError(
                f"train_batch_size is {total}, but {micro_batch_size} per process x {steps} accumulation step(s) x "
                f"{world_size} process(es) is {micro_batch_size * steps * world_size}. Make them equal or write 'auto'."
            )


# Every section by the key that it stands under, the file itself first.
SECTIONS: dict[Key, type[BaseModel]] = {
    (): Config,
    ("deepspeed_config",): ZeroConfig,
    ("shardwise_config",): EngineConfig,
    ("shardwise_config", "loss_scale"): LossScaleConfig,
    ("dynamo_config",): CompileConfig,
}


def every_setting(above: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Every key that has none below it, with its field: those of the file itself first."""
    rows = [((*above, name), info) for name, info in SECTIONS[above].model_fields.items()]
    if not above:
        rows.sort(key=lambda row: row[0] in SECTIONS)
    for key, info in rows:
        yield from every_setting(key) if key in SECTIONS else [(key, info)]


def key_of(name: str) -> Key:
    """Where the setting of a keyword or a flag lives: ("deepspeed_config", "zero_stage") for zero_stage."""
    for above in ((), ("deepspeed_config",), ("shardwise_config",)):
        if name in SECTIONS[above].model_fields:
            return (*above, name)
    raise KeyError(name)


def value_of(config: Config, name: str) -> Any:
    """What `config` has for the setting of this name; of a section that is not there, the default in force."""
    *above, _ = key_of(name)
    sections = {"deepspeed_config": config.zero, "shardwise_config": config.engine}
    return getattr(sections[above[0]] if above else config, name)
