"""transformers' Seq2SeqTrainer: predict_with_generate, the best model at the end, and an evaluation after the training."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset
from trainer import CASES, forget
from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments


class Pairs(Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int, seed: int) -> None:
        self.rows = torch.randint(3, 64, (count, 8), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:5]}


def make_model() -> Any:
    set_seed(7)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "vocab_size"), 64)
    drop = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(d_model=32, forced_eos_token_id=2, **sizes, **heads, **widths, **drop, **tokens)
    return BartForConditionalGeneration(config)


def train(case: str, folder: str) -> dict[str, Any]:
    zero = {} if CASES[case] is None else {"deepspeed": CASES[case]}
    made = Seq2SeqTrainingArguments(
        output_dir=f"{folder}/{case}",
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=3e-2,
        logging_steps=1,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        predict_with_generate=True,
        generation_max_length=7,
        report_to=[],
        disable_tqdm=True,
        use_cpu=case == "ddp",
        seed=5,
        **zero,
    )
    sums: list[int] = []

    def metrics(prediction: Any) -> dict[str, float]:
        tokens = prediction.predictions
        sums.append(int(tokens[tokens > 0].sum()))
        return {"length": float((tokens > 1).sum())}

    trainer = Seq2SeqTrainer(
        model=make_model(), args=made, train_dataset=Pairs(48, 1), eval_dataset=Pairs(16, 2), compute_metrics=metrics
    )
    trainer.train()
    found: dict[str, Any] = {"log": [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]}
    found["best"] = trainer.state.best_model_checkpoint.rpartition("-")[2]
    found["after"] = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(Pairs(8, 3))
    found["tokens"] = predicted.predictions.tolist()
    found["sums"] = sums
    forget(trainer)
    return found
