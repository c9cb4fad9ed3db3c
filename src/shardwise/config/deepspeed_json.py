"""A DeepSpeed JSON file, read as the settings that it means here.

DeepSpeed's keys fall in four kinds: those with a meaning here (stage, offload, precision, clipping, batch sizes),
those that tune DeepSpeed's own machinery (bucket sizes and the like: taken, and named in one note), those that ask for
something else (MoE, activation partitioning: refused with the reason), and unknown ones (an error with
the nearest known key). `auto` means what it means in accelerate: the script, or the launcher's mixed_precision,
decides.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.documents import SETTINGS_NBYTES, parse_json, read_text, shown
from .check import nearest
from .fields import single_path
from .offloads import OFFLOADS
from .schema import Key
from .yaml_file import SettingsFile, parse_yaml

_REFUSED: dict[str, str] = {
    "amp": "NVIDIA apex is not used; take bf16 or fp16",
    "sparse_attention": "is not supported",
    "compression_training": "is not supported",
    "curriculum_learning": "is not supported",
    "data_efficiency": "is not supported",
    "elasticity": "is not supported",
    "tensor_parallel": "is not supported",
    "autotuning": "is not supported",
    "hybrid_engine": "is not supported",
    "pipeline": "is not supported",
    "quantize_training": "is not supported",
    "sparse_gradients": "is not supported",
    "torch_autocast": "is not supported; take bf16 or fp16",
    "compile": "torch.compile is set by dynamo_config or dynamo_backend, in the YAML or as a flag",
    "compression": "is not supported",
}
# No effect on what is computed: DeepSpeed's own machinery, its logs and its checkpoints.
_TUNING = {
    *("steps_per_print", "wall_clock_breakdown", "dump_state", "zero_allow_untested_optimizer", "memory_breakdown"),
    *("zero_force_ds_cpu_optimizer", "prescale_gradients", "gradient_predivide_factor", "aio", "flops_profiler"),
    *("comms_logger", "checkpoint", "tensorboard", "wandb", "csv_monitor", "comet", "activation_checkpointing"),
    *("disable_allgather", "graph_harvesting", "use_data_before_expert_parallel_", "load_universal_checkpoint"),
    *("zero_optimization_warmup", "dataloader_drop_last", "timers", "data_types"),
    "seq_parallel_communication_data_type",  # of sequence parallelism, which there is none of
}
_COMMENTS = {"_comment", "comment", "//"}
_ZERO_TUNING = {
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    *("allgather_bucket_size", "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold"),
    *("round_robin_gradients", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters", "legacy_stage1"),
    *("elastic_checkpoint", "load_from_fp32_weights", "memory_efficient_linear", "pipeline_loading_checkpoint"),
    *("stage3_use_all_reduce_for_fetch_params", "override_module_apply", "stage3_module_granularity_threshold"),
    "leaf_module",  # the ranks agree on the order of gathers, whatever their batches meet
    "mics_hierarchical_params_gather",  # how a gather goes within a group of several machines is the backend's to choose
    *("stage3_allgather_sequential", "log_trace_cache_warnings", "cpu_offload_use_pin_memory"),
}
_QUANTISED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
_ZERO_REFUSED = {
    "zero_quantized_gradients": "quantized reductions are not supported",
    "zeropp_loco_param": "quantized reductions are not supported",
    "zenflow": "is not supported",
}
# What DeepSpeed takes under two names: the one without stage3_ is its field's own.
_ALIASES = {
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
}
# Its older names of a device.
_LEGACY = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_params": "offload_param",
    "cpu_offload_param": "offload_param",
}
_OFFLOAD_TUNING = {
    *("pin_memory", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "pipeline_read", "pipeline_write"),
    *("ratio", "super_offload", "cpuadam_cores_perc"),
}
_FP16 = {  # DeepSpeed's name -> ours, in shardwise_config.loss_scale
    "loss_scale": "static",
    "initial_scale_power": "initial",
    "loss_scale_window": "growth_interval",
    "min_loss_scale": "minimum",
}
_LARGEST_POWER = 1000
LOSS_SCALE_WINDOW = 1000  # steps after which DeepSpeed's loss scale rises, where its file does not say
_PRECISION_TUNING = {
    *("auto_cast", "consecutive_hysteresis", "fp16_master_weights_and_grads", "immediate_grad_update"),
    *("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "check_grad_overflow",  # in bf16: a gradient that is not finite is an error here in any case
}
_OUR_KEYS = {
    *("zero_optimization", "bf16", "bfloat16", "fp16", "gradient_clipping", "gradient_accumulation_steps"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "communication_data_type", "optimizer", "scheduler"),
}


@dataclass
class DeepSpeedFile:
    """What a JSON file says, in our keys.

    values:   nested as in a YAML file: {"deepspeed_config": {...}, "mixed_precision": ...}; only what is said.
    places:   our key -> `ds.json:4`.
    problems: what is wrong, each with the place and DeepSpeed's own key in front.
    notes:    what is taken without effect, and where DeepSpeed would do something else.
    loss_scale: what its fp16 section says of shardwise_config.loss_scale; it counts if the run is of fp16. Its places are in
              `places`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loss_scale: dict[str, Any] = field(default_factory=dict)


