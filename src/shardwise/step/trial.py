"""Whether an optimizer gives on shards the numbers that it gives on whole parameters: it is tried before it steps.

Each parameter group is tried with its own settings, on small stand-ins for its parameters. First as in plain torch; then as the
engine will hold it (`ways.py`), one difference after another, so that the first that shows names the cause.

A group that gives other numbers so is tried once more with whole parameters, in their own shapes, each on one rank and in a
call of its own: then it is stepped as `wholes.py` has it. Where each rank has everything in place (stage 0), they are held in
their own shapes and stepped together, as in plain torch.

What is compared: weights after every step, states, and numbers that are kept for a group or for the optimizer itself. Twins of
the user's optimizer step here (`rehearsal.py`), which share nothing with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..plan.precision import Precision
from ..ranks.ranks import collectives_of_scripts
from .comparing import difference, is_plain, is_same
from .doubles import refuse_what_it_reaches
from .kept import cannot_keep, packages_of
from .overrides import settings_of
from .rehearsal import Outcome, StandIn, Verb, Way, is_like, is_setting, leaves, rehearse, setting
from .samples import chosen, small
from .ways import INSTEAD, Handling, Ways

# Elements of a stand-in: more than what optimizers of 8 bits leave in 32 (4,096, or 16,384), and some blocks of them. A group
# like one before it, with parameters of such sizes, takes few.
_ROOM, _LITTLE_ROOM = 20_000, 60
_STEPS = 4
_MORE_STEPS = 16  # where a group has not moved: some wait until their moments are worth something
_AGAIN = 3  # how often what has drawn random numbers is tried again: those of other threads look alike
_CLOSURE = "step(closure)"


class Trial:
    """Tries one optimizer that torch does not know.

    handling: what the plan does to it. device: where it will step. The user's optimizer is not changed.
    wholes: the numbers of the groups that were found to need whole parameters.
    """

    def __init__(self, optimizer: Optimizer, handling: Handling, device: torch.device) -> None:
        self.optimizer = optimizer
        self.handling = handling
        self.device = device
        self._name = type(optimizer).__name__
        self.wholes: frozenset[int] = frozenset()
        self._stand_ins: list[StandIn] = []
        self._others: list[int] = []
        self._states: dict[int, Mapping[str, Any]] = {}
        self._counted: set[str] = set()  # what steps change by themselves
        self._tried: set[Any] = set()
        self._verbs: set[str] = set()

    # What is asked.

    @property
    def counts(self) -> bool:
        """Whether steps change something of a group, such as a count."""
        return any(map(is_setting, self._counted))

    def judge(self, groups: Sequence[Sequence[Tensor]], first: int = 0) -> None:
        """Find out which groups from number `first` on need whole parameters. Raises OptimizerError if those do not help."""
        try:
            self._run(groups)
            return
        except OptimizerError:
            before, alike = self.wholes, self._alike(groups, first)
        self.wholes = before.union(*alike)
        try:
            self._run(groups)
        except OptimizerError:
            self.wholes = before
            raise
        for numbers in alike if len(alike) > 1 else ():
            found, self.wholes = self.wholes, self.wholes - numbers
            try:
                self._run(groups)
            except OptimizerError:
                self.wholes = found
        self._run(groups)

    def _alike(self, groups: Sequence[Sequence[Tensor]], first: int) -> list[frozenset[int]]:
        """The groups from `first` on, those together that have one kind of settings and of parameters."""
        found: dict[Any, set[int]] = {}
        for number in range(first, len(groups)):
            found.setdefault(self._kind_with(number, groups[number]), set()).add(number)
        return [frozenset(numbers) for numbers in found.values()]

    def _run(self, groups: Sequence[Sequence[Tensor]]) -> None:
        """Try it with these parameters in its groups, the user's. Raises OptimizerError if it cannot work on shards."""
        refuse_what_it_reaches(self.optimizer)
        before = self._stand_ins, self._others
        known: set[Any] = set()
        self._stand_ins = []
        self._others = [id(p) for parameters in groups for p in parameters]
        try:
            for number, parameters in enumerate(groups):
                kind = self._kind_with(number, parameters)
                room = _LITTLE_ROOM if kind in known else _ROOM
                known.add(kind)
                self._stand_ins += [
                    self._stand_in(number, p, room) for p in chosen(parameters, settings_of(self.optimizer))
                ]
            self._try_all()
        except OptimizerError:  # a group that is not added after all
            self._stand_ins, self._others = before
            raise

    def look(self) -> None:
        """Try it once more if settings have become others than those that were tried. Raises OptimizerError.

        Of numbers only the sign counts, and rates and what steps count by themselves do not.
        """
        if self._kinds() not in self._tried:
            self._try_all()

    def try_verb(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Try a method that works on the parameters, once. Raises OptimizerError."""
        if name in self._verbs:
            return
        verb, step = Verb(name, tuple(args), kwargs), Verb()
        begin = [Verb("train")] if has_modes(self.optimizer) else []
        self._try([*begin, step, step, verb], f"{self._name}.{name}()")
        self._verbs.add(name)

    def try_closure(self) -> None:
        """Raise OptimizerError unless `step(closure)` calls the closure once and then does what `step()` does. Tried once."""
        if _CLOSURE in self._verbs:
            return
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            return torch.zeros((), device=self.device)

        begin = [Verb("train")] if has_modes(self.optimizer) else []
        plain = self._rehearse(self._ways.plain, [*begin, Verb()], "step()")
        given = self._rehearse(self._ways.plain, [*begin, Verb("step", (closure,))], _CLOSURE)
        same = all(torch.equal(a, b) for a, b in zip(plain.weights[-1], given.weights[-1], strict=True))
        if calls != 1 or not same:
            raise OptimizerError(
                f"{self._name}.step(closure) calls its closure {calls} times in a step, or uses what it gives; a prepared "
                "optimizer calls it once and then steps. Compute the loss and its backward before step(), without a closure."
            )
        self._verbs.add(_CLOSURE)

    # Stand-ins.

    def _stand_in(self, group: int, parameter: Tensor, room: int) -> StandIn:
        source = torch.Generator().manual_seed(len(self._stand_ins))
        dtype = Precision.master_dtype(parameter)
        start = torch.randn(small(tuple(parameter.shape), room), generator=source) * 0.1
        if id(parameter) not in self._states:
            state = self.optimizer.state.get(parameter, {})
            cut = {n: self._cut(n, v, parameter, start, dtype, group in self.wholes) for n, v in state.items()}
            self._states[id(parameter)] = {} if any(v is None and state[n] is not None for n, v in cut.items()) else cut
        return StandIn(id(parameter), group, start.to(self.device, dtype), self._states[id(parameter)])

    def _cut(self, name: str, value: Any, parameter: Tensor, start: Tensor, dtype: torch.dtype, whole: bool) -> Any:
        if is_plain(value):
            return value.detach().clone() if isinstance(value, Tensor) else value
        if not is_like(value, parameter):
            if whole:
                return None  # of the small stand-in it would have another shape
            raise OptimizerError(self._odd_state(name, value, tuple(parameter.shape)))
        if value.is_meta:  # made while the weights had no memory
            return torch.ones(start.shape, device=self.device, dtype=dtype)
        part = value.detach().reshape(-1)[: start.numel()].reshape(start.shape)
        return part.to(self.device, dtype if value.is_floating_point() else value.dtype, copy=True)

    # Trying.

    @property
    def _ways(self) -> Ways:
        return Ways(self._stand_ins, self.wholes, self.handling)

    def _try_all(self) -> None:
        modes = has_modes(self.optimizer)
        if modes and self.handling.visits:
            raise OptimizerError(
                f"{self._name} cannot be offloaded: its train() and eval() change weights, and states that rest off the device "
                "are there in a step only. Set offload_optimizer_device: none."
            )
        if modes and self.handling.parted and self.wholes:
            raise OptimizerError(
                f"{self._name} cannot work on shards: its train() and eval() change weights, and parameters that are stepped "
                "whole, each by one rank, are there in a step only. With zero_stage 0 it works, for there each rank has them."
            )
        begin = [Verb("train")] if modes else []
        end = [Verb("eval"), Verb("train"), Verb()] if modes else []
        for steps in (_STEPS, _MORE_STEPS):
            reference = self._try([*begin, *[Verb()] * steps, *end], self._name)
            still = next((number for number, moves in self._moves(reference).items() if not moves), None)
            if still is None:
                break
        else:
            raise OptimizerError(
                f"{self._name} cannot be judged: in a trial of {_MORE_STEPS} steps group {still} did not move. Prepare it with "
                "the settings with which that group trains."
            )
        self._counted |= _changed(reference)
        self._verbs |= {"train", "eval"} if modes else set()
        self._tried.add(self._kinds())

    def _try(self, verbs: Sequence[Verb], what: str) -> Outcome:
        """Play `verbs` in plain torch's way and in those of the plan. Raises OptimizerError where they differ."""
        reference = self._rehearse(self._ways.plain, verbs, what)
        for _ in range(_AGAIN if self.handling.ranks > 1 else 0):
            if not reference.draws:
                break
            # It may have been another thread of the script, as one that reads data ahead.
            reference = self._rehearse(self._ways.plain, verbs, what)
        self._check_reference(reference, what)
        if self.handling.ranks > 1 and reference.draws:
            raise OptimizerError(
                f"{what} cannot work on several ranks: it draws random numbers, other ones on each. {INSTEAD}"
            )
        for case in self._ways.differences(counts=any(map(is_setting, _changed(reference)))):
            found = self._rehearse(case.way, verbs, what, f", {case.where}", reference.gradients)
            seen = difference(self._stand_ins, reference, found)
            if seen is not None:
                raise OptimizerError(f"{what} {case.failing}: in a trial {seen} {case.where}. {case.advice}")
        return reference

    def _rehearse(
        self,
        way: Way,
        verbs: Sequence[Verb],
        what: str,
        where: str = "",
        given: Sequence[Sequence[Tensor]] | None = None,
    ) -> Outcome:
        said, found = collectives_of_scripts(), None
        problem: Exception | None = None
        try:
            found = rehearse(self.optimizer, self._stand_ins, self._others, way, verbs, given)
        except OptimizerError:
            raise
        except Exception as error:  # whatever an unknown optimizer raises
            problem = error
        if self.handling.ranks > 1 and (collectives_of_scripts() != said or _is_of_collectives(problem)):
            raise OptimizerError(
                f"{what} cannot work on several ranks: it calls collectives of torch.distributed by itself, to divide what "
                "every rank has whole, and here the engine divides it. Take its form for one device, as SingleDeviceMuon."
            ) from problem
        if found is None:
            raise OptimizerError(
                f"{what} could not be tried on small parameters{where} ({type(problem).__name__}: {problem}). {INSTEAD}"
            ) from problem
        return found

    def _check_reference(self, found: Outcome, what: str) -> None:
        """Raise OptimizerError for what no shard can have, whatever its numbers."""
        for number in found.moved_away:
            raise OptimizerError(
                f"{what} cannot work on shards: it gives {self._stand_ins[number]} other memory (p.data = ...) and does not "
                "write into it. Shards are parts of a larger tensor: let it change parameters in place (p.add_, p.copy_)."
            )
        for stand_in, held in zip(self._stand_ins, found.states, strict=True):
            for name, value in held[0][2].items():
                odd = not is_plain(value) and not is_like(value, stand_in.start)
                strange = cannot_keep(value, packages_of(self.optimizer)) if odd else None
                if odd and (stand_in.group not in self.wholes or strange):
                    raise OptimizerError(self._odd_state(name, value, tuple(stand_in.start.shape), strange))
        if not all(bool(torch.isfinite(w).all()) for weights in found.weights for w in weights):
            raise OptimizerError(f"{what} cannot be judged: in a trial its weights became NaN or infinite. {INSTEAD}")

    def _odd_state(self, name: str, value: Any, shape: tuple[int, ...], strange: str | None = None) -> str:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if strange is not None:
            return (
                f"{self._name} cannot work on shards: its state {name!r} of a parameter of shape {shape} is {kind} with a "
                f"{strange} in it, and what is no number, tensor or container, and of no class of the optimizer's own package, "
                f"cannot be moved or saved. {INSTEAD}"
            )
        return (
            f"{self._name} cannot work on shards: its state {name!r} of a parameter of shape {shape} is {kind}, which is "
            f"neither one number nor a number for each element. {INSTEAD}"
        )

    def _moves(self, found: Outcome) -> dict[int, bool]:
        """Whether anything moved, by group."""
        moves: dict[int, bool] = {}
        for number, stand_in in enumerate(self._stand_ins):
            start = stand_in.start.reshape(-1)
            moved = any(not torch.equal(weights[number], start) for weights in found.weights)
            moves[stand_in.group] = moves.get(stand_in.group, False) or moved
        return moves

    # Settings.

    def _kinds(self) -> tuple[Any, ...]:
        return tuple(self._kind(number) for number in range(len(self.optimizer.param_groups)))

    def _kind_with(self, number: int, parameters: Sequence[Tensor]) -> tuple[Any, ...]:
        """Groups with the same are alike: in the signs of their settings, and in the shapes and sizes of what they hold."""
        own = settings_of(self.optimizer)
        sizes = frozenset((p.ndim, min(p.numel(), _ROOM).bit_length(), own(p)) for p in chosen(parameters, own))
        return tuple(sign for _, sign in self._kind(number)), sizes

    def _kind(self, number: int) -> tuple[Any, ...]:
        """What of a group's settings a trial depends on."""
        found = []
        for name, value in self.optimizer.param_groups[number].items():
            if name not in ("params", "lr", "initial_lr", "fused"):  # the engine itself may choose fused kernels
                found += [
                    (w, _sign(leaf)) for w, leaf in leaves(value, setting(number, name)) if w not in self._counted
                ]
        return tuple(found)


def _changed(found: Outcome) -> set[str]:
    """What verbs changed beside states, in words for each."""
    before, after = found.before, found.kept[0]
    return {words for words in before.keys() | after.keys() if not is_same(before.get(words), after.get(words))}


def _is_of_collectives(error: Exception | None) -> bool:
    """Whether it was raised inside of torch's collectives."""
    trace = error.__traceback__ if error is not None else None
    while trace is not None and not trace.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
        trace = trace.tb_next
    return trace is not None


def has_modes(optimizer: Optimizer) -> bool:
    """Whether it swaps weights by `train` and `eval`, as optimizers without a schedule do."""
    return all(_takes_nothing(getattr(type(optimizer), name, None)) for name in ("train", "eval"))


def _takes_nothing(method: Any) -> bool:
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(None)
    except (TypeError, ValueError):
        return False
    return True


def _sign(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value > 0) - (value < 0)
    return value
