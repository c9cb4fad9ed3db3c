"""Fine-tune an encoder-decoder model to write the label of a message, with LoRA or another PEFT method, under any plan.

    shardwise launch --config_file examples/zero3_offload_cpu.yaml examples/conditional_generation.py
    shardwise launch --config_file ds_zero3_cpu.yaml examples/conditional_generation.py --model facebook/bart-large \
        --dataset twitter_complaints

Without --model and --dataset it needs no network: it trains the base model of this repository on its messages.
"""

from __future__ import annotations

import torch
from peft import TaskType, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

from common.adapters import adapter_config
from common.arguments import parse_arguments
from common.messages import load_messages, pad_features, prompt_of
from common.results import (
    accuracy_of,
    nearest_label,
    push_to_hub,
    reference_logits,
    save_logits,
    write_predictions,
)
from common.resuming import Progress, after_step, project_of, resume
from shardwise import Accelerator
from shardwise.memory import MemoryTracker


def main() -> None:
    args = parse_arguments(
        "Fine-tune an encoder-decoder model on labelled messages.",
        name="conditional_generation",
        base_model="seq2seq",
        num_epochs=40,
    )
    steps = args.gradient_accumulation_steps
    settings = {} if steps is None else {"gradient_accumulation_steps": steps}
    accelerator = Accelerator(project_config=project_of(args), log_with=args.log_with, **settings)
    set_seed(args.seed)
    text_column, label_column = args.text_column, args.label_column

    # Messages, tokenized by one process per run and read from its cache by the others.
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokenize(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [prompt_of(text, args) for text in rows[text_column]]
        features = tokenizer(prompts, max_length=args.max_length, truncation=True)
        tokenized = {key: features[key] for key in ("input_ids", "attention_mask")}
        if label_column in rows:
            tokenized["labels"] = tokenizer(text_target=rows[label_column])["input_ids"]
        return tokenized

    with accelerator.main_process_first():
        dataset = load_messages(args)
        tokenized = {
            part: rows.map(tokenize, batched=True, remove_columns=rows.column_names) for part, rows in dataset.items()
        }
    accelerator.wait_for_everyone()

    collate = pad_features(tokenizer, side="right")
    pin = accelerator.device.type == "cuda"
    train_dataloader = DataLoader(
        tokenized["train"], shuffle=True, collate_fn=collate, batch_size=args.batch_size, pin_memory=pin
    )
    eval_dataloader = DataLoader(tokenized["train"], collate_fn=collate, batch_size=args.batch_size, pin_memory=pin)
    test_dataloader = None
    if args.do_test:
        test_dataloader = DataLoader(tokenized["test"], collate_fn=collate, batch_size=args.batch_size, pin_memory=pin)

    # The model, its adapter, the optimizer and the schedule.
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model, dtype=dtype)
    peft_config = adapter_config(args, TaskType.SEQ_2_SEQ_LM)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
        if accelerator.is_main_process:
            model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    updates_per_epoch = -(-len(train_dataloader) // accelerator.gradient_accumulation_steps)
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer, num_warmup_steps=0, num_training_steps=updates_per_epoch * args.num_epochs
    )
    model, train_dataloader, eval_dataloader, test_dataloader, optimizer, lr_scheduler = accelerator.prepare(
        model, train_dataloader, eval_dataloader, test_dataloader, optimizer, lr_scheduler
    )

    progress = Progress(accelerator.device)
    accelerator.register_for_checkpointing(progress)
    resume(accelerator, args)
    if args.log_with:
        accelerator.init_trackers(args.output_dir.name, config={key: str(value) for key, value in vars(args).items()})

    is_ds_zero_3 = False
    if getattr(accelerator.state, "deepspeed_plugin", None):
        is_ds_zero_3 = accelerator.state.deepspeed_plugin.zero_stage == 3

    def predict(dataloader: DataLoader) -> list[str]:
        """The labels that the model writes for every message of the loader, in its order, on every rank."""
        model.eval()
        predictions: list[str] = []
        # Weights stay gathered from batch to batch as far as there is memory; `generate` alone would keep them for one call.
        with accelerator.generation(model):
            for batch in tqdm(dataloader, disable=not accelerator.is_local_main_process):
                inputs = {key: value for key, value in batch.items() if key != "labels"}
                outputs = accelerator.unwrap_model(model).generate(
                    **inputs, synced_gpus=is_ds_zero_3, max_new_tokens=args.max_new_tokens, do_sample=False
                )
                outputs = accelerator.pad_across_processes(outputs, dim=1, pad_index=tokenizer.pad_token_id)
                outputs = accelerator.gather_for_metrics(outputs).cpu()
                predictions.extend(tokenizer.batch_decode(outputs, skip_special_tokens=True))
        return [prediction.strip() for prediction in predictions]

    # A prepared loader knows its epoch, and goes on within it after a resume. What is watched is in output_dir/metrics.jsonl.
    for epoch in range(train_dataloader.iteration, args.num_epochs):
        with MemoryTracker("train", accelerator.device) as memory:
            model.train()
            for batch in accelerator.watch(train_dataloader, epochs=args.num_epochs):
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    progress.total_loss += loss.detach().float()
                    accelerator.backward(loss)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if after_step(accelerator, args, progress):
                    return
        accelerator.print(memory.report())
        train_epoch_loss = accelerator.reduce(progress.end_epoch(len(train_dataloader)), "mean")
        train_ppl = torch.exp(train_epoch_loss)
        accelerator.print(f"{epoch=}: {train_ppl=} {train_epoch_loss=}")

        if (epoch + 1) % args.eval_every and epoch + 1 < args.num_epochs:
            continue
        with MemoryTracker("eval", accelerator.device) as memory:
            eval_preds = predict(eval_dataloader)
        accelerator.print(memory.report())
        labels = dataset["train"][label_column]
        assert len(eval_preds) == len(labels), f"{len(eval_preds)} predictions for {len(labels)} messages"
        accuracy = accuracy_of(eval_preds, labels)
        accelerator.print(f"{accuracy=}")
        accelerator.print(f"{eval_preds[:10]=}")
        accelerator.print(f"{dataset['train'][label_column][:10]=}")
        if args.stop_at_accuracy is not None and accuracy >= args.stop_at_accuracy:
            break

    if args.do_test:
        known = sorted(set(dataset["train"][label_column]))
        test_preds = [nearest_label(prediction, known) for prediction in predict(test_dataloader)]
        assert len(test_preds) == len(dataset["test"])
        if label_column in dataset["test"].column_names:
            test_accuracy = accuracy_of(test_preds, dataset["test"][label_column])
            accelerator.print(f"{test_accuracy=}")
        if accelerator.is_main_process:
            write_predictions(args.predictions_file, dataset["test"], test_preds, text_column, label_column)
            print(f"predictions: {args.predictions_file}")

    if args.save_logits is not None:
        rows = tokenized["train"].select(range(min(8, len(tokenized["train"]))))
        reference = reference_logits(model, collate(list(rows)), accelerator.device)
        if accelerator.is_main_process:
            save_logits(args.save_logits, reference)

    accelerator.wait_for_everyone()
    model.save_pretrained(args.output_dir)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
        print(f"saved: {args.output_dir}")
        if args.push_to_hub is not None:
            push_to_hub(args.output_dir, args.push_to_hub)
    accelerator.end_training()


if __name__ == "__main__":
    main()
