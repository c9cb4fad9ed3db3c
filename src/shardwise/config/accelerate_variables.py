"""What accelerate's launcher, or a cluster, says in ACCELERATE_* variables: a table of all that accelerate reads, and a reader.

A script that `accelerate launch` has started finds its settings in them. They count where shardwise's own launcher has said
nothing (SHARDWISE_CONFIG), below the arguments of the script. Each variable of accelerate 1.15 acts as one of our settings, or
is refused when it asks for something else, or has no effect, which is said once. This file must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from ..files.documents import shown
from . import usage
from .check import checked, from_environment
from .deepspeed_json import read_deepspeed_json
from .fields import NO, YES, single_path
from .schema import ENVIRONMENT_KEY, Config, Key

_ZERO = "deepspeed_config"
_BLOCKS = "dynamo_config"
_OFF = frozenset({"", "none", "auto", *NO, "f", "n"})


@dataclass(frozen=True)
class Variable:
    """How one is taken.

    kind: "acts" as the setting of `key`; "refused" where it asks for something; "idle": without effect; "read" by the code
          that `text` names.
    text: for "acts" and "read" what it does, for the others why.
    zero: it counts in a ZeRO run alone, as in accelerate.
    off:  values, in lower case, that ask for nothing.
    """

    kind: Literal["acts", "refused", "idle", "read"]
    text: str
    key: Key = ()
    zero: bool = False
    off: frozenset[str] = _OFF


def _acts(*key: str, zero: bool = False) -> Variable:
    return Variable("acts", ".".join(key), key, zero)


def _zero(name: str) -> Variable:
    return _acts(_ZERO, name, zero=True)


_FSDP = "FSDP is not what shardwise runs; take deepspeed_config with zero_stage 3 in the configuration"
_FP8 = "fp8 is not supported; take bf16"
_CLOUD = "SageMaker is not supported; start the script with shardwise launch"

VARIABLES: dict[str, Variable] = {
    "ACCELERATE_MIXED_PRECISION": _acts("mixed_precision"),
    "ACCELERATE_USE_CPU": _acts("use_cpu"),
    "ACCELERATE_TORCH_DEVICE": Variable(
        "read", "cpu is use_cpu; a GPU is the rank's own, which CUDA_VISIBLE_DEVICES sets"
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _acts(_ZERO, "gradient_accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": _zero("gradient_clipping"),
    "ACCELERATE_USE_DEEPSPEED": Variable("read", "distributed_type DEEPSPEED"),
    "ACCELERATE_CONFIG_DS_FIELDS": Variable("read", "fields that a DeepSpeed JSON must not be contradicted in"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": _zero("deepspeed_config_file"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": _zero("zero_stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": _zero("offload_optimizer_device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": _zero("offload_param_device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": _zero("offload_optimizer_nvme_path"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": _zero("offload_param_nvme_path"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": _zero("zero3_init_flag"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _zero("zero3_save_16bit_model"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": _zero("deepspeed_moe_layer_cls_names"),
    "ACCELERATE_DYNAMO_BACKEND": _acts(_BLOCKS, "dynamo_backend"),
    "ACCELERATE_DYNAMO_MODE": _acts(_BLOCKS, "dynamo_mode"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _acts(_BLOCKS, "dynamo_use_fullgraph"),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _acts(_BLOCKS, "dynamo_use_dynamic"),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _acts(_BLOCKS, "dynamo_use_regional_compilation"),
    "ACCELERATE_LOG_LEVEL": Variable("read", "the level of loggers that get_logger gives"),
    "ACCELERATE_USE_FSDP": Variable("refused", _FSDP),
    "ACCELERATE_USE_MEGATRON_LM": Variable("refused", "Megatron-LM is not what shardwise runs; take zero_stage 3"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Variable(
        "refused", "tensor, context and pipeline parallelism are not supported; take zero_stage 3"
    ),
    "ACCELERATE_USE_SAGEMAKER": Variable("refused", _CLOUD),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": Variable("refused", _CLOUD),
    "ACCELERATE_IN_TPU_POD": Variable("refused", "TPUs are not supported"),
    "ACCELERATE_DOWNCAST_BF16": Variable("idle", "it is for TPUs"),
    "ACCELERATE_FP8_": Variable("refused", _FP8),
    "ACCELERATE_FP8_BACKEND": Variable("refused", _FP8),
    "ACCELERATE_FP8_OPT_LEVEL": Variable("refused", _FP8, off=_OFF | {"o1"}),
    "ACCELERATE_ALLOW_CP_STANDALONE": Variable("idle", "there is no context parallelism"),
    "ACCELERATE_DEBUG_MODE": Variable("idle", "what the ranks gather and reduce is compared in any case"),
    "ACCELERATE_CPU_AFFINITY": Variable(
        "idle", "shardwise launch --enable_cpu_affinity keeps processes to their cores, before they start threads"
    ),
    "ACCELERATE_ENABLE_RICH": Variable("idle", "tracebacks are not formatted; call rich.traceback.install()"),
    "ACCELERATE_DISABLE_RICH": Variable("idle", "tracebacks are not formatted in any case"),
    "ACCELERATE_BYPASS_DEVICE_MAP": Variable(
        "idle", "a model that a device_map spread over devices is refused in any case"
    ),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": Variable("idle", "models are built without memory by accelerator.init()"),
    "ACCELERATE_DEBUG_RDV_FILE": Variable("idle", "it belongs to accelerate's debug_launcher"),
    "ACCELERATE_NUM_PROCESSES": Variable("idle", "the number of processes is the launcher's WORLD_SIZE"),
}
# The beginnings of names, of which accelerate makes several.
PREFIXES = tuple(name for name in VARIABLES if name.endswith("_"))
# What a DeepSpeed JSON says alone, in accelerate's words for ACCELERATE_CONFIG_DS_FIELDS.
_OF_THE_FILE = frozenset(
    {
        *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device"),
        *("offload_param_device", "offload_param_nvme_path", "offload_optimizer_nvme_path"),
        *("zero3_save_16bit_model", "mixed_precision"),
    }
)


def variable_of(name: str) -> Variable | None:
    """The row of a variable; None for one that accelerate does not read."""
    return VARIABLES.get(name) or next((VARIABLES[prefix] for prefix in PREFIXES if name.startswith(prefix)), None)


@dataclass
class Said:
    """What the variables say. values: nested as in a YAML file. places: where each of our keys comes from."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, key: Key, value: Any, place: str) -> None:
        section = self.values
        for part in key[:-1]:
            section = section.setdefault(part, {})
        section[key[-1]] = value
        self.places[key] = place

    def get(self, key: Key) -> Any:
        value: Any = self.values
        for part in key:
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_variables(environ: Mapping[str, str], *, zero: bool | None = None) -> Said:
    """What all ACCELERATE_* variables of a process say.

    zero: whether this is a ZeRO run; None: ACCELERATE_USE_DEEPSPEED says so. What only such a run reads is a note in another.
    """
    said = Said()
    asked = _is_on(environ.get("ACCELERATE_USE_DEEPSPEED"))
    zero = asked if zero is None else zero
    if zero:
        said.put(("distributed_type",), "DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")
        said.values.setdefault(_ZERO, {})
    unread = []
    for name in sorted(environ):
        row = variable_of(name) if name.startswith("ACCELERATE_") else None
        text = environ[name].strip()
        if row is None or (text.lower() in row.off and row.kind != "acts") or not text:
            continue
        if row.kind == "refused":
            said.problems.append(f"{name} is {shown(text)}: {row.text}.")
        elif row.kind == "idle":
            said.notes.append(f"{name} has no effect: {row.text}.")
        elif row.kind == "acts" and row.zero and not zero:
            if text.lower() not in row.off:
                unread.append(name)
        elif row.kind == "acts":
            _take(said, name, row.key, text)
    if unread:
        said.notes.append(f"{', '.join(unread)}: no effect without ACCELERATE_USE_DEEPSPEED=true or a DeepSpeedPlugin.")
    _device(said, environ.get("ACCELERATE_TORCH_DEVICE", "").strip().lower())
    _only_with_a_compiler(said)
    if zero:
        _zero_run(said, environ)
    elif _ZERO in said.values:
        said.values[_ZERO]["zero_stage"] = 0
    return said


