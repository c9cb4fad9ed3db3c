"""The configuration of a run as frozen models: every key of the guide's YAML, its type, default and allowed values.

`Config` is the file's top level, `ZeroConfig` its `deepspeed_config`, `EngineConfig` the settings that only shardwise
has (`shardwise_config`, left out of a written file while all of it is default, so that accelerate can read the file
too). Which settings go together is told in `rules.py`. A key that asks for something that is not done here is refused
with the reason; none is accepted and then ignored. This file reads no file and imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from ..errors import ConfigError
from ..files.documents import parse_json
from .compiling import BACKENDS, CompileConfig, section, word
from .environment import RankEnvironment
from .fields import (
    NO,
    YES,
    Flag,
    OptionalCount,
    OptionalNames,
    OptionalText,
    Text,
    absent,
    number,
    one_of,
    optional,
    whole_number,
    wrong,
)

ENVIRONMENT_KEY = "SHARDWISE_CONFIG"

_FP8 = "fp8 is not supported; take bf16 or fp16"
_OTHER_TYPES = {
    name: f"{name} is not what shardwise runs; take NO, MULTI_CPU, MULTI_GPU or DEEPSPEED (ZeRO)"
    for name in (
        *("FSDP", "MEGATRON_LM", "TPU", "XLA", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA"),
        *("MULTI_MUSA", "MULTI_HPU", "MULTI_NEURON"),
    )
}


_HYSTERESIS = dict.fromkeys(range(2, 100), "the scale falls at every overflow; only 1 is taken")
# 0 is DeepSpeed's way to say "no clipping". There is no hidden 1.0.
_NO_CLIPPING = ("none", "auto", "no", 0, 0.0, False)


def _recomputed(value: Any) -> Any:
    """YAML's false and true are none and all."""
    return {False: "none", True: "all"}[value] if isinstance(value, bool) else "none" if value is None else value


def _auto_or_flag(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text == "auto":
        return "auto"
    if text in YES | NO:
        return text in YES
    raise wrong(f"{value!r} is not one of auto, true, false")


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?I?B?)")


def _budget(value: Any) -> int | str:
    """Bytes, from a number or a text such as 24GB (10^9) or 24GiB (2^30); or auto."""
    text = str(value).strip().upper()
    if text == "AUTO":
        return "auto"
    match = _SIZE.fullmatch(text)
    if isinstance(value, bool) or match is None:
        raise wrong(f"{value!r} is not auto or a size such as 24GB")
    unit = match[2].removesuffix("B")
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit.removesuffix("I") or " "))


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, protected_namespaces=())


class ZeroConfig(_Model):
    """What is sharded and where it rests. A value of None means: not said, so the script or the default decides."""

    zero_stage: Annotated[int, one_of(0, 1, 2, 3)] = 2
    gradient_accumulation_steps: OptionalCount = None
    gradient_clipping: Annotated[float | None, optional(number(0, above=True), *_NO_CLIPPING)] = None
    offload_optimizer_device: Annotated[str, one_of("none", "cpu", "nvme")] = "none"
    offload_param_device: Annotated[str, one_of("none", "cpu", "nvme")] = "none"
    offload_optimizer_nvme_path: OptionalText = None
    offload_param_nvme_path: OptionalText = None
    zero3_init_flag: Flag = False
    zero3_save_16bit_model: Flag = False
    deepspeed_config_file: OptionalText = None
    deepspeed_moe_layer_cls_names: OptionalNames = None
    deepspeed_multinode_launcher: OptionalText = None
    deepspeed_hostfile: Annotated[
        None, absent("hostfiles are not read; run `shardwise launch` on every machine with its --machine_rank")
    ] = None
    deepspeed_exclusion_filter: Annotated[None, absent("there is no hostfile to filter; use gpu_ids")] = None
    deepspeed_inclusion_filter: Annotated[None, absent("there is no hostfile to filter; use gpu_ids")] = None


