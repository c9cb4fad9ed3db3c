"""All plans of a model on a machine: which bytes and which time each has, which fit, and which of those is the fastest.

A plan is a stage, where it keeps what, whether blocks are recomputed and compiled, and whether free GPU memory takes back what
is offloaded. Bytes are `bytes.py`'s and times `times.py`'s; the model is run once, without memory, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..config.offloads import DEVICES
from ..errors import OptimizerError
from ..plan.plan import Tier
from .activations import decoder_shape
from .bytes import CHOICES, CONTEXT_NBYTES, Choice, Estimate, Machine, Run, estimate
from .passes import counted, placed_units, with_shapes
from .peaks import at_peak, with_compiled_loss
from .terms import Terms
from .times import NOTHING, Clock, Timed, Way

# Times that are no further apart are one: predictions are within 15% of what was measured.
_NEAR = 0.02
# The same of bytes: at stage 1 adapters' states are a little less than at stage 0.
_NEAR_BYTES = 0.05
# What a budget leaves free of a GPU, as the engine does.
_FILLED = 0.95


@dataclass(frozen=True)
class Planned:
    """One plan. time: NOTHING where it is not modelled. shortages: why it does not fit or is refused; () if it fits."""

    choice: Choice
    way: Way
    estimate: Estimate
    time: Timed
    shortages: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.shortages

    def __str__(self) -> str:
        return ", ".join([str(self.choice), *self.way.words])


class Planner:
    """Plans of one model. Nothing is allocated: the model is on the meta device."""

    def __init__(
        self, model: nn.Module, run: Run, terms: Terms, micro_batches: int = 1, shapes: nn.Module | None = None
    ) -> None:
        """run: with a batch. micro_batches: of a step. shapes: the model before its weights became codes, which can run.

        Raises PrepareError where units are named that the model does not have.
        """
        assert run.batch is not None
        self._model = model
        self._run = run
        self._terms = terms
        self._micro_batches = micro_batches
        self._placed = whole = placed_units(model, run.options.units)
        if shapes is not None:
            self._placed, whole = with_shapes(self._placed, shapes)
        runs = model if shapes is None else shapes
        self._traced, self.arithmetic_alone = counted(runs, whole, run.batch, run.precision.compute)
        self._shape = decoder_shape(model)
        self._estimates: dict[tuple[Choice, bool], Estimate] = {}

    def of(self, run: Run, terms: Terms, micro_batches: int | None = None) -> Planner:
        """The same model and batch on another machine. micro_batches: of a step there, None for as many as here."""
        other = object.__new__(Planner)
        other.__dict__.update(self.__dict__)
        other._run, other._terms, other._estimates = run, terms, {}
        other._micro_batches = self._micro_batches if micro_batches is None else micro_batches
        return other

    def plan(self, choice: Choice, way: Way, machine: Machine | None = None) -> Planned:
        """One plan. way.kept is what its budget keeps. Raises PlanError, and OptimizerError where `prepare` would refuse."""
        batch = self._run.batch
        assert batch is not None
        run = replace(self._run, batch=replace(batch, checkpointing=way.recompute))
        if (choice, way.recompute) not in self._estimates:  # a trial of optimizers is most of what it takes
            self._estimates[choice, way.recompute] = estimate(self._model, choice, run)
        found = self._estimates[choice, way.recompute]
        assert run.batch is not None
        itemsize = run.precision.compute.itemsize if run.precision.compute else 4
        if self._shape is None:
            found = replace(found, nbytes={**found.nbytes, **self._kept(way, itemsize)})
        elif way.compiled:
            found = with_compiled_loss(found, self._shape, run.batch, itemsize)
        found = at_peak(found, run)
        if way.kept:
            found = _moved(found, way.kept)
        time = Clock(self._placed, self._traced, run, self._terms, self._micro_batches).timed(found, way)
        shortages = machine.shortages(found, run) if machine is not None else []
        return Planned(choice, way, found, time, tuple(shortages))

    def plans(
        self,
        machine: Machine,
        choices: Sequence[Choice] = CHOICES,
        *,
        recompute: Sequence[bool] = (False, True),
        compiled: Sequence[bool] = (False, True),
        budgets: bool = True,
    ) -> list[Planned]:
        """Of each choice the fastest way that fits, or the smallest where none does; a refused one says why.

        recompute, compiled: what of each may be. budgets: whether free GPU memory may take back what is offloaded.
        """
        ways = [Way(again, fused) for again in recompute for fused in compiled]
        found = []
        for choice in choices:
            try:
                found.append(self._best(choice, machine, ways, budgets))
            except OptimizerError as error:
                refused = Estimate(choice, {}, refused=str(error))
                found.append(Planned(choice, Way(), refused, NOTHING, (str(error),)))
        return found

    def _best(self, choice: Choice, machine: Machine, ways: Sequence[Way], budgets: bool) -> Planned:
        found = [self.plan(choice, way, machine) for way in ways]
        if budgets and choice.offloads:
            rooms = [(one, _room(one, machine)) for one in found]
            found += [self.plan(choice, replace(one.way, kept=kept), machine) for one, kept in rooms if kept]
        fitting = [one for one in found if one.fits]
        if not fitting:
            return min(found, key=lambda one: one.estimate.peak(Tier.GPU))
        return nearly_fastest(fitting)

    def _kept(self, way: Way, itemsize: int) -> dict[tuple[str, Tier], int]:
        """What autograd keeps of a model without a formula: counted; with recomputation one unit's at a time."""
        kept, outputs = self._traced.kept, self._traced.outputs
        blocks = {one.key for one in self._placed if one.place == "block"}
        rest = sum(nbytes for key, nbytes in kept.items() if key not in blocks)
        of_blocks = [kept.get(key, 0) for key in blocks]
        inputs = sum(outputs.get(key, 0) for key in blocks)
        # The gradient of the logits, in fp32 and in the compute dtype, beside what is kept of them.
        logits = sum(outputs.get(one.key, 0) for one in self._placed if one.place == "head") // itemsize
        loss = logits * (4 + itemsize) if self._traced.forward else 0
        if way.recompute:
            return {("activations", Tier.GPU): rest + inputs, ("logits and loss", Tier.GPU): max(loss, *of_blocks, 0)}
        return {("activations", Tier.GPU): rest + sum(of_blocks), ("logits and loss", Tier.GPU): loss}