def _take(said: Said, name: str, key: Key, text: str) -> None:
    """Put a variable's text where it acts; "auto" and "none" say nothing."""
    word = text.lower()
    if word in ("auto", "none") or (key[-1] == "mixed_precision" and word == "no" and _ZERO in said.values):
        return  # beside a DeepSpeed JSON, accelerate takes the file's precision for its default
    if key[-1] in ("mixed_precision", "dynamo_backend"):
        text = word
    elif word in ("y", "t"):
        text = "true"
    said.put(key, single_path(text) if key[-1].endswith("_nvme_path") else text, name)


def _device(said: Said, text: str) -> None:
    if text == "cpu":
        said.put(("use_cpu",), True, "ACCELERATE_TORCH_DEVICE")
    elif text not in ("", "cuda"):
        said.problems.append(
            f"ACCELERATE_TORCH_DEVICE is {shown(text)}: each rank takes the GPU of its own number. Name the GPUs in "
            "CUDA_VISIBLE_DEVICES, or give cpu."
        )


def _only_with_a_compiler(said: Said) -> None:
    """accelerate's launcher writes all of dynamo's settings in any run."""
    backend = said.get((_BLOCKS, "dynamo_backend"))
    if backend is None or backend == "no":
        said.values.pop(_BLOCKS, None)


