"""Fine-tune a causal language model on conversations, prompts with completions, or text: LoRA, QLoRA or every weight.

    shardwise launch --config_file examples/zero3_offload_cpu.yaml --use_cpu examples/sft.py
    shardwise launch --config_file zero3.yaml examples/sft.py --model Qwen/Qwen3-8B --data chats.jsonl --merge
    shardwise launch --config_file zero3.yaml examples/sft.py --model Qwen/Qwen3-8B --data HuggingFaceH4/ultrachat_200k \
        --split train_sft --method qlora --attention flash_attention_2

Rows have `messages`, or `prompt` and `completion`, or `text`. Without --model and --data it needs no network. It leaves
<output-dir>/model, the weights of the lowest evaluation loss, as peft or transformers reads them, and, with --merge,
<output-dir>/merged, whole weights.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import TaskType, get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_scheduler, set_seed

from common.adapters import adapter_config
from common.conversations import IGNORED, Encoder, encode_rows, read_template
from common.data_files import read_rows
from common.model_card import merged_card, write_card
from common.packing import PackedRows, as_one, attends_across_rows, fill_packs, needs_one_sequence, pad_rows
from common.results import push_to_hub, reference_logits, save_logits
from common.resuming import after_step, project_of, resume
from common.sft_arguments import parse_arguments
from shardwise import Accelerator
from shardwise.checkpoint.merge import merge
from shardwise.memory import MemoryTracker

Batch = dict[str, torch.Tensor]


class Progress:
    """Where the run is; part of every checkpoint. The two sums are this process's, since the last line that was printed."""

    def __init__(self, device: torch.device) -> None:
        self.steps, self.evaluated_at, self.best_step, self.best_loss = 0, -1, 0, math.inf
        # Losses of micro-batches as `backward` was given them, and how many: so their mean is that of metrics.jsonl.
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        vars(self).update({key: value for key, value in state.items() if key != "sums"})


def load_rows(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and to evaluate on (None without any), with the columns that --columns names renamed."""
    if Path(args.data[0]).is_file():
        rows = read_rows([Path(source) for source in args.data])
    else:
        rows = load_dataset(args.data[0], split=args.split)
    held = None if args.eval_data is None else read_rows(args.eval_data)
    for pair in args.columns:
        name, _, column = pair.partition("=")
        if column not in rows.column_names:
            raise SystemExit(f"--columns {pair}: there is no column {column!r}, only {rows.column_names}.")
        if name in rows.column_names and name != column:
            rows = rows.remove_columns(name)
        rows = rows.rename_column(column, name)
        if held is not None and column in held.column_names:
            held = held.rename_column(column, name)
    if args.max_train_samples is not None:
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    if held is None and args.eval_fraction:
        if len(rows) < 2:
            raise SystemExit("one row cannot be divided: take --eval-fraction 0, or name --eval-data.")
        count = min(max(1, round(args.eval_fraction * len(rows))), len(rows) - 1)
        parts = rows.train_test_split(test_size=count, seed=args.seed)
        rows, held = parts["train"], parts["test"]
    return rows, held


def longest_row(args: argparse.Namespace, tokenizer: Any) -> int:
    """--max-length, or 1024; no more than the model has positions for."""
    config = AutoConfig.from_pretrained(args.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if args.max_length is not None and args.max_length > positions:
        raise SystemExit(f"--max-length {args.max_length} exceeds the {positions} positions of {args.model}.")
    return args.max_length or min(1024, positions)


def load_model(args: argparse.Namespace, accelerator: Accelerator) -> torch.nn.Module:
    """The model as it is trained: shapes until `prepare` gives each rank its part of the weights."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if args.attention is not None:
        options["attn_implementation"] = args.attention
    if args.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    with accelerator.init():
        model = AutoModelForCausalLM.from_pretrained(args.model, **options)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = adapter_config(args, TaskType.CAUSAL_LM)
    return model if config is None else get_peft_model(model, config)


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained, with its states in 32 or in 8 bits."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=args.lr, weight_decay=args.weight_decay)
    return torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)