def far(choice: Choice) -> tuple[int, int]:
    """How far away it keeps what it offloads: nearer places first, and of two at one distance that with fewer things away."""
    away = [list(DEVICES).index(place) for place in (choice.param, choice.optimizer)]  # which are the nearest first
    return max(away), sum(away)


def nearly_fastest(plans: Sequence[Planned]) -> Planned:
    """Of those whose time is the least, as far as it can be told, the plan that asks for least.

    Nothing offloaded before something, nothing compiled or recomputed before either; then less memory, then the lower stage.
    """
    least = min(one.time.total for one in plans)
    near = [one for one in plans if one.time.total <= (1 + _NEAR) * least]
    asked = min(_asked(one) for one in near)
    alike = [one for one in near if _asked(one) == asked]
    smallest = min(one.estimate.taken("GPU") for one in alike)
    small = [one for one in alike if one.estimate.taken("GPU") <= (1 + _NEAR_BYTES) * smallest]
    return min(small, key=lambda one: one.choice.stage)


def _asked(one: Planned) -> tuple[tuple[int, int], bool, bool, bool]:
    return far(one.choice), one.way.kept > 0, one.way.compiled, one.way.recompute


def _room(plan: Planned, machine: Machine) -> float:
    """Which part of what a plan offloads the GPU could keep; 0 where that is little, or all: then nothing need be offloaded."""
    if machine.gpu_nbytes is None or not plan.fits:
        return 0.0
    free = _FILLED * machine.gpu_nbytes - CONTEXT_NBYTES - plan.estimate.peak(Tier.GPU)
    off = _offloaded(plan.estimate)
    return free / off if off and 0.02 < free / off < 1 else 0.0


def _offloaded(found: Estimate) -> int:
    """Bytes at rest off the device; a gradient that leaves takes as much room on it."""
    return sum(found.rest(tier) for tier in Tier if tier is not Tier.GPU)


def _moved(found: Estimate, kept: float) -> Estimate:
    """The bytes of a plan whose budget keeps that part on the device. Host memory and files are given back as far."""
    nbytes = dict(found.nbytes)
    for (row, tier), count in found.nbytes.items():
        if tier is not Tier.GPU and row in ("frozen", "parameter", "gradient", "optimizer"):
            there = int(kept * count)
            nbytes[row, tier] = count - there
            nbytes[row, Tier.GPU] = nbytes.get((row, Tier.GPU), 0) + there
    return replace(found, nbytes=nbytes)
