"""A DeepSpeed configuration, read as the settings of an engine.

    a path, a dict, or urlsafe base64 of JSON   ->   Settings: shardwise's Config, plan, precision and loss scale, and what
                                                     DeepSpeed alone has: batch sizes, a default of clipping

A value that is still "auto" says nothing, as in DeepSpeed: accelerate and Trainer fill in theirs before. Below the settings
of the file lie those of the launcher, so that `shardwise_config` of a YAML counts for these programs too; over them the
file's own section "shardwise". What a key means is `config/deepspeed_json.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from ...config.check import checked, from_environment
from ...config.deepspeed_json import LOSS_SCALE_WINDOW, DeepSpeedFile, read_deepspeed_values
from ...config.schema import Config, EngineConfig
from ...config.setting import setting_of
from ...errors import ConfigError
from ...front.settings import loss_scaler
from ...plan.plan import Plan
from ...plan.precision import LossScaler, Precision
from ...run.deepspeed_words import load

# DeepSpeed's, where its file does not say.
CLIPPING = 1.0
# The keys of "shardwise" in the JSON: those of EngineConfig that act in such a program; the compiler comes to them.
_OWN = tuple(name for name, info in EngineConfig.model_fields.items() if setting_of(info).in_json)
_TAG_VALIDATION = ("ignore", "warn", "fail")  # every rank gives the same tag here in any case
_REDUCTION = "gradient_allreduce_op"
_MANAGED = "managed_gradient_accumulation"
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class OffloadDeviceEnum(StrEnum):
    """The devices of `offload_optimizer` and `offload_param`, which a dictionary may name by these too."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(frozen=True)
class Settings:
    """What an engine is made by.

    raw:      the configuration as it was given: the engine's `config`.
    config:   shardwise's. plan, precision: those of it.
    batch:    train_batch_size, the micro-batch of a process, and micro-batches per step; None where nothing says so.
    sums:     gradients are added over the ranks, not averaged.
    managed:  False where every `step` is a step, however many backwards there were.
    clipping: of the global norm; 0 clips nothing. clips_unsaid: because the file says nothing.
    notes:    what is taken without effect, in sentences.
    """

    raw: dict[str, Any]
    config: Config
    plan: Plan
    precision: Precision
    batch: tuple[int | None, int | None, int]
    managed: bool
    sums: bool
    clipping: float
    clips_unsaid: bool
    notes: list[str]

    @property
    def steps(self) -> int:
        """Micro-batches per step."""
        return self.batch[2]

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype that the model computes in; None for its own."""
        return self.precision.compute

    @property
    def stage(self) -> int:
        return self.config.zero.zero_stage

    def scaler(self) -> LossScaler:
        """A loss scale of these settings, at its beginning."""
        return loss_scaler(self.config, self.precision, None)

    @property
    def gathers_on_save(self) -> bool:
        return self.config.zero.zero3_save_16bit_model


def read(source: Any, world_size: int, *, base: Config | None = None) -> Settings:
    """The settings of a configuration. base: below it, the launcher's. Raises ConfigError with a line for each thing wrong."""
    raw, name = load(source)
    said = unfolded(without_auto(raw))
    base = from_environment() if base is None else base
    found = read_deepspeed_values(said, name, aside=("optimizer", "scheduler", "shardwise", _MANAGED, _REDUCTION))
    if not isinstance(said.get(_MANAGED, True), bool):
        found.problems.append(f"{name}: {_MANAGED}: {said[_MANAGED]!r} is neither true nor false")
    reduction = str(said.get(_REDUCTION, "mean")).lower()
    if reduction not in ("mean", "sum"):
        found.problems.append(f"{name}: {_REDUCTION}: {said[_REDUCTION]!r} is neither mean nor sum")
    mode = (said.get("checkpoint") or {}).get("tag_validation", "warn")
    if str(mode).lower() not in _TAG_VALIDATION:
        found.problems.append(f"{name}: checkpoint.tag_validation: {mode!r} is none of {', '.join(_TAG_VALIDATION)}")
    if found.problems:
        raise ConfigError("\n".join(found.problems))
    values = _merged(base, found, raw.get("shardwise") or {}, name)  # where "auto" is a setting
    config = checked(values, lambda key: found.places.get(key) or f"{name}: {'.'.join(key)}")
    precision = Precision.named(config.mixed_precision, config.engine.reduce_dtype)
    zero = config.zero
    clipping = said.get("gradient_clipping")
    return Settings(
        raw=raw,
        config=config,
        plan=Plan.from_stage(
            zero.zero_stage,
            offload_optimizer=zero.offload_optimizer_device,
            offload_param=zero.offload_param_device,
        ),
        precision=precision,
        batch=batch_sizes(said, world_size, name),
        sums=reduction == "sum",
        managed=said.get(_MANAGED, True),
        clipping=CLIPPING if clipping is None else float(clipping),
        clips_unsaid=clipping is None,
        notes=[note for note in found.notes if "gradient_clipping" not in note],
    )


