"""The settings of the parity table, and a small set of cases in which every pair of settings meets.

A case is one value of each axis. The whole table is every legal case; the cover is the part that `make test` runs.
Plain data: this file imports no torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, fields

STEPS = 20
SAMPLES = 24  # a global batch: 4 micro-batches of 6, which 1, 2 and 3 ranks share evenly


@dataclass(frozen=True)
class Placement:
    """A stage, and where what is offloaded of it rests."""

    stage: int
    optimizer: str | None = None
    params: str | None = None

    def __str__(self) -> str:
        drive = "-nvme" if "nvme" in (self.optimizer, self.params) else ""
        return f"zero{self.stage}" + ("-opt" if self.optimizer else "") + ("-params" if self.params else "") + drive


# Offloading the optimizer needs it sharded (stage 1), offloading parameters needs them sharded (stage 3).
PLACEMENTS = (
    Placement(0),
    Placement(1),
    Placement(1, "cpu"),
    Placement(2),
    Placement(2, "cpu"),
    Placement(3),
    Placement(3, "cpu"),
    Placement(3, None, "cpu"),
    Placement(3, "cpu", "cpu"),
    Placement(1, "nvme"),
    Placement(2, "nvme"),
    Placement(3, "nvme"),
    Placement(3, None, "nvme"),
    Placement(3, "nvme", "nvme"),
)
TUNINGS = ("full", "lora", "lora+save")
MODES = ("plain", "accumulated", "checkpointed", "reentrant", "tied", "bart")
WORLDS = (1, 2, 3)
OPTIMIZERS = ("adamw", "adamw-groups", "sgd", "adamw-scheduled")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    mode: "accumulated" is 4 micro-batches a step and clipping at the norm 0.5; "tied" is a Llama whose head is its
          embedding; "bart" is an encoder-decoder whose three embeddings are one.
    group: how many ranks hold one copy of the model together, None for all; all_own: all ranks divide masters and states.
    """

    placement: Placement
    tuning: str
    mode: str
    world: int
    optimizer: str
    group: int | None = None
    all_own: bool = False

    def __str__(self) -> str:
        ranks = (
            f"x{self.world}"
            if self.group is None
            else f"x{self.world}in{self.group}" + ("-own" if self.all_own else "")
        )
        return f"{self.placement}-{self.tuning}-{self.mode}-{self.optimizer}-{ranks}"

    @property
    def model(self) -> str:
        """Which tiny model the case trains."""
        return self.mode if self.mode in ("tied", "bart") else "llama"

    @property
    def clip(self) -> float | None:
        """The norm that the gradients are clipped at."""
        return 0.5 if self.mode == "accumulated" else None


AXES: tuple[tuple[object, ...], ...] = (PLACEMENTS, TUNINGS, MODES, WORLDS, OPTIMIZERS)


def whole_table() -> list[Case]:
    """Every placement x tuning x mode x world; the optimizer goes round with the row."""
    rows = itertools.product(PLACEMENTS, TUNINGS, MODES, WORLDS)
    return [Case(*row, OPTIMIZERS[i % len(OPTIMIZERS)]) for i, row in enumerate(rows)]


def pairwise_cover() -> list[Case]:
    """Cases in which every two values of different axes meet at least once; the same list every time.

    Greedy: each new case takes, axis by axis from the longest, the value that makes most of the pairs not met yet,
    and of equal ones the value used least so far: that spreads ranks and tunings evenly over the rows which the
    longest axes need.
    """
    order = sorted(range(len(AXES)), key=lambda axis: -len(AXES[axis]))
    unmet = {((a, x), (b, y)) for a, b in itertools.combinations(range(len(AXES)), 2) for x in AXES[a] for y in AXES[b]}
    used: Counter[tuple[int, object]] = Counter()
    cases = []
    while unmet:
        chosen: dict[int, object] = {}
        # Starting from a pair not met yet makes sure that every case is worth its time.
        (a, x), (b, y) = min(unmet, key=_in_table_order)
        chosen[a], chosen[b] = x, y
        for axis in order:
            if axis not in chosen:
                worth = {value: (_newly_met(unmet, chosen, axis, value), -used[axis, value]) for value in AXES[axis]}
                chosen[axis] = max(AXES[axis], key=worth.__getitem__)
        used.update(chosen.items())
        unmet -= set(_pairs(chosen))
        cases.append(Case(*(chosen[axis] for axis in range(len(AXES)))))  # type: ignore[arg-type]
    return cases


def _in_table_order(pair: tuple[tuple[int, object], tuple[int, object]]) -> tuple[int, int, int, int]:
    (a, x), (b, y) = pair
    return a, b, AXES[a].index(x), AXES[b].index(y)


def _newly_met(unmet: set[object], chosen: dict[int, object], axis: int, value: object) -> int:
    return sum(pair in unmet for pair in _pairs({**chosen, axis: value}))


def _pairs(chosen: dict[int, object]) -> list[tuple[tuple[int, object], tuple[int, object]]]:
    return list(itertools.combinations(sorted(chosen.items(), key=lambda item: item[0]), 2))


# Two copies of the model, each over two ranks (`shard_group: 2`). What rests and what is sent is held in tests/ranks.
IN_GROUPS = (
    Case(Placement(1), "full", "plain", 4, "adamw-groups", 2),
    Case(Placement(2, "cpu"), "lora", "bart", 4, "adamw", 2),
    Case(Placement(3), "lora+save", "checkpointed", 4, "adamw-scheduled", 2),
    Case(Placement(3, "cpu", "cpu"), "full", "tied", 4, "sgd", 2),
    Case(Placement(3), "full", "plain", 4, "adamw", 2, all_own=True),
)

assert len(fields(Case)) == len(AXES) + 2
