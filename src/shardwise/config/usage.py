"""Settings where accelerate and DeepSpeed have another default than the schema, and files that describe another library.

Each function looks at the values of a run that is being put together, as `resolve` hands them over, and gives what is to be put
there, with the reason; nothing here changes anything by itself.

    zero3_init_flag       on at stage 3 where nobody says it, in a run that a file describes
    offload_param_device  nothing below stage 3, where DeepSpeed does not look at it
    loss scale            DeepSpeed's window of 1000 steps in a run of fp16 that its file describes
    one process           what a file says of other ways of running beside distributed_type NO, which accelerate passes over
    FSDP                  which settings would do what the file's fsdp_config does
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..files.documents import shown
from .deepspeed_json import LOSS_SCALE_WINDOW
from .offloads import OFFLOADS
from .schema import Key

Get = Callable[[Key], Any]
# (key, value, where it comes from)
Put = tuple[Key, Any, str]


def number(value: Any) -> int | None:
    """A stage as a file or a flag says it; None for what is none."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdigit() and len(text) == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9 else None


def word(value: Any) -> str:
    """A text or a truth as it is compared; empty for anything else, which the schema refuses by itself."""
    return str(value).strip().lower() if isinstance(value, (str, bool)) else ""


def defaults(get: Get, *, described: bool) -> list[Put]:
    """What follows where nobody says otherwise. described: a file has a deepspeed_config, or a JSON was read."""
    zero3_init: Key = ("deepspeed_config", "zero3_init_flag")
    found: list[Put] = []
    if described and number(get(("deepspeed_config", "zero_stage"))) == 3 and get(zero3_init) is None:
        found.append((zero3_init, True, "because zero_stage is 3, as in accelerate"))
    window: Key = ("shardwise_config", "loss_scale", "growth_interval")
    if described and word(get(("mixed_precision",))) == "fp16" and get(window) is None:
        found.append((window, LOSS_SCALE_WINDOW, "DeepSpeed's default"))
    return found


def without_effect(get: Get, flags: Mapping[str, Any]) -> list[tuple[Put, str]]:
    """What a file says and DeepSpeed or accelerate would not look at: what to put there, and a note."""
    found: list[tuple[Put, str]] = []
    stage, offload = number(get(("deepspeed_config", "zero_stage"))), ("deepspeed_config", "offload_param_device")
    device = word(get(offload))
    if "offload_param_device" not in flags and device in OFFLOADS and stage is not None and stage < 3:
        note = f"offload_param_device: {device} has no effect at zero_stage {stage}, where parameters are whole."
        found.append(((offload, "none", f"because zero_stage is {stage}"), note))
    if word(get(("downcast_bf16",))) in ("true", "yes", "1"):
        put = (("downcast_bf16",), "no", "because there is no TPU")
        found.append((put, "downcast_bf16: has no effect; it is for TPUs."))
    if "distributed_type" not in flags and word(get(("distributed_type",))) in ("no", "false"):
        found += _beside_one_process(get, flags)
    return found


# Sections that accelerate reads under the distributed_type of the same name alone.
_OF_OTHER_TYPES = (
    "fsdp_config", "megatron_lm_config", "tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env",
    "commands", "command_file",
)  # fmt: skip


def _beside_one_process(get: Get, flags: Mapping[str, Any]) -> list[tuple[Put, str]]:
    because = "because distributed_type is NO"
    found: list[tuple[Put, str]] = []
    processes = word(str(get(("num_processes",))))
    if "num_processes" not in flags and processes.isdigit() and len(processes) < 9 and int(processes) > 1:
        note = (
            f"num_processes: {processes} has no effect beside distributed_type NO, which is one process; take MULTI_GPU or "
            "MULTI_CPU for more."
        )
        found.append(((("num_processes",), 1, because), note))
    for name in _OF_OTHER_TYPES:
        value = get((name,))
        if value and word(value) not in ("false", "no", "off", "0", "none"):
            note = f"{name}: has no effect beside distributed_type NO, which is one process of its own."
            found.append((((name,), None, because), note))
    return found


def clipping_note(get: Get, file: str) -> str | None:
    """For a YAML that says nothing of clipping, where accelerate would clip."""
    section = get(("deepspeed_config",))
    said = isinstance(section, dict) and section.get("gradient_clipping", "auto") != "auto"
    if not section or said or number(get(("deepspeed_config", "zero_stage"))) == 0:
        return None
    return f"{file}: has no gradient_clipping. accelerate's DeepSpeed would clip at 1.0; here nothing is clipped."


def of_fsdp(section: Any) -> str:
    """The settings here that do what an fsdp_config does, in words for an error; empty where it does not say."""
    if not isinstance(section, dict) or not section:
        return ""
    given = section.get("fsdp_sharding_strategy", "")
    strategy = str(number(given)) if number(given) is not None else word(given).upper()
    reshard = section.get("fsdp_reshard_after_forward")
    if strategy in ("NO_SHARD", "3"):
        return "; what its fsdp_config does is distributed_type: MULTI_GPU"
    lesser = strategy in ("SHARD_GRAD_OP", "2", "_HYBRID_SHARD_ZERO2", "5") or word(reshard) in (
        "false",
        "shard_grad_op",
    )
    words = [f"zero_stage: {2 if lesser else 3}"]
    if word(section.get("fsdp_offload_params")) == "true":
        words.append("offload_optimizer_device: cpu" + ("" if lesser else ", offload_param_device: cpu"))
    if word(section.get("fsdp_activation_checkpointing")) == "true":
        words.append("activation_checkpointing: all in shardwise_config")
    if isinstance(section.get("fsdp_transformer_layer_cls_to_wrap"), str):
        words.append(f"units: {shown(section['fsdp_transformer_layer_cls_to_wrap'])} in shardwise_config")
    return f"; what its fsdp_config does is distributed_type: DEEPSPEED with {', '.join(words)}"
