"""transformers' Trainer with a DeepSpeed file, as its users write it: a causal model on random tokens, whole or LoRA."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from seen import Seen, arguments, options
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
    # transformers 5.20 renamed it.
    names = {field.name for field in fields(TrainingArguments)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    checkpointing: dict[str, Any] = {}
    if told.checkpointing:
        checkpointing = {
            f"{prefix}_checkpointing": True,
            f"{prefix}_checkpointing_kwargs": {"use_reentrant": False},
        }
    args = TrainingArguments(**arguments(told), **checkpointing)
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
    rows = Tokens(args.max_steps * per_step, 4 * per_step, told.length, model.config.vocab_size)
    seen = Seen(told.warmup)
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[seen])
    trainer.train()
    seen.write(trainer, told.out)


if __name__ == "__main__":
    main()
