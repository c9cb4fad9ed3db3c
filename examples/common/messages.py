"""The messages: where they come from, and how they become padded batches of token ids."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from datasets import DatasetDict, load_dataset

from .arguments import EMBEDDED, EXAMPLES
from .data_files import has_values, read_rows, text_of

Features = list[dict[str, Any]]


def load_messages(args: argparse.Namespace) -> DatasetDict:
    """The labelled messages as "train" and, with --do-test, those to predict as "test"; messages and labels are text.

    Raises SystemExit with one sentence if a file has no message, or a column is missing.
    """
    if args.data_file is None and args.dataset != EMBEDDED:
        # The hub's own parquet copy: this data set is published as a script, which `datasets` no longer runs.
        base = f"hf://datasets/ought/raft@~parquet/{args.dataset}"
        files = {"train": f"{base}/train/*.parquet", "test": f"{base}/test/*.parquet"}
        messages = load_dataset("parquet", data_files=files if args.do_test else {"train": files["train"]})
        if args.test_file is not None:
            messages["test"] = read_rows([args.test_file])
    else:
        messages = DatasetDict({"train": read_rows([args.data_file or EXAMPLES / "data" / "train.csv"])})
        if args.do_test:
            messages["test"] = read_rows([args.test_file or EXAMPLES / "data" / "test.csv"])
    for part, rows in messages.items():
        needed = [args.text_column] if part == "test" else [args.text_column, args.label_column]
        for column in needed:
            if column not in rows.column_names:
                raise SystemExit(
                    f"the {part} messages have no column {column!r}, only {rows.column_names}; name the "
                    "right ones with --text-column and --label-column."
                )
    if args.max_train_samples is not None:
        messages["train"] = messages["train"].select(range(min(args.max_train_samples, len(messages["train"]))))
    test = messages.get("test")
    if test is not None and args.label_column in test.column_names and not has_values(test, args.label_column):
        messages["test"] = test.remove_columns(args.label_column)
    for part, rows in messages.items():
        for column in (args.text_column, args.label_column):
            if column in rows.column_names:
                messages[part] = text_of(messages[part], column, f"{part} messages")
    if "test" in messages and args.label_column in messages["test"].column_names:
        known = set(messages["train"][args.label_column])
        if not known & set(messages["test"][args.label_column]):  # a placeholder, such as "Unlabeled"
            messages["test"] = messages["test"].remove_columns(args.label_column)
    return messages


def prompt_of(text: str, args: argparse.Namespace) -> str:
    """The message as the model reads it; it ends where the label begins."""
    return f"{args.text_column} : {text} {args.label_column} :"


def pad_features(tokenizer: Any, side: str) -> Callable[[Features], dict[str, torch.Tensor]]:
    """A collate function that pads each batch to its longest row, on the given side ("left" or "right").

    It gives input_ids, attention_mask (0 on padding) and, where the features have them, labels (-100 on padding), all
    of shape (batch, longest), int64.
    """
    fillers = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}

    def collate(features: Features) -> dict[str, torch.Tensor]:
        batch = {}
        for key, filler in fillers.items():
            if key not in features[0]:
                continue
            width = max(len(row[key]) for row in features)
            rows = []
            for row in features:
                padding = [filler] * (width - len(row[key]))
                rows.append(padding + list(row[key]) if side == "left" else list(row[key]) + padding)
            batch[key] = torch.tensor(rows, dtype=torch.int64)
        return batch

    return collate
