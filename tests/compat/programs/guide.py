"""The script of PEFT's DeepSpeed guide in its structure: LoRA on an encoder-decoder model under ZeRO-3 with offload.

`guide.py OUT BASE MESSAGES`: everything of DeepSpeed comes from the launcher's YAML.
"""

from __future__ import annotations

import csv
import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed


class TorchTracemalloc:
    """The memory that a block takes on the host, traced as the guide's script does."""

    def __enter__(self) -> TorchTracemalloc:
        gc.collect()
        self.process = psutil.Process()
        self.begin = self.peak = self.process.memory_info().rss
        self.monitoring = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.monitoring:
            self.peak = max(self.process.memory_info().rss, self.peak)

    def __exit__(self, *error: object) -> None:
        self.monitoring = False
        self.thread.join()
        self.end = self.process.memory_info().rss


def main() -> None:
    out, base, messages = sys.argv[1:]
    accelerator = Accelerator()
    set_seed(42)
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1,
        target_modules="all-linear",
    )  # fmt: skip
    with open(messages, newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(base)

    with accelerator.main_process_first():
        encoded = [
            {
                "input_ids": tokenizer(f"Tweet text : {row['Tweet text']} Label :")["input_ids"],
                "labels": tokenizer(text_target=row["Label"])["input_ids"],
            }
            for row in rows
        ]
    accelerator.wait_for_everyone()

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = tokenizer.pad([{"input_ids": item["input_ids"]} for item in batch], return_tensors="pt")
        labels = tokenizer.pad([{"input_ids": item["labels"]} for item in batch], return_tensors="pt")["input_ids"]
        labels[labels == tokenizer.pad_token_id] = -100
        return {**inputs, "labels": labels}

    train_dataloader = DataLoader(encoded, shuffle=True, collate_fn=collate, batch_size=8)
    eval_dataloader = DataLoader(encoded, collate_fn=collate, batch_size=8)

    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    model = get_peft_model(model, peft_config)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    num_epochs = 40  # the base model is small, and has to learn more than the guide's
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer, num_warmup_steps=0, num_training_steps=len(train_dataloader) * num_epochs
    )
    model, train_dataloader, eval_dataloader, optimizer, lr_scheduler = accelerator.prepare(
        model, train_dataloader, eval_dataloader, optimizer, lr_scheduler
    )
    is_ds_zero_3 = False
    if getattr(accelerator.state, "deepspeed_plugin", None):
        is_ds_zero_3 = accelerator.state.deepspeed_plugin.zero_stage == 3

    for epoch in range(num_epochs):
        with TorchTracemalloc() as tracemalloc:
            model.train()
            total_loss = 0
            for batch in tqdm(train_dataloader, disable=not accelerator.is_main_process):
                outputs = model(**batch)
                loss = outputs.loss
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"CPU Peak Memory consumed during the train: {tracemalloc.peak - tracemalloc.begin}")
        train_epoch_loss = total_loss / len(train_dataloader)
        accelerator.print(f"{epoch=}: train_ppl={torch.exp(train_epoch_loss)} {train_epoch_loss=}")

    model.eval()
    eval_preds: list[str] = []
    for batch in tqdm(eval_dataloader, disable=not accelerator.is_main_process):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            outputs = accelerator.unwrap_model(model).generate(**inputs, synced_gpus=is_ds_zero_3, max_new_tokens=10)
        outputs = accelerator.pad_across_processes(outputs, dim=1, pad_index=tokenizer.pad_token_id)
        preds = accelerator.gather_for_metrics(outputs).detach().cpu().numpy()
        eval_preds.extend(tokenizer.batch_decode(preds, skip_special_tokens=True))

    correct = [pred.strip() == row["Label"].strip() for pred, row in zip(eval_preds, rows, strict=True)]
    accuracy = sum(correct) / len(correct) * 100
    accelerator.print(f"{accuracy=}")
    accelerator.wait_for_everyone()
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        f"{out}/adapter", state_dict=state, is_main_process=accelerator.is_main_process
    )
    if accelerator.is_main_process:
        Path(out, "guide.json").write_text(json.dumps({"accuracy": accuracy, "zero3": is_ds_zero_3}))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