def find_json(path: str, beside: str | None) -> Path:
    """`path` as seen from the working directory, else from the directory of the YAML file that names it."""
    found = Path(path).expanduser()
    if not found.exists() and beside is not None and not found.is_absolute():
        other = Path(beside).parent / found
        if other.exists():
            return other
    return found


def read_deepspeed_json(path: str | Path, *, aside: Collection[str] = ()) -> DeepSpeedFile:
    """Raises ConfigError if there is no such file or it is not JSON; wrong contents are in `problems`.

    aside: keys at the top that are somebody else's to read.
    """
    text = read_text(path, ConfigError, SETTINGS_NBYTES)
    values = parse_json(text, str(path), ConfigError, repeated_keys=True)  # keys that occur twice have their line below
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not a JSON object")
    # JSON is YAML but for tabs between tokens, so the YAML reader can tell the lines (and keys that occur twice).
    lines = parse_yaml(text.replace("\t", " "), str(path)).lines if values else {}
    rest = {key: value for key, value in values.items() if key not in aside}
    return _Reader(SettingsFile(str(path), rest, lines)).read()


def read_deepspeed_values(values: dict[str, Any], name: str, *, aside: Collection[str] = ()) -> DeepSpeedFile:
    """The same of a configuration that is no file. name: what problems call it. aside: keys that the caller reads itself."""
    rest = {key: value for key, value in values.items() if key not in aside}
    return _Reader(SettingsFile(name, rest, {})).read()


