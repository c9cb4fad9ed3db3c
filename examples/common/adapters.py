"""Which PEFT configuration the arguments ask for."""

from __future__ import annotations

import argparse
from typing import Any

from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
)

from common import quiet  # noqa: F401 - for what importing it does


def adapter_config(args: argparse.Namespace, task_type: TaskType) -> PeftConfig | None:
    """The configuration for `get_peft_model`; None if every weight of the model is trained."""
    common: dict[str, Any] = {"task_type": task_type, "inference_mode": False}
    if args.peft == "none":
        return None
    if args.peft in ("prefix", "prompt", "p-tuning"):
        common["num_virtual_tokens"] = args.num_virtual_tokens or 20
        if args.peft == "p-tuning":
            return PromptEncoderConfig(**common, encoder_hidden_size=128)
        return PrefixTuningConfig(**common) if args.peft == "prefix" else PromptTuningConfig(**common)

    common["modules_to_save"] = args.modules_to_save
    if args.peft == "ia3":
        # Its activations are scaled where peft knows the architecture to profit; names given by hand replace that.
        if args.lora_target_modules and args.lora_target_modules != ["default"]:
            common.update(target_modules=args.lora_target_modules, feedforward_modules=[])
        return IA3Config(**common)
    targets = args.lora_target_modules or ["all-linear"]
    if targets == ["default"]:
        targets = None
    elif targets == ["all-linear"]:
        targets = "all-linear"
    common["target_modules"] = targets
    rank, alpha = args.lora_r or 8, 32 if args.lora_alpha is None else args.lora_alpha
    dropout = 0.1 if args.lora_dropout is None else args.lora_dropout
    if args.peft in ("lora", "dora"):
        return LoraConfig(**common, r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=args.peft == "dora")
    kind = LoHaConfig if args.peft == "loha" else LoKrConfig
    return kind(**common, r=rank, alpha=alpha, module_dropout=dropout)