def windows(accelerator: Accelerator, batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of each optimizer step: `size` of them, the last ones of an epoch maybe fewer."""
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size or accelerator.gradient_state.end_of_dataloader:
            yield window
            window = []


def answers_in(window: list[Batch]) -> torch.Tensor:
    """How many tokens of each of these batches have a loss, (batches,) int64."""
    return torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in window])


def forward(model: torch.nn.Module, batch: Batch, *, in_one: bool, with_labels: bool) -> Any:
    """The model's outputs; `in_one` lays packed sequences behind one another, as flash attention reads them."""
    inputs = {key: value for key, value in batch.items() if with_labels or key != "labels"}
    if in_one and "position_ids" in batch:
        inputs = as_one(inputs)
    # A cache is of no use here, and with one transformers does not look for packed rows.
    return model(**inputs, use_cache=False)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, loader: Iterable[Batch], *, in_one: bool
) -> tuple[float, int]:
    """The loss per answer token over all rows of all ranks, each counted once, and the number of these tokens."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        logits = forward(model, batch, in_one=in_one, with_labels=False).logits
        logits = logits.reshape(*batch["labels"].shape, -1)
        sums = []
        for row, labels in zip(logits, batch["labels"], strict=True):  # row by row: float32 logits of one at a time
            kept = labels[1:] != IGNORED
            loss = F.cross_entropy(row[:-1][kept].float(), labels[1:][kept], reduction="sum")
            sums.append(torch.stack([loss.double(), kept.sum().double()]))
        total += accelerator.gather_for_metrics(torch.stack(sums)).sum(0)
    model.train()
    return (total[0] / total[1]).item(), int(total[1])


def save_model(accelerator: Accelerator, model: torch.nn.Module, tokenizer: Any, target: Path, facts: dict) -> None:
    """Write model or adapter, tokenizer and card, in the place of the last ones once all is there. Every rank calls it."""
    fresh = target.with_name(f"{target.name}.new")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    model.save_pretrained(fresh)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(fresh)
        write_card(fresh, facts)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    accelerator.wait_for_everyone()


def main() -> None:
    args = parse_arguments("Fine-tune a causal language model on conversations, prompts with completions, or text.")
    # The schedule is stepped below, once for each optimizer step.
    accelerator = Accelerator(
        project_config=project_of(args), log_with=args.log_with, step_scheduler_with_optimizer=False
    )
    if args.gradient_accumulation_steps is not None:
        accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    set_seed(args.seed)
    target = args.output_dir / "model"

    # Rows become token ids on one process per run; the others read them from its cache.
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = read_template(args.chat_template) or tokenizer.chat_template
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    max_length = longest_row(args, tokenizer)
    with accelerator.main_process_first():
        encoder = Encoder(tokenizer, tokenizer.chat_template, max_length)
        train_rows, eval_rows = load_rows(args)
        train_rows, summary = encode_rows(train_rows, encoder, "training data")
        said = summary.lines("training data", max_length)
        if eval_rows is not None:
            eval_rows, eval_summary = encode_rows(eval_rows, encoder, "evaluation data")
            said += eval_summary.lines("evaluation data", max_length)
    accelerator.wait_for_everyone()

    def loader_of(rows: Dataset, *, shuffle: bool) -> DataLoader:
        if not args.packing:
            data, collate = rows, pad_rows(pad_token_id)
        else:
            data, collate = PackedRows(rows, max_length), fill_packs(pad_token_id, max_length)
            said.append(
                f"packed: {len(rows)} rows in {len(data)} sequences of {max_length}, {100 * data.fill:.1f}% full"
            )
        pin = accelerator.device.type == "cuda"
        return DataLoader(data, shuffle=shuffle, collate_fn=collate, batch_size=args.batch_size, pin_memory=pin)

    train_loader = loader_of(train_rows, shuffle=True)
    eval_loader = None if eval_rows is None else loader_of(eval_rows, shuffle=False)
    accelerator.print(*said, sep="\n")

    # The model, the optimizer and the schedule.
    model = load_model(args, accelerator)
    if args.method != "full" and accelerator.is_main_process:
        model.print_trainable_parameters()
    optimizer = make_optimizer(args, model)
    train_loader, eval_loader = accelerator.prepare(train_loader, eval_loader)
    window_size = accelerator.gradient_accumulation_steps
    steps_per_epoch = -(-len(train_loader) // window_size)
    total_steps = steps_per_epoch * args.num_epochs
    schedule = get_scheduler(args.schedule, optimizer, round(args.warmup * total_steps), total_steps)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    in_one = needs_one_sequence(model)
    if args.packing and attends_across_rows(model, len(tokenizer), accelerator.device):
        raise SystemExit(
            f"{args.model} lets packed rows see each other: its attention reads no positions. Give --no-packing."
        )

    progress = Progress(accelerator.device)
    accelerator.register_for_checkpointing(progress)
    resume(accelerator, args)
    if progress.best_step and not target.is_dir():
        accelerator.print(f"{target}, the best weights so far, is not there: the next evaluation's are saved.")
        progress.best_loss = math.inf
    if args.log_with is not None:
        accelerator.init_trackers("sft", config={key: str(value) for key, value in vars(args).items()})

    def evaluate_and_keep() -> None:
        """Evaluate, and save the model if it is the best so far, or if there is nothing to evaluate on."""
        progress.evaluated_at = progress.steps
        facts = {"args": args, "summary": summary, "steps": progress.steps, "processes": accelerator.num_processes}
        if eval_loader is not None:
            loss, tokens = evaluate(accelerator, model, eval_loader, in_one=in_one)
            accelerator.print(
                f"eval: step={progress.steps} loss_per_token={loss:.6f} ppl={math.exp(loss):.3f} {tokens=}"
            )
            accelerator.log({"eval_loss": loss}, step=progress.steps)
            if not loss < progress.best_loss:
                return
            progress.best_loss, facts["eval_loss"] = loss, loss
        progress.best_step = progress.steps
        save_model(accelerator, model, tokenizer, target, facts)
        if args.save_logits is not None:
            rows = [train_rows[number] for number in range(min(4, len(train_rows)))]
            batch = {key: value for key, value in pad_rows(pad_token_id)(rows).items() if key != "labels"}
            reference = reference_logits(model, batch, accelerator.device)
            model.train()
            if accelerator.is_main_process:
                save_logits(args.save_logits, reference)

    def is_due(step: int) -> bool:
        return step % steps_per_epoch == 0 or (args.eval_every is not None and step % args.eval_every == 0)

    if progress.steps and is_due(progress.steps) and progress.evaluated_at != progress.steps:
        evaluate_and_keep()  # a checkpoint is saved before the evaluation of its step
    model.train()
    # A prepared loader knows its epoch, and goes on within it after a resume. What is watched is in output_dir/metrics.jsonl.
    for epoch in range(train_loader.iteration, args.num_epochs):
        with MemoryTracker("train", accelerator.device) as memory:
            batches = accelerator.watch(train_loader, epochs=args.num_epochs, log_every=args.log_every)
            for window in windows(accelerator, batches, window_size):
                # Each answer token of the step counts alike, on whichever rank and in whichever micro-batch it is: `backward`
                # divides by the micro-batches, and the engine by the ranks.
                accelerator.gradient_accumulation_steps = len(window)
                answers = answers_in(window)
                scale = len(window) * accelerator.num_processes / accelerator.reduce(answers.sum().double(), "sum")
                for number, (batch, learned) in enumerate(zip(window, answers, strict=True), start=1):
                    with nullcontext() if number == len(window) else accelerator.no_sync(model):
                        loss = forward(model, batch, in_one=in_one, with_labels=True).loss
                        loss = loss * learned * scale.to(loss.dtype)
                        accelerator.backward(loss)
                    progress.sums[0] += loss.detach()
                    progress.sums[1] += 1
                if args.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                rate = schedule.get_last_lr()[0]
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    schedule.step()
                optimizer.zero_grad()
                step = progress.steps + 1
                if step % args.log_every == 0 or step % steps_per_epoch == 0:  # as metrics.jsonl has lines
                    losses, count = accelerator.reduce(progress.sums, "sum").tolist()
                    accelerator.print(f"step={step}/{total_steps} loss={losses / count:.6f} lr={rate:.3g}")
                    progress.sums.zero_()
                if after_step(accelerator, args, progress):
                    return
                if is_due(progress.steps):
                    evaluate_and_keep()
        accelerator.print(memory.report())
        accelerator.print(f"{epoch=}: {progress.steps} steps, best step={progress.best_step}")

    if not target.is_dir():  # resumed behind the last step, in another directory
        evaluate_and_keep()
    # What follows is one process's work, and may take longer than the others would wait.
    alone = accelerator.is_main_process
    accelerator.end_training()
    if not alone:
        return
    print(f"saved: {target}, of step {progress.best_step}")
    published = target
    if args.merge:
        published = write_merged(args, tokenizer, target)
        print(f"merged: {published}")
    if args.push_to_hub is not None:
        push_to_hub(published, args.push_to_hub)


def write_merged(args: argparse.Namespace, tokenizer: Any, adapter: Path) -> Path:
    """The base with the adapter in it, in --dtype, file by file: no model is in memory. Its directory."""
    from huggingface_hub import snapshot_download

    base = args.model if Path(args.model).is_dir() else snapshot_download(args.model)
    fresh, target = args.output_dir / "merged.new", args.output_dir / "merged"
    shutil.rmtree(fresh, ignore_errors=True)
    merge(base, adapter, fresh, dtype=getattr(torch, args.dtype))
    tokenizer.save_pretrained(fresh)
    card = (adapter / "README.md").read_text(encoding="utf-8")
    (fresh / "README.md").write_text(merged_card(card), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    return fresh.rename(target)


if __name__ == "__main__":
    main()
