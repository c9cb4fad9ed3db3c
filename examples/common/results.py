"""What a run leaves behind: predictions, the adapter on the Hub, and logits to check the saved adapter against."""

from __future__ import annotations

import csv
import difflib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file

# Of the run: they name directories of this machine.
RECORDS = ["metrics*.jsonl", "run.json", "report.html"]


def accuracy_of(predictions: list[str], labels: list[str]) -> float:
    """The share of predictions equal to their label, in percent; blanks around either do not count."""
    right = sum(guess.strip() == label.strip() for guess, label in zip(predictions, labels, strict=True))
    return 100 * right / len(labels)


def nearest_label(prediction: str, labels: list[str]) -> str:
    """The known label whose spelling is closest to what the model wrote."""
    return max(labels, key=lambda label: difflib.SequenceMatcher(None, prediction.strip(), label).ratio())


def write_predictions(path: Path, rows: Dataset, predictions: list[str], text_column: str, label_column: str) -> None:
    """Write a CSV with one line per message: its ID (its place, if it has none), its text and the predicted label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = rows["ID"] if "ID" in rows.column_names else range(len(rows))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ID", text_column, label_column])
        writer.writerows(zip(names, rows[text_column], predictions, strict=True))


@torch.no_grad()
def reference_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
    """The batch and the model's logits on it, on the CPU. Every rank calls it: sharded weights are gathered within."""
    model.eval()
    outputs = model(**{key: value.to(device) for key, value in batch.items()})
    return {**batch, "logits": outputs.logits.float().cpu()}


def save_logits(path: Path, reference: dict[str, torch.Tensor]) -> None:
    """Write what `reference_logits` gave as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in reference.items()}, path)


def push_to_hub(directory: Path, repository: str) -> None:
    """Upload the output directory; the repository is made if it does not exist."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=directory, ignore_patterns=["checkpoints/*", *RECORDS])
