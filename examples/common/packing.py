"""Rows behind one another in sequences of one length, without attending to each other; and rows side by side, padded.

    packed      a a a a b b c c c .     positions 0 1 2 3 0 1 0 1 2 0     one sequence of --max-length tokens
    padded      a a a a                 positions 0 1 2 3
                b b . .                           0 1                     with an attention mask

Where positions begin again, another row begins. transformers reads it so: from positions without an attention mask it makes
the block mask of SDPA, eager and flex attention, and the lengths that flash attention takes for sequences of varying length.
That path wants all in one sequence, so there the sequences of a batch are laid behind one another: see `as_one`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset as Rows
from torch import Tensor
from torch.utils.data import Dataset

from .conversations import IGNORED

Batch = dict[str, Tensor]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of rows, put together so that each list's lengths sum to `capacity` at most. Best fit, longest first.

    [5, 2, 4, 3] in 7: [[0, 1], [2, 3]]. The same on every rank. Raises ValueError for a row that is longer.
    """
    packs: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, number of the pack), ascending
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row] > capacity:
            raise ValueError(f"row {row} has {lengths[row]} tokens, more than {capacity}")
        place = bisect.bisect_left(free, (lengths[row], -1))
        if place == len(free):
            packs.append([row])
            room, number = capacity - lengths[row], len(packs) - 1
        else:
            room, number = free.pop(place)
            packs[number].append(row)
            room -= lengths[row]
        if room:
            bisect.insort(free, (room, number))
    return packs


class PackedRows(Dataset[list[dict[str, Any]]]):
    """Item i is the rows of pack i."""

    def __init__(self, rows: Rows, capacity: int) -> None:
        self.rows = rows
        self.packs = pack([len(ids) for ids in rows["input_ids"]], capacity)
        self.fill = sum(len(ids) for ids in rows["input_ids"]) / (capacity * len(self.packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return [self.rows[row] for row in self.packs[number]]


def fill_packs(pad_token_id: int, capacity: int) -> Callable[[list[list[dict[str, Any]]]], Batch]:
    """A collate function over packs: input_ids, labels and position_ids, (packs, capacity), int64.

    What is left of a sequence is a row of its own, of padding without labels. All batches have one shape, so that compiled
    models are compiled once.
    """

    def collate(packs: list[list[dict[str, Any]]]) -> Batch:
        batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "position_ids": []}
        for rows in packs:
            ids = [token for row in rows for token in row["input_ids"]]
            rest = capacity - len(ids)
            positions = [position for row in rows for position in range(len(row["input_ids"]))]
            batch["input_ids"].append(ids + [pad_token_id] * rest)
            batch["labels"].append([label for row in rows for label in row["labels"]] + [IGNORED] * rest)
            batch["position_ids"].append(positions + list(range(rest)))
        return {key: torch.tensor(value, dtype=torch.int64) for key, value in batch.items()}

    return collate


def pad_rows(pad_token_id: int) -> Callable[[list[dict[str, Any]]], Batch]:
    """A collate function over rows: input_ids, labels and attention_mask, (rows, longest), int64."""

    def collate(rows: list[dict[str, Any]]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[Any]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in rows:
            length = len(row["input_ids"])
            rest = longest - length
            batch["input_ids"].append(row["input_ids"] + [pad_token_id] * rest)
            batch["labels"].append(row["labels"] + [IGNORED] * rest)
            batch["attention_mask"].append([1] * length + [0] * rest)
        return {key: torch.tensor(value, dtype=torch.int64) for key, value in batch.items()}

    return collate


def as_one(batch: Batch) -> Batch:
    """A packed batch as one sequence, (1, packs * capacity): the form in which flash attention reads lengths from positions."""
    return {key: value.reshape(1, -1) for key, value in batch.items()}


def needs_one_sequence(model: torch.nn.Module) -> bool:
    """Whether this model's attention is of the kind that takes packed rows in one sequence only."""
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


@torch.no_grad()
def attends_across_rows(model: torch.nn.Module, vocabulary: int, device: torch.device, *, length: int = 8) -> bool:
    """Whether a packed row changes the logits of the one behind it: then the model does not read positions as above.

    Two sequences differ in their first row only. A model that keeps rows apart gives the second row the same logits, to the bit
    but for layers that sum in another order (experts). Collective where the model is sharded.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(0, vocabulary, (1, length), generator=generator) for _ in range(3))
    positions = torch.arange(length).repeat(2)[None].to(device)
    was_training = model.training
    model.eval()
    logits = []
    for before in (first, other):
        ids = torch.cat([before, second], dim=1).to(device)
        logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, length:].float())
    model.train(was_training)
    return bool((logits[0] - logits[1]).abs().max() > 0.05 * logits[0].std())
