"""Everything that a run needs to go on bit for bit: taken into a draft of a checkpoint, and brought back from one.

    model0/trained/<name>                 fp32 masters             each rank its intervals
    model0/frozen/<name>                  an adapter's; all only where asked for     each rank its intervals
    model0/adapter/<adapter>/<name>       what peft computes of an adapter           rank 0's
    model0/buffer/<name>                  rank 0's
    optimizer0/<state>/model0/<name>      moments                  each rank its intervals
    average0/ema/model0/<name>            of the masters           each rank its intervals
    state of each rank                    generators, loaders, step counts, names in parameter groups
    registered objects                    rank 0's; another rank's where they differ
    state of rank 0 besides               group settings, schedulers, loss scale, counters

Models, optimizers, schedulers, loaders and objects are matched by their order, weights by name. What a run has none of (no
optimizer in an evaluation) is left out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..data.loader import PreparedLoader
from ..data.positions import go_to, match, position
from ..errors import CheckpointError
from ..files.writer import as_bytes
from ..plan.precision import LossScaler
from ..ranks.agreeing import attempt, attempt_or_interrupt
from ..ranks.ranks import Ranks
from ..run.scheduler import Scheduler
from ..step import intervals
from ..step.averaging import ShardedEMA, refuse_swapped
from ..step.optimizer import ShardedOptimizer
from ..zero.sharded import ShardedModel
from .codec import encode
from .file_plan import FilePlan
from .generators import generator_states, set_generator_states
from .model_facts import KeptAdapters
from .pieces import Given, Piece, pieces_of, whole_pieces
from .read import Checkpoint
from .run_models import Changed, RunModels, fill, rests_of
from .run_optimizers import RunOptimizers
from .saved_states import lacking
from .standing import Standing
from .write import Draft, tensors_of


@dataclass
class RunState:
    """The objects of a run whose state counts. of_models, of_optimizers: what a checkpoint keeps of these.

    standing: what stands of an earlier draft of this run.
    """

    ranks: Ranks
    models: Sequence[ShardedModel]
    steppers: Sequence[ShardedOptimizer]
    schedulers: Sequence[Scheduler]
    loaders: Sequence[PreparedLoader]
    objects: Sequence[Any]
    averages: Sequence[ShardedEMA]
    scaler: LossScaler
    standing: Standing = field(default_factory=Standing)

    def __post_init__(self) -> None:
        self.of_models = RunModels(self.ranks, self.models, self.standing)
        self.of_optimizers = RunOptimizers(self.ranks, self.steppers, self.models, self.standing)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return max((stepper.steps for stepper in self.steppers), default=0)

    # Taking.

    def settle(self, *, waits: bool = True) -> None:
        """Finish what is under way. Collective. Raises PrepareError while a model has averaged weights.

        waits: until the device is done with it, and raises what the last step's message said; False leaves both to the draft's
        `late`, and only enqueues.
        """
        refuse_swapped(self.models, "save_state and load_state")
        for model in self.models:
            model.settle(waits=waits)
        for stepper in self.steppers if waits else ():
            stepper.raise_if_bad()

    def draft(self, counters: dict[str, Any], adapters: Sequence[KeptAdapters], *, with_frozen: bool) -> Draft:
        """This rank's part of a checkpoint. Reads nothing yet: pieces are read when they are written, or copied.

        adapters: of each model, what is kept of them. with_frozen: all frozen weights are kept.
        Raises CheckpointError for state that a checkpoint cannot hold. Collective.
        """
        rank = self.ranks.rank
        pieces: list[Piece] = []
        stand: list[Piece] = []
        unread = [stepper.verdicts.unread() for stepper in self.steppers]
        late = [read for read in unread if read is not None]  # first: of a bad step nothing is written
        # All communication comes before what may fail on one rank alone, as each of these two may.
        buffers, error = attempt(lambda: self.of_models.buffers(pieces))
        objects, tensors = self._objects()
        if error is not None:
            raise error
        state: dict[str, Any] = {"buffers": buffers}
        state["generators"] = generator_states(self.ranks.device)
        stand += self.of_models.trained_pieces()
        pieces += self.of_models.frozen_pieces(None if with_frozen else [kept.frozen for kept in adapters])
        for number, kept in enumerate(adapters):
            pieces += whole_pieces({f"model{number}/adapter/{name}": tensor for name, tensor in kept.computed.items()})
        taken = [self.of_optimizers.taken(number, late) for number in range(len(self.steppers))]
        state["optimizers"] = [one.state for one in taken]
        for one in taken:
            stand += one.stand
            pieces += one.pieces
        for number, average in enumerate(self.averages):
            stand += self._average_pieces(number, average)
        state["loaders"] = [position(loader) for loader in self.loaders]
        if rank == 0:
            state["models"] = len(self.models)
            state["schedulers"] = [scheduler.state_dict() for scheduler in self.schedulers]
            state["averages"] = [average.updates for average in self.averages]
            state["scaler"] = self.scaler.state_dict()
            state["counters"] = counters
        encoded = {**encode(state, tensors, "state"), "objects": objects}
        for entry, one in zip(encoded["optimizers"], taken, strict=True):
            entry.update(one.encoded)
        pieces += whole_pieces(tensors)
        return Draft([*stand, *pieces], encoded, late, self._planned(stand, pieces))

    def _average_pieces(self, number: int, average: ShardedEMA) -> list[Piece]:
        place, model = self._place_of(number), average.model
        witnesses = [average, *rests_of(model), *average.slabs]
        made, apart = f"average{number}", model.engine.share.apart
        return self.standing.of(
            made,
            witnesses,
            (place, apart),
            lambda: [*pieces_of(model.ranks, place, average.intervals(), apart=apart)],
        )

    def _planned(self, stand: Sequence[Piece], pieces: Sequence[Piece]) -> FilePlan | None:
        """The plan of the file: the earlier one where nothing was made anew but given tensors of the same kinds."""
        if not stand and not pieces:
            return None
        kinds = [(one.address, one.shape, one.spec, isinstance(one.source, Given) or one.source) for one in pieces]
        file = tensors_of(self.ranks.rank)
        facts = (self.standing.made, kinds)
        return self.standing.of("plan", [], facts, lambda: FilePlan([*stand, *pieces], file), counts=False)

    def _objects(self) -> tuple[Any, dict[str, Tensor]]:
        """The registered objects' states, encoded, and their tensors; None and nothing where they are equal to rank 0's."""
        tensors: dict[str, Tensor] = {}
        encoded, error = attempt_or_interrupt(
            lambda: encode([item.state_dict() for item in self.objects], tensors, "objects")
        )
        mine = zlib.crc32(json.dumps(encoded).encode())
        for tensor in tensors.values():
            mine = zlib.crc32(as_bytes(tensor), mine)
        sums = self.ranks.gather_numbers(mine)
        if error is not None:
            raise error
        return (None, {}) if self.ranks.rank and mine == sums[0] else (encoded, tensors)

    def _place_of(self, number: int) -> str:
        """Where an average is kept."""
        model = self.averages[number].model
        return f"average{number}/ema/model{next(n for n, own in enumerate(self.models) if own is model)}"

    # Bringing back.

    def check(self, checkpoint: Checkpoint, first: dict[str, Any], *, strict: bool = True) -> list[Changed]:
        """Raise CheckpointError, before anything is changed, if the checkpoint is of another model or another script.

        first: the saved state of rank 0. strict: False allows weights that only one of the two has. Every rank finds the
        same, without communication. Gives for each model which weights the checkpoint has trained and this run has not, and
        the other way round.
        """
        where = checkpoint.directory
        for kind, have, count in (
            ("model", len(self.models), first["models"]),
            ("optimizer", len(self.steppers), len(first["optimizers"])),
            ("scheduler", len(self.schedulers), len(first["schedulers"])),
            ("registered object", len(self.objects), len(first["objects"])),
            ("average", len(self.averages), len(first.get("averages", ()))),
        ):
            if have and have != count and kind not in lacking(first):
                raise CheckpointError(
                    f"{where} was saved with {count} {kind}(s), but this run has prepared {have}. Prepare the same objects "
                    "in the same order before load_state."
                )
        try:
            match(first["loaders"], checkpoint.manifest.world_size, self.loaders, self.ranks.world_size)
        except CheckpointError as error:
            raise CheckpointError(f"{where} {error}") from error
        return self.of_models.check(checkpoint, first["buffers"], strict=strict)

    def restore_tensors(
        self, checkpoint: Checkpoint, states: Sequence[dict[str, Any]], frozen: Mapping[int, Container[str]]
    ) -> None:
        """Read this rank's intervals, of weights and optimizer states. frozen: the names that are read too, by model.

        No communication: the caller agrees on how it went, and then calls `publish`.
        """
        self.of_models.restore(checkpoint, states, frozen)
        for number, average in enumerate(self.averages):
            place = self._place_of(number)
            for held, weight in zip(average.intervals(), intervals.trained(average.model), strict=True):
                if f"{place}/{held.name}" in checkpoint:
                    fill(checkpoint, place, [held])
                else:  # it is trained since then: the average begins with the weight
                    held.write(weight.read())
            average.updates = states[0]["averages"][number]
        self.of_optimizers.restore(checkpoint, states)

    def publish(self) -> None:
        """Bring the masters that were read into the weights that compute. Collective."""
        for model in self.models:
            intervals.publish(model)

    def restore_rest(
        self,
        states: Sequence[dict[str, Any]],
        groups: Sequence[Sequence[set[str]]],
        since: set[str],
        *,
        generators: bool = True,
    ) -> dict[str, Any]:
        """Group settings, schedulers, scale, objects, loaders, generators; gives the counters.

        groups, since: as `check_groups` has seen them. generators: False leaves them as they are.
        """
        first = states[0]
        self.of_optimizers.restore_groups(states, groups, since)
        for number, (scheduler, saved) in enumerate(zip(self.schedulers, first["schedulers"], strict=False)):
            with _taking(f"scheduler {number}", scheduler):
                scheduler.load_state_dict(saved)
        with _taking("the loss scale", self.scaler):
            self.scaler.load_state_dict(first["scaler"])
        own = states[self.ranks.rank]["objects"] if self.ranks.rank < len(states) else None
        for number, (item, saved) in enumerate(
            zip(self.objects, first["objects"] if own is None else own, strict=False)
        ):
            with _taking(f"registered object {number}", item):
                item.load_state_dict(saved)
        matched = match(first["loaders"], len(states), self.loaders, self.ranks.world_size)
        for number, (loader, saved) in enumerate(matched.pairs):
            with _taking(f"data loader {number}", loader):
                go_to(loader, saved, len(states), self.ranks)
        if self.ranks.rank == 0:
            matched.say()
        if generators:
            set_generator_states([state["generators"] for state in states], self.ranks)
        counters: dict[str, Any] = first["counters"]
        return counters


@contextmanager
def _taking(what: str, item: Any) -> Iterator[None]:
    """An error of something that takes its state says whose it is."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{what} (a {type(item).__name__}) cannot take its state: {type(error).__name__}: {error}."
        ) from error