class _Reader:
    """Walks through one file; what it finds goes to `found`."""

    def __init__(self, file: SettingsFile) -> None:
        self.file = file
        self.found = DeepSpeedFile()
        self.idle: list[str] = []

    def read(self) -> DeepSpeedFile:
        top = self.file.values
        for key, value in top.items():
            if key in _REFUSED:
                if value not in (None, False, {}) and not _switched_off(value):
                    self.problem((key,), _REFUSED[key])
            elif key in _TUNING:
                self.idle.append(key)
            elif key not in (*_OUR_KEYS, *_COMMENTS):
                known = [*_OUR_KEYS, *_TUNING, *_REFUSED]
                self.problem((key,), f"unknown key{nearest(key, known)}")
        self.zero()
        self.precision()
        for theirs, ours in (
            ("gradient_clipping", ("deepspeed_config", "gradient_clipping")),
            ("gradient_accumulation_steps", ("deepspeed_config", "gradient_accumulation_steps")),
            ("train_batch_size", ("shardwise_config", "train_batch_size")),
            ("train_micro_batch_size_per_gpu", ("shardwise_config", "micro_batch_size")),
            ("communication_data_type", ("shardwise_config", "reduce_dtype")),
            ("optimizer", ("shardwise_config", "optimizer")),
            ("scheduler", ("shardwise_config", "scheduler")),
        ):
            if theirs in top and top[theirs] not in ("auto", None):
                self.put(ours, top[theirs], (theirs,))
        if top.get("gradient_clipping", "auto") in ("auto", None):
            said = "gradient_clipping is auto" if "gradient_clipping" in top else "has no gradient_clipping"
            self.found.notes.append(f"{self.file.path}: {said}. DeepSpeed would clip at 1.0; here nothing is clipped.")
        if self.idle:
            self.found.notes.append(f"{self.file.path}: no effect here: {', '.join(self.idle)}.")
        return self.found

    def zero(self) -> None:
        section = self.section("zero_optimization")
        for name, value in section.items():
            path = ("zero_optimization", name)
            key = _ALIASES.get(name, name)
            if key == "stage":
                self.put(("deepspeed_config", "zero_stage"), value, path)
            elif key in ("offload_optimizer", "offload_param"):
                self.offload(key, value)
            elif key in _LEGACY:
                if value is True:
                    self.put(("deepspeed_config", f"{_LEGACY[key]}_device"), "cpu", path)
            elif key == "stage3_gather_16bit_weights_on_model_save":
                self.put(("deepspeed_config", "zero3_save_16bit_model"), False if value == "auto" else value, path)
            elif key in ("mics_shard_size", "zero_hpz_partition_size"):
                self.groups(key, value, section)
            elif key in _QUANTISED:
                self.quantised(key, value, section)
            elif key in _ZERO_TUNING:
                self.idle.append(f"zero_optimization.{name}")
            elif key in _ZERO_REFUSED:
                if value is True or value not in (None, False, 0, 1, -1):
                    self.problem(path, _ZERO_REFUSED[key])
            else:
                known = ["stage", "offload_optimizer", "offload_param", "stage3_gather_16bit_weights_on_model_save"]
                known += ["mics_shard_size", "zero_hpz_partition_size", *_QUANTISED]
                self.problem(path, f"unknown key{nearest(key, [*known, *_ZERO_TUNING, *_ZERO_REFUSED])}")
        # DeepSpeed's default, where accelerate's YAML has 2.
        zero = self.found.values.setdefault("deepspeed_config", {})
        stage = zero.setdefault("zero_stage", 0)
        for role, first in (("offload_param", 3), ("offload_optimizer", 1)):
            device = zero.get(f"{role}_device", "none")
            if isinstance(stage, int) and 0 <= stage < first and device in OFFLOADS:
                zero[f"{role}_device"] = "none"
                self.found.notes.append(
                    f"{self.file.path}: zero_optimization.{role}: no effect at stage {stage}, as in DeepSpeed; it is for stage "
                    f"{first} and above."
                )

    def groups(self, key: str, value: Any, section: dict[str, Any]) -> None:
        """MiCS shards all over so many ranks; the other key keeps the weights alone within them, and states over all ranks."""
        path: Key = ("zero_optimization", key)
        if value is None or (isinstance(value, int) and value <= (0 if key == "mics_shard_size" else 1)):
            return  # its default, which is none
        if key == "mics_shard_size":
            self.put(("deepspeed_config", "shard_group"), value, path)
        elif section.get("stage") != 3:
            self.idle.append(f"zero_optimization.{key}")
        elif isinstance(section.get("mics_shard_size"), int) and section["mics_shard_size"] > 0:
            self.problem(path, "mics_shard_size says who shards too; leave one of them out")
        else:
            self.put(("deepspeed_config", "shard_group"), value, path)
            self.put(("deepspeed_config", "optimizer_shard_group"), "world", path)

    def quantised(self, key: str, value: Any, section: dict[str, Any]) -> None:
        """ZeRO++'s gathers of codes. DeepSpeed keeps frozen weights as codes too, where the second key says so."""
        path: Key = ("zero_optimization", key)
        if value in (None, False):
            return
        if value is not True:
            self.problem(path, f"{shown(value)} is not true or false")
        elif key == "zero_quantized_weights":
            self.put(("shardwise_config", "gather_dtype"), "int8", path)
        elif section.get("zero_quantized_weights") is True:
            self.found.notes.append(
                f"{self.file.path}: zero_optimization.{key}: frozen weights are sent as codes, as in DeepSpeed, and rest as "
                "they are, where DeepSpeed keeps the codes: each rank holds more of them."
            )
        else:
            self.problem(
                path, "frozen weights are not kept as codes; zero_quantized_weights sends them and trained ones so"
            )

    def offload(self, key: str, value: Any) -> None:
        path: Key = ("zero_optimization", key)
        if value is None:
            return
        if not isinstance(value, dict):
            self.problem(path, f"{shown(value)} is not an object with the key device")
            return
        for name, inner in value.items():
            if name == "device":
                self.put(("deepspeed_config", f"{key}_device"), "none" if inner is None else inner, (*path, name))
            elif name == "nvme_path":
                self.put(("deepspeed_config", f"{key}_nvme_path"), single_path(inner), (*path, name))
            elif name in _OFFLOAD_TUNING:
                self.idle.append(".".join((*path, name)))
            else:
                self.problem((*path, name), f"unknown key{nearest(name, ['device', 'nvme_path', *_OFFLOAD_TUNING])}")

    def precision(self) -> None:
        chosen: list[str] = []
        for theirs, ours in (("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "fp16")):
            section = self.section(theirs)
            for name, value in section.items():
                path = (theirs, name)
                if name == "enabled":
                    if value is True:
                        chosen.append(ours)
                        self.put(("mixed_precision",), ours, path)
                    elif value not in (False, "auto"):
                        self.problem(path, f"{shown(value)} is not true, false or 'auto'")
                elif theirs == "fp16" and name == "hysteresis":
                    if section.get("enabled") is True and value != 1:
                        self.found.notes.append(
                            f"{self.file.path}: fp16.hysteresis: no effect; the loss scale falls at every overflow."
                        )
                elif theirs == "fp16" and name in _FP16:
                    if section.get("enabled") is not False and value != "auto":
                        self.loss_scale(name, value, path)
                elif theirs != "fp16" and name in (*_FP16, "hysteresis"):
                    self.found.notes.append(f"{self.file.path}: {theirs}.{name}: no effect; bf16 has no loss scale.")
                elif name in _PRECISION_TUNING:
                    if value not in (False, None) and name == "fp16_master_weights_and_grads":
                        self.problem(path, "16-bit master weights are not supported")
                    else:
                        self.idle.append(".".join(path))
                else:
                    known = ["enabled", *_PRECISION_TUNING, *(["hysteresis", *_FP16] if theirs == "fp16" else ())]
                    self.problem(path, f"unknown key{nearest(name, known)}")
        if len(set(chosen)) > 1:
            self.problem(("fp16",), "bf16 and fp16 cannot both be enabled")
        off = [self.section(name).get("enabled", False) is False for name in ("bf16", "bfloat16", "fp16")]
        if not chosen and all(off) and any(name in self.file.values for name in ("bf16", "bfloat16", "fp16")):
            name = next(name for name in ("bf16", "bfloat16", "fp16") if name in self.file.values)
            self.put(("mixed_precision",), "no", (name,))

    def loss_scale(self, name: str, value: Any, path: Key) -> None:
        if name == "initial_scale_power" and isinstance(value, (int, float)) and not isinstance(value, bool):
            if not abs(value) <= _LARGEST_POWER:
                self.problem(path, f"{shown(value)} is out of range: 2 to that power is no number")
                return
            value = 2.0**value
        self.found.loss_scale[_FP16[name]] = value
        self.found.places["shardwise_config", "loss_scale", _FP16[name]] = self.named(path)

    def section(self, key: str) -> dict[str, Any]:
        value = self.file.values.get(key, {})
        if not isinstance(value, dict):
            if key == "zero_optimization" or value is not None:
                self.problem((key,), f"{shown(value)} is not an object")
                self.file.values[key] = {}
            return {}
        return value

    def put(self, ours: Key, value: Any, theirs: Key) -> None:
        """Set our key; a value that is wrong is found by the schema, which then names this place."""
        section = self.found.values
        for part in ours[:-1]:
            section = section.setdefault(part, {})
        section[ours[-1]] = value
        self.found.places[ours] = self.named(theirs)

    def named(self, theirs: Key) -> str:
        return f"{self.file.place(theirs) or self.file.path}: {'.'.join(theirs)}"

    def problem(self, theirs: Key, text: str) -> None:
        self.found.problems.append(f"{self.file.place(theirs) or self.file.path}: {'.'.join(theirs)}: {text}")


def _switched_off(value: Any) -> bool:
    return isinstance(value, dict) and value.get("enabled", value.get("training_enabled", True)) is False