def _zero_run(said: Said, environ: Mapping[str, str]) -> None:
    """The DeepSpeed JSON that is named, over the variables, and what accelerate and DeepSpeed make of both."""
    path = said.get((_ZERO, "deepspeed_config_file"))
    described = path is not None
    loss_scale: dict[str, Any] = {}
    if path is not None:
        fields_too = {name.strip() for name in environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")} & _OF_THE_FILE
        if fields_too:
            said.problems.append(
                f"ACCELERATE_CONFIG_DS_FIELDS: {', '.join(sorted(fields_too))}: beside deepspeed_config_file, the file says "
                "this. Remove it from the configuration of accelerate."
            )
        try:
            read = read_deepspeed_json(path)
        except ConfigError as error:
            said.problems.append(f"ACCELERATE_DEEPSPEED_CONFIG_FILE: {error}")
            return
        said.problems += read.problems
        said.notes += read.notes
        loss_scale = read.loss_scale
        asked = said.get(("mixed_precision",))
        of_file = read.values.get("mixed_precision", "no")
        if asked is not None and of_file not in ("no", asked):
            place = read.places.get(("mixed_precision",), path)
            said.problems.append(
                f"ACCELERATE_MIXED_PRECISION is {asked}, which contradicts {of_file} of {place}. Remove one."
            )
        for key, value in _flattened(read.values):
            said.put(key, value, read.places.get(key, path))
    if usage.word(said.get(("mixed_precision",))) == "fp16":
        for name, value in loss_scale.items():
            said.put(("shardwise_config", "loss_scale", name), value, f"{path}: fp16")
    for put in usage.defaults(said.get, described=True):
        said.put(*put)
    for put, note in usage.without_effect(said.get, {}):
        said.put(*put)
        said.notes.append(note)
    if not described:
        clipping = usage.clipping_note(said.get, "ACCELERATE_GRADIENT_CLIPPING")
        said.notes += [] if clipping is None else [clipping]
    if said.get((_ZERO, "gradient_clipping")) is not None:
        said.notes = [note for note in said.notes if "gradient_clipping" not in note.lower()]


def _flattened(values: Mapping[str, Any]) -> list[tuple[Key, Any]]:
    found: list[tuple[Key, Any]] = []
    for name, value in values.items():
        if name in (_ZERO, "shardwise_config"):
            found += [((name, inner), item) for inner, item in value.items()]
        else:
            found.append(((name,), value))
    return found


def configuration(environ: Mapping[str, str] | None = None) -> tuple[Config, list[str]]:
    """The configuration that this process was started with, and notes on what has no effect in it.

    The launcher's, where `shardwise launch` started it; else what ACCELERATE_* variables say; else the default one.
    Raises ConfigError with one line for each thing that is wrong.
    """
    env = os.environ if environ is None else environ
    if env.get(ENVIRONMENT_KEY):
        return from_environment(env), []
    said = read_variables(env)
    return _checked(said), said.notes


def below_a_plugin(environ: Mapping[str, str] | None = None) -> Config | None:
    """What ACCELERATE_* variables say to a DeepSpeedPlugin of a script; None where they are not asked or say nothing."""
    env = os.environ if environ is None else environ
    names = [name for name in env if (row := variable_of(name)) is not None and row.key[:1] == (_ZERO,)]
    if env.get(ENVIRONMENT_KEY) or not names:
        return None
    return _checked(read_variables(env, zero=True))


def _checked(said: Said) -> Config:
    if said.problems:
        raise ConfigError("\n".join(said.problems))
    return checked(said.values, lambda key: said.places.get(key) or f"the ACCELERATE_* variables: {'.'.join(key)}")


def log_level(environ: Mapping[str, str] | None = None) -> str | None:
    """The level that ACCELERATE_LOG_LEVEL gives to loggers, or None."""
    return (os.environ if environ is None else environ).get("ACCELERATE_LOG_LEVEL") or None


def _is_on(text: str | None) -> bool:
    return (text or "").strip().lower() in YES | {"y", "t"}
