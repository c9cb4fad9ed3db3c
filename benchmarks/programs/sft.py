"""transformers' Trainer with a DeepSpeed file, as its users write it: a causal model on random tokens, whole or LoRA."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from seen import Seen, options
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed


class Tokens(Dataset):  # type: ignore[type-arg]
    """Random rows; `distinct` of them in turn, so that the loss can fall."""

    def __init__(self, count: int, distinct: int, length: int, vocabulary: int) -> None:
        self.count = count
        generator = torch.Generator().manual_seed(7919)
        self.rows = torch.randint(10, vocabulary, (distinct, length), generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % len(self.rows)]
        return {"input_ids": row, "labels": row}


def main() -> None:
    parser = options()
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    told = parser.parse_args()
    steps = told.warmup + told.steps
    # transformers 5.20 renamed it.
    names = {field.name for field in fields(TrainingArguments)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    checkpointing: dict[str, Any] = {}
    if told.checkpointing:
        checkpointing = {
            f"{prefix}_checkpointing": True,
            f"{prefix}_checkpointing_kwargs": {"use_reentrant": False},
        }
    args = TrainingArguments(
        output_dir=f"{told.out}-trainer",
        deepspeed=told.deepspeed,
        per_device_train_batch_size=told.rows,
        max_steps=steps,
        learning_rate=told.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=not told.fp32,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=5,
        **checkpointing,
    )
    set_seed(7)
    model: Any = AutoModelForCausalLM.from_pretrained(told.model, dtype=torch.float32 if told.fp32 else torch.bfloat16)
    model.config.use_cache = False
    if told.lora_rank:
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=told.lora_rank, lora_alpha=2 * told.lora_rank, target_modules="all-linear"
        )
        set_seed(8)
        model = get_peft_model(model, lora)
    per_step = told.rows * args.world_size
    rows = Tokens(steps * per_step, 4 * per_step, told.length, model.config.vocab_size)
    seen = Seen(told.warmup)
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[seen])
    trainer.train()
    seen.write(trainer, told.out)


if __name__ == "__main__":
    main()
