"""Whether an optimizer gives on shards the numbers that it gives on whole parameters: it is tried before it steps.

Each parameter group is tried with its own settings, on small stand-ins for its parameters. First as in plain torch; then as the
engine will hold it, one difference after another, so that the first that shows names the cause:

    flat       one optimizer   [w flat, v flat]                                at every stage
    apart      two ranks       [w flat] | [v flat]                             where a rank has parts of the parameters
    parted     three ranks     [] | [w 0:k, v 0:k] | [w k:, v k:]
    visiting   as before, each part in a call of its own                       where states rest off the device

A group that gives other numbers so is tried once more with whole parameters, in their own shapes, each on one rank and in a
call of its own: then it is stepped as `wholes.py` has it.

What is compared: weights after every step, states, and numbers that are kept for a group or for the optimizer itself. Twins of
the user's optimizer step here (`rehearsal.py`), which share nothing with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import OptimizerError
from ..plan.precision import Precision
from .comparing import difference, is_plain, is_same
from .doubles import refuse_what_it_reaches
from .overrides import settings_of
from .rehearsal import Cuts, Outcome, StandIn, Verb, Way, is_like, leaves, rehearse, setting
from .samples import chosen, small

# Elements of a stand-in: more than what optimizers of 8 bits leave in 32 (4,096, or 16,384), and some blocks of them. A group
# like one before it, with parameters of such sizes, takes few.
_ROOM, _LITTLE_ROOM = 20_000, 60
_STEPS = 4
_CLOSURE = "step(closure)"
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


@dataclass(frozen=True)
class _Difference:
    """What is different in a way of shards. where: in words that go on from "got other numbers". advice: what to do."""

    way: Way
    where: str
    advice: str
    failing: str = "cannot work on shards"


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

    def judge(self, groups: Sequence[Sequence[Tensor]], first: int = 0) -> None:
        """Find out which groups from number `first` on need whole parameters. Raises OptimizerError if those do not help."""
        try:
            self._run(groups)
            return
        except OptimizerError as error:
            problem = error
        before, alike = self.wholes, self._alike(groups, first)
        self.wholes = before.union(*alike)
        try:
            self._run(groups)
        except OptimizerError:
            self.wholes = before
            raise problem from None
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
        begin = [Verb("train")] if self._has_modes() else []
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

        begin = [Verb("train")] if self._has_modes() else []
        plain = self._rehearse(self._whole(), [*begin, Verb()], "step()")
        given = self._rehearse(self._whole(), [*begin, Verb("step", (closure,))], _CLOSURE)
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
        if not isinstance(value, Tensor) or not value.ndim:
            return value.detach().clone() if isinstance(value, Tensor) else value
        if value.shape != parameter.shape:
            if whole:
                return None  # of the small stand-in it would have another shape
            raise OptimizerError(self._odd_state(name, value, tuple(parameter.shape)))
        if value.is_meta:  # made while the weights had no memory
            return torch.ones(start.shape, device=self.device, dtype=dtype)
        part = value.detach().reshape(-1)[: start.numel()].reshape(start.shape)
        return part.to(self.device, dtype if value.is_floating_point() else value.dtype, copy=True)

    # Ways.

    def _whole(self) -> Way:
        every = frozenset(range(len(self._stand_ins)))
        return Way([[(n, 0, s.start.numel()) for n, s in enumerate(self._stand_ins)]], shaped=every)

    @property
    def _uncut(self) -> frozenset[int]:
        """The stand-ins that are stepped whole."""
        return frozenset(n for n, s in enumerate(self._stand_ins) if s.group in self.wholes)

    def _apart(self) -> Way:
        everything = [(n, 0, s.start.numel()) for n, s in enumerate(self._stand_ins)]
        return Way([everything[0::2], everything[1::2]], self._uncut)

    def _parts(self) -> tuple[list[Cuts], Cuts]:
        """(what two ranks have, all of it). The first part of each ends in the middle of a row."""
        first: list[tuple[int, int, int]] = []
        second: list[tuple[int, int, int]] = []
        for number, stand_in in enumerate(self._stand_ins):
            numel = stand_in.start.numel()
            if stand_in.group in self.wholes:
                (first, second)[number % 2].append((number, 0, numel))
                continue
            cut = max(1, numel * 2 // 5)
            first.append((number, 0, cut))
            second += [(number, cut, numel)] if cut < numel else []
        return [[], first, second], [*first, *second]

    # Trying.

    def _try_all(self) -> None:
        modes = self._has_modes()
        if modes and self.handling.visits:
            raise OptimizerError(
                f"{self._name} cannot be offloaded: its train() and eval() change weights, and states that rest off the device "
                "are there in a step only. Set offload_optimizer_device: none."
            )
        begin = [Verb("train")] if modes else []
        end = [Verb("eval"), Verb("train"), Verb()] if modes else []
        reference = self._try([*begin, *[Verb()] * _STEPS, *end], self._name)
        for number, found in self._moves(reference).items():
            if not found:
                raise OptimizerError(
                    f"{self._name} cannot be judged: in a trial of {_STEPS} steps group {number} did not move. Prepare it with "
                    "the settings with which that group trains."
                )
        before, after = reference.before, reference.kept[0]
        self._counted |= {w for w in before.keys() | after.keys() if not is_same(before.get(w), after.get(w))}
        self._verbs |= {"train", "eval"} if modes else set()
        self._tried.add(self._kinds())

    def _try(self, verbs: Sequence[Verb], what: str) -> Outcome:
        """Play `verbs` in plain torch's way and in those of the plan. Raises OptimizerError where they differ."""
        reference = self._rehearse(self._whole(), verbs, what)
        self._check_reference(reference, what)
        if self.handling.ranks > 1 and reference.draws:
            raise OptimizerError(
                f"{what} cannot work on several ranks: it draws random numbers, other ones on each. {INSTEAD}"
            )
        for case in self._differences():
            found = self._rehearse(case.way, verbs, what, f", {case.where}")
            seen = difference(self._stand_ins, reference, found)
            if seen is not None:
                raise OptimizerError(f"{what} {case.failing}: in a trial {seen} {case.where}. {case.advice}")
        return reference

    def _differences(self) -> Iterator[_Difference]:
        """Of this plan, one after another."""
        yield _Difference(
            Way(self._whole().twins, self._uncut),
            "where parameters are flat rows, as every zero_stage holds them",
            INSTEAD,
        )
        cuts, every = self._parts()
        if self.handling.parted:
            advice = f"With zero_stage 0 it works, for there each rank steps whole parameters. {INSTEAD}"
            yield _Difference(
                self._apart(),
                "for two parameters that are stepped apart, on two ranks, than for both together, as by a norm or a rate over "
                "several parameters",
                advice,
            )
            yield _Difference(
                Way(cuts, self._uncut),
                "for two parts of a parameter that are stepped apart, on two ranks, than for all of it, as by a norm or a mean "
                "over a parameter",
                advice,
            )
        visits = frozenset(range(len(self._stand_ins))) if self.handling.visits else self._uncut
        if visits:
            yield _Difference(
                Way(cuts if self.handling.parted else [every], self._uncut, visits),
                "where parts are stepped one after another, each in a call of its own, as offloaded states are: it keeps "
                "something for a whole parameter group, such as a count of its steps, or looks at several parameters",
                "Set offload_optimizer_device: none, or take an optimizer that keeps everything with its parameters.",
                "cannot be offloaded",
            )

    def _rehearse(self, way: Way, verbs: Sequence[Verb], what: str, where: str = "") -> Outcome:
        try:
            return rehearse(self.optimizer, self._stand_ins, self._others, way, verbs)
        except OptimizerError:
            raise
        except Exception as error:  # whatever an unknown optimizer raises
            raise OptimizerError(
                f"{what} could not be tried on small parameters{where} ({type(error).__name__}: {error}). {INSTEAD}"
            ) from error

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
                if odd and not (stand_in.group in self.wholes and isinstance(value, Tensor)):
                    raise OptimizerError(self._odd_state(name, value, tuple(stand_in.start.shape)))
        if not all(bool(torch.isfinite(w).all()) for weights in found.weights for w in weights):
            raise OptimizerError(f"{what} cannot be judged: in a trial its weights became NaN or infinite. {INSTEAD}")

    def _odd_state(self, name: str, value: Any, shape: tuple[int, ...]) -> str:
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
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

    def _has_modes(self) -> bool:
        """Whether it swaps weights by `train` and `eval`, as optimizers without a schedule do."""
        return all(_takes_nothing(getattr(type(self.optimizer), name, None)) for name in ("train", "eval"))

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
