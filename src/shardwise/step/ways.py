"""In which ways a plan lets an optimizer hold and step its parameters, played on stand-ins w and v; pure data.

    plain      one optimizer   [w, v], in their shapes, together              plain torch, and wholes at stage 0
    flat       one optimizer   [w flat, v flat]                               at every stage
    apart      two ranks       [w flat] | [v flat]                            where a rank has parts of the parameters
    parted     three ranks     [] | [w 0:k, v 0:k] | [w k:, v k:]
    visiting   as before, each part in a call of its own                      where states rest off the device

Stand-ins of groups that are stepped whole stay uncut and in their shapes: together, or each on one rank in a call of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .rehearsal import Cuts, StandIn, Way

INSTEAD = (
    "Take an optimizer that works element by element, as torch's Adam, AdamW, SGD, Adagrad, RMSprop and their like."
)


@dataclass(frozen=True)
class Handling:
    """What a plan does to an optimizer, beside holding every parameter as a flat row.

    parted: a rank has parts of the parameters. visits: parts are stepped in calls of their own. ranks: how many there are.
    """

    parted: bool
    visits: bool
    ranks: int

    @property
    def together(self) -> bool:
        """Whether each rank has all parameters in place: what is stepped whole is stepped in one call, by every rank."""
        return not self.parted and not self.visits


@dataclass(frozen=True)
class Difference:
    """What is different in a way of shards. where: in words that go on from "got other numbers". advice: what to do."""

    way: Way
    where: str
    advice: str
    failing: str = "cannot work on shards"


class Ways:
    """Those of one plan. wholes: numbers of the groups that are stepped whole."""

    def __init__(self, stand_ins: Sequence[StandIn], wholes: Collection[int], handling: Handling) -> None:
        self._stand_ins = stand_ins
        self._handling = handling
        self._everything = [(n, 0, s.start.numel()) for n, s in enumerate(stand_ins)]
        self._every = frozenset(range(len(stand_ins)))
        self._uncut = frozenset(n for n, s in enumerate(stand_ins) if s.group in wholes)
        self.plain = Way([self._everything], shaped=self._every, plain=True)

    def differences(self, *, counts: bool) -> Iterator[Difference]:
        """What is different, one after another. counts: whether a group counts its steps."""
        yield Difference(
            Way(self.plain.twins, self._uncut),
            "where parameters are flat rows, as every zero_stage holds them",
            INSTEAD,
        )
        cuts, every = self._parts()
        advice = f"With zero_stage 0 it works, for there each rank steps all parameters together. {INSTEAD}"
        if self._handling.parted:
            yield Difference(
                Way([self._everything[0::2], self._everything[1::2]], self._uncut, counts=counts),
                "when two parameters were stepped apart, on two ranks, and not together: it has a norm or a rate over several "
                "parameters",
                advice,
            )
            yield Difference(
                Way(cuts, self._uncut, counts=counts),
                "when two parts of a parameter were stepped apart, on two ranks, and not together: it has a norm or a mean "
                "over a parameter",
                advice,
            )
        if self._handling.visits:
            yield Difference(
                Way(cuts if self._handling.parted else [every], self._uncut, self._every, counts),
                "where parts are stepped one after another, each in a call of its own, as offloaded states are: it looks at "
                "several parameters, or keeps something for a group that depends on them",
                "Set offload_optimizer_device: none, or take an optimizer that keeps everything with its parameters.",
                "cannot be offloaded",
            )
        elif self._handling.parted and self._uncut:
            yield Difference(
                Way(cuts, self._uncut, self._uncut, counts),
                "when parameters were stepped whole, each by one rank in a call of its own, and not together: it has a norm or "
                "a rate over several parameters",
                advice,
            )

    def _parts(self) -> tuple[list[Cuts], Cuts]:
        """(what two ranks have, all of it). The first part of each ends in the middle of a row."""
        first: list[tuple[int, int, int]] = []
        second: list[tuple[int, int, int]] = []
        for number, stand_in in enumerate(self._stand_ins):
            numel = stand_in.start.numel()
            if number in self._uncut:
                (first, second)[number % 2].append((number, 0, numel))
                continue
            cut = max(1, numel * 2 // 5)
            first.append((number, 0, cut))
            second += [(number, cut, numel)] if cut < numel else []
        return [[], first, second], [*first, *second]