def without_auto(values: Any) -> Any:
    """A copy without what is still "auto"."""
    if isinstance(values, dict):
        return {key: without_auto(value) for key, value in values.items() if value != "auto" or key == "type"}
    return copy.copy(values)


def unfolded(values: dict[str, Any]) -> dict[str, Any]:
    """With `zero_optimization.reduce_bucket_size` at the top level, which libraries write, in its section."""
    found = {key: value for key, value in values.items() if "." not in key}
    for key, value in values.items():
        section, _, name = key.partition(".")
        inner = found.setdefault(section, {}) if name else None
        if isinstance(inner, dict):
            found[section] = {name: value, **inner}
    return found


def _merged(base: Config, found: DeepSpeedFile, own: Any, name: str) -> dict[str, Any]:
    if not isinstance(own, dict):
        raise ConfigError(f"{name}: shardwise: is not an object")
    values: dict[str, Any] = {
        "distributed_type": "DEEPSPEED",
        "use_cpu": base.use_cpu,
        "deepspeed_config": {
            # Of flags: a file of DeepSpeed's has no word for a machine.
            "shard_group": base.zero.shard_group,
            "optimizer_shard_group": base.zero.optimizer_shard_group,
            **found.values.get("deepspeed_config", {}),
            "gradient_accumulation_steps": None,
        },
        "mixed_precision": found.values.get("mixed_precision", "no"),
        "dynamo_config": base.dynamo_config.model_dump(mode="json", exclude_defaults=True),
        "dynamo_backend": base.dynamo_backend,
    }
    engine = base.engine.model_dump(mode="json", exclude_defaults=True)
    engine.pop("loss_scale", None)
    theirs = {
        k: v
        for k, v in found.values.get("shardwise_config", {}).items()
        if k not in ("train_batch_size", "micro_batch_size")
    }
    if values["mixed_precision"] == "fp16":
        theirs["loss_scale"] = {"growth_interval": LOSS_SCALE_WINDOW, **found.loss_scale}
    compiled = own.get("compile", own.get("dynamo_backend"))
    for key in own:
        if key not in (*_OWN, "compile", "dynamo_backend"):
            raise ConfigError(f"{name}: shardwise.{key}: unknown key; known are {', '.join((*_OWN, 'compile'))}")
    if compiled is not None:
        values["dynamo_backend"] = {True: "inductor", False: "no"}.get(compiled, compiled)
    values["shardwise_config"] = {**engine, **theirs, **{key: own[key] for key in _OWN if key in own}}
    for key in ("train_batch_size", "micro_batch_size", "max_restarts", "restart_processes"):
        values["shardwise_config"].pop(key, None)
    return values


def batch_sizes(said: Mapping[str, Any], world_size: int, name: str) -> tuple[int | None, int | None, int]:
    """train = micro x accumulation x world, from any two of them, or one. Raises ConfigError where three contradict.

    Of a configuration that says none the sizes are None: an engine that only evaluates needs none.
    """
    numbers: dict[str, int | None] = {}
    for key in _BATCH:
        value = said.get(key)
        if value is not None and (isinstance(value, bool) or value != int(value) or value < 1):
            raise ConfigError(f"{name}: {key}: {value!r} is not a whole number of at least 1")
        numbers[key] = None if value is None else int(value)
    train, micro, steps = (numbers[key] for key in _BATCH)
    if train is not None and micro is not None and steps is None:
        steps = max(1, train // micro // world_size)
    elif train is not None and micro is None:
        steps = steps or 1
        micro = train // (steps * world_size)
    elif train is None and micro is not None:
        steps = steps or 1
        train = micro * steps * world_size
    steps = steps or 1
    if train is not None and micro is not None and train != micro * steps * world_size:
        raise ConfigError(
            f"{name}: train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size: {train} != "
            f"{micro} * {steps} * {world_size}. Leave one of them out."
        )
    return train, micro, steps


class DeepSpeedConfig:
    """deepspeed.runtime.config.DeepSpeedConfig: what programs ask of it before an engine exists."""

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        from .comm import get_world_size

        if mpu is not None:
            raise NotImplementedError("DeepSpeedConfig: mpu is for model parallelism, which shardwise does not do.")
        settings = read(config, get_world_size())
        self._param_dict = settings.raw
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = settings.batch
        self.gradient_clipping = settings.clipping
        self.zero_optimization_stage = settings.stage
        self.zero_enabled = settings.stage > 0
