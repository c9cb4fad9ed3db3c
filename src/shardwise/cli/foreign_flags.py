"""Flags of `accelerate launch` that `shardwise launch` has not, and what to use in place of each."""

from __future__ import annotations

import difflib
from typing import Any

_HOSTFILE = "give the file to --hostfile, and leave hosts out of it that are not to be used"
_CLOUD = "cloud services are not supported; start the script on the machine itself"
_TPU = "TPUs are not supported"
_COMPILER = "write {} into dynamo_config of the YAML file"
_ANOTHER = "{} is not what shardwise runs; use --zero_stage 3"

_INSTEAD: dict[str, str] = {
    "fp16": "write --mixed_precision fp16",
    "bf16": "write --mixed_precision bf16",
    "deepspeed_hostfile": _HOSTFILE,
    "deepspeed_exclusion_filter": _HOSTFILE,
    "deepspeed_inclusion_filter": _HOSTFILE,
    "mpirun_hostfile": "processes are not started through mpirun here; `mpirun python train.py` works by itself",
    "rdzv_conf": "torch's rendezvous needs nothing more; --rdzv_backend, --main_process_ip and --main_process_port say where",
    "role": "the ranks have one role",
    "main_training_function": "the script is run from its first line",
    "use_fsdp": _ANOTHER.format("FSDP"),
    "use_megatron_lm": _ANOTHER.format("Megatron-LM"),
    "use_parallelism_config": "tensor, context and pipeline parallelism are not supported; use --zero_stage 3",
    "downcast_bf16": _TPU,
    "vm": _TPU,
    "env": _TPU,
    "no_tpu_cluster": _TPU,
    "use_xpu": "only CUDA devices and the CPU are supported",
    "ipex": "only CUDA devices and the CPU are supported",
    **{
        name: _COMPILER.format(name)
        for name in ("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "dynamo_use_regional_compilation")
    },
}
_BEGINNINGS: dict[str, str] = {
    "fsdp_": _INSTEAD["use_fsdp"],
    "megatron_lm_": _INSTEAD["use_megatron_lm"],
    "parallelism_config_": _INSTEAD["use_parallelism_config"],
    "fp8_": "fp8 is not supported; use --mixed_precision bf16",
    "aws_": _CLOUD,
    "tpu": _TPU,
}


def instead_of(flag: str) -> str | None:
    """What to use in place of a flag of accelerate's, as the end of a sentence; None for a flag that it has not either."""
    name = flag.lstrip("-").replace("-", "_")
    if name in _INSTEAD:
        return _INSTEAD[name]
    return next((text for beginning, text in _BEGINNINGS.items() if name.startswith(beginning)), None)


def usage_error(error: Exception, text: str) -> str:
    """A parser's error in one line of ours; an unknown flag gets the nearest known one."""
    context = getattr(error, "ctx", None)
    if getattr(context, "info_name", None) == "config" and text.startswith("No such command") and text.endswith("."):
        text = f"{text.rstrip('.')}. The file is --config_file FILE, a setting a flag such as --num_processes 2."
    typed = getattr(error, "option_name", None)
    known = getattr(context, "command", None)
    instead = instead_of(typed) if isinstance(typed, str) else None
    if type(error).__name__ == "NoSuchOption" and instead is not None:
        return f"{typed}: {instead}."
    if type(error).__name__ != "NoSuchOption" or not isinstance(typed, str) or known is None:
        return text[:1].lower() + text[1:]
    names = {
        name.lstrip("-"): name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    of = _siblings_with(typed, context)
    if of:
        return f"{typed}: unknown flag; `shardwise {of[0]}` has it"
    beside = " Flags of the script come after it." if getattr(context, "info_name", None) == "launch" else ""
    close = difflib.get_close_matches(typed.lstrip("-").replace("-", "_"), list(names), n=1)
    hint = f"; did you mean {names[close[0]]}?" if close else f"; see --help.{beside}"
    return f"{typed}: unknown flag{hint}"


def _siblings_with(typed: str, context: Any) -> list[str]:
    """Commands beside this one that have the flag. None for `launch`: there it may be the script's, typed too early."""
    parent = getattr(context, "parent", None)
    if parent is None or context.info_name == "launch":
        return []
    return [name for name, other in parent.command.commands.items() if any(typed in flag.opts for flag in other.params)]
