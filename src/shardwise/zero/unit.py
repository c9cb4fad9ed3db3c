"""A unit: the frozen and the trainable buffer of one module group, and the moves of its weights.

    RELEASED --fetch--> FETCHING --gather--> GATHERING --arrive--> GATHERED --release--> RELEASED
    RELEASED --gather--> GATHERING, where the shards rest on the device

A unit whose weights never leave (whole on the gpu, or a single rank without offload) is GATHERED for good: gather and
release cost nothing, so that the schedule needs no second path. The unit knows lanes and collectives; it does not know which
unit comes next (schedule), when autograd calls (hooks), or what an optimizer is. What it trains: `trained.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

import torch
from torch import Tensor, nn

from ..errors import StoreError, UnitStateError, WriteError
from ..offload.store import Arrival
from ..plan.blueprint import Role
from ..plan.plan import Plan, Tier
from ..ranks.activity import activity
from .compressed import dequantise, quantise
from .engine import Engine
from .flat import FlatBuffer
from .trained import Trained


class Weights(Enum):
    RELEASED = auto()
    FETCHING = auto()
    GATHERING = auto()
    GATHERED = auto()


_WEIGHT_MOVES = {
    Weights.RELEASED: {Weights.FETCHING, Weights.GATHERING},
    Weights.FETCHING: {Weights.GATHERING, Weights.RELEASED},
    Weights.GATHERING: {Weights.GATHERED},
    Weights.GATHERED: {Weights.RELEASED, Weights.GATHERING},  # GATHERING again: the schedule asks for a second copy
}


class Unit:
    """One module group.

    entries:   the modules that need the weights when they run. in_turn: they are blocks that run one after another.
    frozen:    bytes of any dtypes, or None. trained: numbers of one dtype with all that belongs to them, or None.
    """

    def __init__(
        self,
        name: str,
        entries: list[nn.Module],
        plan: Plan,
        engine: Engine,
        frozen: FlatBuffer | None,
        trained: Trained | None,
    ) -> None:
        self.name = name
        self.entries = entries
        self.in_turn = False
        self.plan = plan
        self.frozen = frozen
        self.trained = trained
        self._engine = engine
        self._parts = [buffer for buffer in self.buffers if buffer.leaves]
        self._coming: list[Arrival] = []
        self._arrived: torch.Event | None = None
        # The step that last changed the shard on the device, when that ran on a lane of its own.
        self.published: torch.Event | None = None
        # Whether a script has written trained weights, which their masters do not know yet.
        self.strayed = False
        # Whether the weights that are here came as codes, and so are not what the shards hold.
        self.rounded = False
        self.state = Weights.GATHERED

    @property
    def buffers(self) -> list[FlatBuffer]:
        """What holds its weights: frozen ones, trained ones."""
        return [b for b in (self.frozen, self.trained.buffer if self.trained is not None else None) if b is not None]

    @property
    def at_rest(self) -> Iterator[tuple[Role, Tier, int]]:
        """What rests of it on this rank, in bytes."""
        if self.frozen is not None:
            yield "frozen", self.frozen.tier, self.frozen.bytes_at_rest
        if self.trained is not None:
            yield from self.trained.at_rest

    @property
    def parts(self) -> list[FlatBuffer]:
        """The buffers that are gathered and released."""
        return self._parts

    def stay_whole(self) -> None:
        """Never be released again. Collective; the unit must be released now."""
        self.gather()
        self.arrive()
        for part in self._parts:
            part.stay_whole()
        self._parts = []

    def change_frozen(self, frozen: FlatBuffer | None) -> None:
        """Hold these frozen weights from now on. The unit must be gathered, and `frozen` whole."""
        self.frozen = frozen
        self._parts = [buffer for buffer in self.buffers if buffer.leaves]

    @property
    def travels(self) -> bool:
        """Whether a shard comes from another tier at every gather."""
        return any(part.travels for part in self._parts)

    @property
    def leaves(self) -> bool:
        """Whether there is anything to gather: False when every weight stays whole on the gpu."""
        return bool(self._parts)

    def _move(self, state: Weights) -> None:
        if state not in _WEIGHT_MOVES[self.state]:
            raise UnitStateError(
                f"unit {self.name}: {self.state.name} does not lead to {state.name}. This is a fault of "
                "shardwise; please report it with the model's class."
            )
        self.state = state

    def fetch(self) -> None:
        """Start to bring shards that rest on another tier, ahead of the gather. Does nothing where there are none."""
        if self.state is not Weights.RELEASED or not self.travels:
            return
        self._move(Weights.FETCHING)
        lanes = self._engine.lanes
        with lanes.gather.on():
            for part in self._parts:
                part.expand()
        lanes.up.wait(lanes.gather.mark())
        # Straight into this rank's slice of the whole: no staging buffer on the device.
        self._coming = [
            part.slab.fetch(part.own_slice) for part in self._parts if part.slab is not None and part.travels
        ]

    def gather(self, *, exact: bool = True) -> None:
        """Enqueue what makes the weights whole, on the gather lane; `arrive` before they are read. Collective.

        Weights that are whole, or on their way, are gathered once more: another rank asks for them.
        exact: False lets weights travel as codes where the engine compresses gathers. The same on every rank.
        """
        lane = self._engine.lanes.gather
        activity.unit(self.name)
        if self.state is Weights.GATHERING:
            self.arrive()
        again = self.state is Weights.GATHERED
        self.fetch()
        fetched = self.state is Weights.FETCHING
        self._move(Weights.GATHERING)
        sent = [part for part in self._parts if not part.has_peers]
        sources = (
            self._fetched_again(sent)
            if again and self.rounded
            else [part.own_slice if part.travels else part.shard for part in sent]
        )
        self._land()
        lane.wait(self.published)
        self.rounded = not exact and any(part.packing is not None for part in sent)
        with lane.on():
            if not fetched and not again:
                for part in self._parts:
                    part.expand()
            if self.rounded:
                self._gather_codes(sent, sources)
            elif sent:
                self._engine.ranks.shards.all_gather_together([part.whole for part in sent], sources)
            del sources
            for part in self._parts:
                part.copy_from_peers()
            self._arrived = lane.mark()

    def _gather_codes(self, parts: list[FlatBuffer], shards: list[Tensor]) -> None:
        """Fill `whole` of all parts from every rank's shard, by codes where a part has a packing. Collective, on this lane."""
        group = self._engine.ranks.shards
        sent: list[tuple[Tensor, Tensor]] = []
        for part, shard in zip(parts, shards, strict=True):
            if part.packing is None:
                sent.append((part.whole, shard))
                continue
            codes = torch.empty(part.packing.nbytes, dtype=torch.uint8, device=part.whole.device)
            own = codes.view(group.size, -1)[group.rank]
            quantise(part.numbers(shard), part.packing, own)
            sent.append((codes, own))
        group.all_gather_together([whole for whole, _ in sent], [own for _, own in sent])
        for part, (codes, _) in zip(parts, sent, strict=True):
            if part.packing is not None:
                dequantise(codes, part.packing, part.numbers(part.whole))

    def _fetched_again(self, parts: list[FlatBuffer]) -> list[Tensor]:
        """The shards of weights that are here and rounded: of what rests elsewhere, beside the whole, which may be in use."""
        lanes = self._engine.lanes
        with lanes.gather.on():
            shards = [torch.empty_like(part.own_slice) if part.travels else part.shard for part in parts]
        lanes.up.wait(lanes.gather.mark())
        self._coming = [
            part.slab.fetch(shard)
            for part, shard in zip(parts, shards, strict=True)
            if part.slab is not None and part.travels
        ]
        return shards

    def _land(self) -> None:
        """The gather lane waits for what was fetched."""
        self._engine.land(self._coming, self._engine.lanes.gather.wait)
        self._coming = []

    def arrive(self) -> None:
        """The computation waits for the gather; from here on the parameters may be read."""
        if self.state is Weights.GATHERED:
            return
        self._move(Weights.GATHERED)
        self._engine.lanes.compute_waits(self._arrived)
        for part in self._parts:
            part.guard.open()

    def settle(self) -> None:
        """Nothing is on its way: a gather has arrived, and what was only fetched is released."""
        if self.state is Weights.GATHERING:
            self.arrive()
        elif self.state is Weights.FETCHING:
            self.release()

    def release(self) -> None:
        """Give the storage of the whole back, once the computation enqueued so far has read it."""
        lanes = self._engine.lanes
        if not self._parts:
            return
        if self.state is Weights.FETCHING:
            self._land()
        if self.state is Weights.GATHERING:
            self.arrive()
        self.keep_written()
        self._move(Weights.RELEASED)
        done = lanes.mark_compute()
        with lanes.gather.on():
            lanes.gather.wait(done)
            for part in self._parts:
                part.guard.close()
                part.collapse()

    # What a script writes while the weights are here.

    def written(self) -> list[str]:
        """The weights that a script has written since this was asked, or since they came. The host may wait for the device."""
        found = []
        for buffer in self.buffers:
            indices = {*buffer.bring_back(), *buffer.guard.written()}
            for index, then in buffer.guard.handed.take().items():
                if then is None or not torch.equal(buffer.view(index), then):
                    indices.add(index)
            found += [buffer.guard.names[index] for index in sorted(indices)]
        return found

    def keep_written(self) -> None:
        """Before a release: what a script has written in place goes into this rank's shard. Every rank has written the same.

        Raises WriteError, once, where other ranks may be reading the shard at this moment, or what is here is rounded.
        """
        for part in self._parts:
            if not part.guard.touched and not part.has_moved:  # a step asks at each release
                continue
            indices = [*part.bring_back(), *part.guard.written()]
            if part.guard.handed:
                for index, then in part.guard.handed.take().items():
                    if index not in indices and then is not None:
                        self._engine.doubts.add(part.guard.names[index], part.view(index).ne(then).any())
            if indices and self.rounded and part.packing is not None:
                raise WriteError(
                    f"{part.guard.names[indices[0]]} was written inside of a forward or a backward, to which it came in 8 bits "
                    "(gather_dtype): its shard would take the rounded values. Write it in `with shardwise.gathered(model):`, "
                    "or set gather_dtype: none."
                )
            if indices and part.has_peers:
                raise WriteError(
                    f"{part.guard.names[indices[0]]} was written inside of a forward or a backward, while other ranks copy "
                    "from this rank's shard. Write it in `with shardwise.gathered(model):`, or set gather_with: nccl."
                )
            if indices:
                self._put_own(part)

    def put_own(self) -> None:
        """What a script has written into the gathered weights becomes this rank's shards."""
        self.strayed = True
        for part in self._parts:
            self._put_own(part)

    def _put_own(self, part: FlatBuffer) -> None:
        lanes = self._engine.lanes
        assert part.slab is not None
        self.strayed = True
        lanes.down.wait(lanes.mark_compute())
        try:
            lanes.gather.wait(part.slab.put(part.own_slice).enqueued())
        except StoreError as error:
            self._engine.faults.note(error)

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def publishes(self) -> bool:
        """See `Trained.publishes`."""
        return self.trained is not None and self.trained.publishes

    def cast(self) -> None:
        """See `Trained.cast`; nothing where nothing is trained."""
        if self.trained is not None:
            self.trained.cast()
