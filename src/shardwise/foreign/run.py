"""Another library's run as it is found in its files, in our words: what an import writes.

Weights and optimizer states are pieces of each rank that saved, which are read when they are written. Everything else is small
and goes into rank 0's state. What the files do not hold, or hold in a form that cannot be carried over, is a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.codec import encode
from ..checkpoint.pieces import Piece, given_piece, whole_pieces
from ..checkpoint.write import Draft
from ..errors import CheckpointError
from ..files.writer import Spec, dtype_name
from ..ranks.agreeing import attempt
from ..step.state_kinds import MACHINE

MODEL = "model0"


@dataclass
class ForeignOptimizer:
    """names: of the weights of each parameter group. settings: of each group. numbers: of each weight, its step count."""

    names: list[list[str]] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int = 0


@dataclass
class ForeignRun:
    """Everything that was found.

    source:     the library and its version, as a sentence names them.
    pieces:     of each rank that saved, its weights and optimizer states, under our addresses.
    optimizer:  None where the files hold none. schedulers, objects: their states, in the order in which they were prepared.
    scaler:     our loss scale's state. counter: the accumulation step. generators: of each rank, {} where there are none.
    facts:      of the model, see `facts_of`. beside: name of a file in the checkpoint -> its text.
    lacks:      of "scheduler", "registered object" those of which the files say nothing.
    notes:      a sentence for each thing that is not carried over.
    """

    source: str
    pieces: list[list[Piece]]
    optimizer: ForeignOptimizer | None = None
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=lambda: {"value": 1.0, "good_steps": 0})
    counter: int = 0
    generators: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drafts(self) -> list[Draft]:
        """A draft of each rank's part. Raises CheckpointError for what a checkpoint cannot hold."""
        found = []
        for rank, pieces in enumerate(self.pieces):
            tensors: dict[str, Tensor] = {}
            state = encode(self._state(rank), tensors, "state")
            found.append(Draft([*pieces, *whole_pieces(tensors)], state))
        return found

    def _state(self, rank: int) -> dict[str, Any]:
        optimizers: list[dict[str, Any]] = []
        if self.optimizer is not None:
            mine = self.optimizer
            optimizers.append({"numbers": {}, "names": [[] for _ in mine.names]})
            if rank == 0:
                optimizers[0] |= {
                    "numbers": {f"{MODEL}/{name}": numbers for name, numbers in mine.numbers.items()},
                    "names": [sorted(f"{MODEL}/{name}" for name in group) for group in mine.names],
                    "groups": mine.settings,
                    "steps": mine.steps,
                    "step_was_skipped": False,
                    "besides": {},
                }
        generators = self.generators[rank] if rank < len(self.generators) else {}
        state = {"buffers": {}, "generators": generators, "optimizers": optimizers, "loaders": []}
        if rank:
            return {**state, "objects": None}
        return {
            **state,
            "models": 1,
            "schedulers": self.schedulers,
            "scaler": self.scaler,
            "counters": {"step": self.counter},
            "objects": self.objects,
            "lacks": self.lacks,
        }


def piece(address: str, shape: Iterable[int], begin: int, values: Tensor, dtype: torch.dtype) -> Piece:
    """The piece of a tensor that begins at element `begin`. values: (numel,), written in `dtype`."""
    dtype_name(dtype)  # raises for one that a file cannot hold
    return given_piece(address, tuple(shape), begin, Spec(address, dtype, (values.numel(),)), lambda: values.to(dtype))


def whole_piece(address: str, values: Tensor, dtype: torch.dtype | None = None) -> Piece:
    return piece(address, values.shape, 0, values.reshape(-1), dtype or values.dtype)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a trained weight that was kept in `dtype` is kept here."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def settings_of(group: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """A parameter group's settings that belong to the run and not to the machine. Raises CheckpointError for odd values."""
    kept = {name: value for name, value in group.items() if name not in (*MACHINE, "params", "param_names", "step")}
    encode(kept, {}, where)
    return kept


def can_be_kept(value: Any) -> bool:
    """Whether a checkpoint can hold `value` as a part of its state."""
    _, error = attempt(lambda: encode(value, {}, "state"))
    if error is not None and not isinstance(error, CheckpointError):
        raise error
    return error is None
