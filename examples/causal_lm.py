"""Fine-tune a causal language model to continue a message with its label, with LoRA or another PEFT method.

    shardwise launch --config_file examples/zero3_offload_cpu.yaml examples/causal_lm.py
    shardwise launch --config_file ds_zero3_cpu.yaml examples/causal_lm.py --model bigscience/bloomz-560m \
        --dataset twitter_complaints

Without --model and --dataset it needs no network: it trains the base model of this repository on its messages.
"""

from __future__ import annotations

import torch
from peft import TaskType, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed

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
        "Fine-tune a causal language model on labelled messages.",
        name="causal_lm",
        base_model="causal_lm",
        num_epochs=20,
    )
    steps = args.gradient_accumulation_steps
    settings = {} if steps is None else {"gradient_accumulation_steps": steps}
    accelerator = Accelerator(project_config=project_of(args), log_with=args.log_with, **settings)
    set_seed(args.seed)
    text_column, label_column = args.text_column, args.label_column

    # Messages, tokenized by one process per run and read from its cache by the others.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ending = tokenizer(prompt_of("", args).removeprefix(f"{text_column} : "), add_special_tokens=False)["input_ids"]

    def prompt_ids(text: str) -> list[int]:
        """The prompt's ids, at most max_length: a long message loses its end, never the question after it."""
        ids = tokenizer(prompt_of(text, args))["input_ids"]
        if ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text; here the label is still to come
            ids = ids[:-1]
        return ids if len(ids) <= args.max_length else ids[: args.max_length - len(ending)] + ending

    def tokenize_prompts(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Prompts alone: what the model continues in evaluation and test."""
        prompts = [prompt_ids(text) for text in rows[text_column]]
        return {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts]}

    def tokenize_examples(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Prompts followed by their labels and the end token; only these count in the loss."""
        features: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for text, label in zip(rows[text_column], rows[label_column], strict=True):
            prompt = prompt_ids(text)
            answer = [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            features["input_ids"].append(prompt + answer)
            features["attention_mask"].append([1] * len(prompt + answer))
            features["labels"].append([-100] * len(prompt) + answer)
        return features

    with accelerator.main_process_first():
        dataset = load_messages(args)
        columns = dataset["train"].column_names
        train_dataset = dataset["train"].map(tokenize_examples, batched=True, remove_columns=columns)
        prompts = {
            part: rows.map(tokenize_prompts, batched=True, remove_columns=rows.column_names)
            for part, rows in dataset.items()
        }
    accelerator.wait_for_everyone()

    # Padding goes to the right in training, where positions count from the left, and to the left in generation, where
    # every prompt must end at the same place.
    fill_right, fill_left = pad_features(tokenizer, side="right"), pad_features(tokenizer, side="left")
    pin = accelerator.device.type == "cuda"
    train_dataloader = DataLoader(
        train_dataset, shuffle=True, collate_fn=fill_right, batch_size=args.batch_size, pin_memory=pin
    )
    eval_dataloader = DataLoader(prompts["train"], collate_fn=fill_left, batch_size=args.batch_size, pin_memory=pin)
    test_dataloader = None
    if args.do_test:
        test_dataloader = DataLoader(prompts["test"], collate_fn=fill_left, batch_size=args.batch_size, pin_memory=pin)

    # The model, its adapter, the optimizer and the schedule.
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    peft_config = adapter_config(args, TaskType.CAUSAL_LM)
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
                outputs = accelerator.unwrap_model(model).generate(
                    **batch,
                    synced_gpus=is_ds_zero_3,
                    max_new_tokens=args.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                outputs = outputs[:, batch["input_ids"].shape[1] :]
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
        rows = train_dataset.select(range(min(8, len(train_dataset))))
        reference = reference_logits(model, fill_right(list(rows)), accelerator.device)
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