class LossScaleConfig(_Model):
    """The loss scale of fp16. `static` switches the dynamic scale off."""

    static: Annotated[float | None, optional(number(0, above=True), "dynamic", 0, 0.0)] = None
    initial: Annotated[float, number(1)] = 2.0**16
    growth_interval: Annotated[int, whole_number(1)] = 2000
    hysteresis: Annotated[int, one_of(1, refused=_HYSTERESIS)] = 1
    minimum: Annotated[float, number(0, above=True)] = 1.0


class EngineConfig(_Model):
    """Settings that the guide's schema has no key for."""

    reduce_dtype: Annotated[
        str, one_of("fp32", "bf16", "fp16"), BeforeValidator(lambda v: "fp32" if v == "auto" else v)
    ] = "fp32"
    prefetch_units: Annotated[int, whole_number(0)] = 1
    gather_with: Annotated[str, one_of("auto", "nccl", "copy_engine")] = "auto"
    units: OptionalNames = None
    whole_adapters: Annotated[bool | str, BeforeValidator(_auto_or_flag)] = "auto"
    gpu_memory_budget: Annotated[int | str | None, optional(BeforeValidator(_budget), "none", "")] = None
    generation_memory_budget: Annotated[int | str | None, optional(BeforeValidator(_budget), "none", "")] = "auto"
    scheduler_steps_per_process: Flag = True
    collective_timeout_s: Annotated[float, number(0, above=True)] = 600.0
    threads_per_rank: OptionalCount = None
    loss_chunk_tokens: OptionalCount = None
    loss_keeps_logits: Flag = False
    fast_lora: Annotated[bool | str, BeforeValidator(_auto_or_flag)] = "auto"
    activation_checkpointing: Annotated[str, one_of("none", "all", "auto"), BeforeValidator(_recomputed)] = "none"
    max_restarts: Annotated[int, whole_number(0)] = 0
    restart_processes: OptionalCount = None
    loss_scale: LossScaleConfig = LossScaleConfig()
    train_batch_size: OptionalCount = None
    micro_batch_size: OptionalCount = None


