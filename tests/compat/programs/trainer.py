"""transformers' Trainer, as its users write it; a case is a configuration and what is trained.

The cases "ddp" and "plain" say nothing of DeepSpeed: the first is DDP, the second has what the launcher says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
AUTO = "auto"
CPU = {"device": "cpu", "pin_memory": True}


def configuration(stage: int, **zero: Any) -> dict[str, Any]:
    """As people write it: what Trainer knows is "auto"."""
    return {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {
            "enabled": AUTO,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
        },
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": AUTO,
            "stage3_prefetch_bucket_size": AUTO,
            "stage3_param_persistence_threshold": AUTO,
            "stage3_gather_16bit_weights_on_model_save": True,
            **zero,
        },
    }


ADAMW = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}
DECAY = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": 0, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO, "total_num_steps": AUTO, "warmup_type": "linear",
    },
}  # fmt: skip

CASES: dict[str, dict[str, Any] | None] = {
    "ddp": None,
    "plain": None,
    "z1": configuration(1),
    "z2": configuration(2),
    "z3": configuration(3),
    "z3no16": configuration(3, stage3_gather_16bit_weights_on_model_save=False),
    "z2cpu": configuration(2, offload_optimizer=CPU),
    "z3cpu": configuration(3, offload_optimizer=CPU, offload_param=CPU),
    "z3ds": configuration(3) | {"optimizer": ADAMW},
    "z3dsds": configuration(3) | {"optimizer": ADAMW, "scheduler": DECAY},
}


class Tokens(Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int, seed: int) -> None:
        self.rows = torch.randint(3, 64, (count, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def make_model(kind: str, folder: str) -> Any:
    set_seed(7)
    if kind == "pretrained":
        model: Any = LlamaForCausalLM.from_pretrained(Path(folder) / "base")
        set_seed(8)
        model.resize_token_embeddings(70, mean_resizing=False)
        torch.nn.init.normal_(model.model.layers[1].mlp.up_proj.weight, std=0.02)
        model.lm_head.weight.data[3:5] *= 2 - model.model.layers[0].mlp.up_proj.weight.mean().item()
        return model
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return model


def arguments(case: str, out: str, **more: Any) -> TrainingArguments:
    zero = {} if CASES.get(case) is None else {"deepspeed": CASES[case]}
    return TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        save_steps=3,
        eval_steps=3,
        eval_strategy="steps",
        report_to=[],
        disable_tqdm=True,
        use_cpu=case == "ddp",
        seed=5,
        **zero,
        **more,
    )


def train(name: str, folder: str) -> dict[str, Any]:
    """Train, save, and go on from the checkpoint in the middle with new objects.

    DDP goes not on: transformers 4.56 cannot, on a CPU, and nothing is compared with it.
    """
    case, _, kind = name.partition("-")
    out = f"{folder}/{name}"
    more = {"optim": "adafactor"} if kind == "adafactor" else {}
    made = arguments(case, out, **more)
    model = make_model(kind or "full", folder)
    trainer = Trainer(model=model, args=made, train_dataset=Tokens(48, 1), eval_dataset=Tokens(16, 2))
    deferred = sum(p.is_meta for p in model.parameters())
    trainer.train()
    found: dict[str, Any] = {"log": [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]}
    found["deferred"] = deferred
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    found["stage"] = None if plugin is None else plugin.zero_stage
    trainer.save_model(f"{out}/final")

    forget(trainer)
    if case == "ddp":
        return found
    made = arguments(case, out, **more)
    model = make_model(kind or "full", folder)
    trainer = Trainer(model=model, args=made, train_dataset=Tokens(48, 1), eval_dataset=Tokens(16, 2))
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-3")
    again = [row for row in trainer.state.log_history if "loss" in row and row["step"] > 3]
    first = [row for row in found["log"] if "loss" in row and row["step"] > 3]
    keys = ("loss", "grad_norm", "learning_rate")
    found["resumed_as_was"] = [[row[key] for key in keys] for row in first] == [
        [row[key] for key in keys] for row in again
    ]
    found["after_resume"] = again
    forget(trainer)
    return found


def forget(trainer: Trainer) -> None:
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()
    unset_hf_deepspeed_config()