class Config(_Model):
    """One run: what `shardwise launch` resolved, or what the keywords of an Accelerator say."""

    compute_environment: Annotated[
        str,
        one_of(
            "LOCAL_MACHINE",
            refused={"AMAZON_SAGEMAKER": "AMAZON_SAGEMAKER is not supported; take LOCAL_MACHINE"},
            case=str.upper,
        ),
    ] = "LOCAL_MACHINE"
    distributed_type: Annotated[
        str,
        one_of("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED", refused=_OTHER_TYPES, case=str.upper),
        BeforeValidator(lambda v: "NO" if v is False else v),
    ] = "NO"
    deepspeed_config: ZeroConfig | None = None
    shardwise_config: EngineConfig = EngineConfig()
    mixed_precision: Annotated[
        str, one_of("no", "fp16", "bf16", refused={"fp8": _FP8}), BeforeValidator(lambda v: "no" if v is None else v)
    ] = "no"
    num_processes: Annotated[int | None, optional(whole_number(1), -1, "none", "auto")] = None
    num_machines: Annotated[int, whole_number(1)] = 1
    machine_rank: Annotated[int, whole_number(0)] = 0
    main_process_ip: OptionalText = None
    main_process_port: Annotated[int | None, optional(whole_number(0, 65535))] = None
    rdzv_backend: Annotated[str, one_of("static", "c10d")] = "static"
    same_network: Flag = True
    main_training_function: Text = "main"
    gpu_ids: OptionalText = None
    use_cpu: Flag = False
    debug: Flag = False
    enable_cpu_affinity: Flag = False
    dynamo_config: Annotated[CompileConfig, BeforeValidator(section)] = CompileConfig()
    dynamo_backend: Annotated[str, one_of(*BACKENDS), BeforeValidator(word)] = "no"
    downcast_bf16: Annotated[None, absent("downcast_bf16 is for TPUs, which are not supported; take 'no'")] = None
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

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: Callable[[tuple[str, ...]], str] | None = None) -> Config:
        """A Config of plain `values`, or one ConfigError that lists everything wrong, one line each.

        where: what to put before the text of a problem with a key, such as `run.yaml:12: zero_stage`; by default the
               dotted key.
        """
        from .rules import check

        config, problems = check(values)
        if config is None:
            name = where or ".".join
            raise ConfigError("\n".join(f"{name(problem.key)}: {problem.text}" for problem in problems))
        return config

    def notes(self) -> list[str]:
        """Settings that are accepted but have no effect in this combination, and why: one sentence each."""
        from .rules import notes

        return notes(self)

    def to_values(self) -> dict[str, Any]:
        """What differs from the defaults, as plain JSON-able values: `Config.checked(c.to_values()) == c`."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.deepspeed_config is not None:
            values.setdefault("deepspeed_config", {})
            values["deepspeed_config"]["zero_stage"] = self.deepspeed_config.zero_stage
        return values

    def to_environment(self) -> dict[str, str]:
        """The variables through which a launched process finds this Config again (`from_environment`)."""
        variables = {ENVIRONMENT_KEY: json.dumps(self.to_values(), sort_keys=True)}
        if self.debug:
            # Every collective then compares shapes over the ranks first: what `debug: true` promises.
            variables["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
        return variables

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """The launcher's Config; the default one (no sharding) in a process that `shardwise launch` did not start.

        Raises ConfigError if the variable holds something else than a Config.
        """
        text = (os.environ if environ is None else environ).get(ENVIRONMENT_KEY)
        if not text:
            return cls()
        values = parse_json(text, f"{ENVIRONMENT_KEY} in the environment (unset it)", ConfigError, infinities=True)
        if not isinstance(values, dict):
            raise ConfigError(f"{ENVIRONMENT_KEY} in the environment is not a JSON object. Unset it.")
        return cls.checked(values, lambda key: f"{ENVIRONMENT_KEY} in the environment: {'.'.join(key)}")

    def merged(self, *, on_note: Callable[[str], None] | None = None, **keywords: Any) -> Config:
        """This Config with the keywords of an Accelerator over it; a keyword of None was not given.

        Any key of Config, ZeroConfig or EngineConfig is a keyword, and `cpu` is `use_cpu` (False there means: not
        said). A keyword wins, except that `gradient_accumulation_steps` of the file or launcher wins over the
        script's, as it does in accelerate; that is said once through `on_note` (default: a log line on rank 0).
        `zero_stage` turns the run into a ZeRO run. Raises ConfigError, also for an unknown keyword.
        """
        say = on_note or _log_on_first_rank
        given = {key: value for key, value in keywords.items() if value is not None}
        if given.pop("cpu", False):
            given["use_cpu"] = True
        steps = given.get("gradient_accumulation_steps")
        said = self.zero.gradient_accumulation_steps
        if steps is not None and said is not None:
            # 1 is the Accelerator's default: it does not show that the script asked for it.
            if steps not in (said, 1, "auto"):
                say(
                    f"gradient_accumulation_steps: the configuration's {said} is used, not the script's {steps}. "
                    "Remove it from one of the two, or start with --gradient_accumulation_steps auto."
                )
            del given["gradient_accumulation_steps"]
        values = self.to_values()
        for key, value in given.items():
            if key in Config.model_fields:
                values[key] = value
            elif key in ZeroConfig.model_fields:
                values.setdefault("deepspeed_config", {})[key] = value
            elif key in EngineConfig.model_fields:
                values.setdefault("shardwise_config", {})[key] = value
            else:
                values[key] = value  # the schema's own error names the nearest key
        if "deepspeed_config" in values and self.distributed_type != "DEEPSPEED":
            values["deepspeed_config"].setdefault("zero_stage", 0)
            if "zero_stage" in given:
                values["distributed_type"] = given.get("distributed_type", "DEEPSPEED")
        if values.get("use_cpu") and values.get("distributed_type") == "MULTI_GPU":
            values["distributed_type"] = "MULTI_CPU"
        return Config.checked(values, lambda key: f"Accelerator: {key[-1]}")

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


def _log_on_first_rank(text: str) -> None:
    if RankEnvironment.read().rank == 0:
        logging.getLogger("shardwise").warning(text)
