"""An optimizer's verbs, played with its twins on small parameters that are divided as a plan divides them.

    stand-ins          w (3, 4), v (2,)
    cuts of a twin     [(w, 0, 5), (v, 0, 1)]       what one rank holds: flat, or in the shape of the stand-in
    verbs              step, step, eval, train      each with gradients of its own

It gives what weights, states and numbers came of it, and judges nothing.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .doubles import double, twin
from .kept import is_wrapper
from .overrides import standing_in
from .running import counting, holding, unhooked

# Of the gradients, verb by verb: optimizers that clip do so at some of them.
_SIZES = (1.0, 0.01, 30.0, 1.0)
_ALONG = 0.02
_ATTRIBUTE, _SETTING = "the attribute", "the setting"
# The least that is tried, of rates: a schedule may have begun at zero, and a tiny one drowns in the rounding of the weights;
# and of decays that are not zero, so that what they depend on shows.
RATE, _DECAY = 1e-3, 0.1


@dataclass(frozen=True)
class StandIn:
    """A small parameter in the place of one of the user's.

    key: id of the user's. state: what the optimizer has for it already, cut to the size of `start`.
    """

    key: int
    group: int
    start: Tensor
    state: Mapping[str, Any]

    def __str__(self) -> str:
        return f"a parameter of shape {tuple(self.start.shape)} in group {self.group}"


@dataclass(frozen=True)
class Verb:
    """What is called: `step`, or another method of the class."""

    name: str = "step"
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


# (number of a stand-in, begin, end) of each part that a twin has.
Cuts = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Way:
    """How stand-ins are held. twins: what each has. Numbers of stand-ins: shaped: those in their own shape; visits: those of
    which each part steps in its own call. counts: whether a group counts steps, see `counting`. plain: attributes hold the very
    parameters that are stepped, as in plain torch.
    """

    twins: Sequence[Cuts]
    shaped: frozenset[int] = frozenset()
    visits: frozenset[int] = frozenset()
    counts: bool = False
    plain: bool = False


@dataclass
class Outcome:
    """weights: of each stand-in, flat, after each verb. states: of each, (begin, end, state).

    before, kept: what the first twin had, and each has, beside states of parameters, by words for it.
    holding: which of them have parts. moved_away: stand-ins whose memory was replaced. draws: whether random numbers were.
    returned: what the last verb gave each. gradients: of each stand-in, for each verb.
    """

    weights: list[list[Tensor]] = field(default_factory=list)
    states: list[list[tuple[int, int, dict[str, Any]]]] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)
    holding: list[bool] = field(default_factory=list)
    moved_away: list[int] = field(default_factory=list)
    returned: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[list[Tensor]] = field(default_factory=list)
    draws: bool = False


@dataclass(frozen=True)
class _Part:
    number: int
    begin: int
    end: int
    values: Tensor  # the memory of `tensor`
    tensor: Parameter


def rehearse(
    optimizer: Optimizer,
    stand_ins: Sequence[StandIn],
    others: Sequence[int],
    way: Way,
    verbs: Sequence[Verb],
    given: Sequence[Sequence[Tensor]] | None = None,
) -> Outcome:
    """Play `verbs` on twins of `optimizer`, which hold the stand-ins in this way. Raises what its methods raise.

    others: ids of the user's parameters that have no stand-in. Random numbers are the same in every way, and gradients those
    that were `given`, or made here: every second time nearly at right angles to the weights, as those of layers before a norm
    are, because some optimizers (SGDP, AdamP) look at a matrix then only.
    """
    found = Outcome()
    twins = [_twin(optimizer, stand_ins, others, cuts, way) for cuts in way.twins]
    found.before = kept_beside(twins[0][0])
    source = torch.Generator().manual_seed(0)
    device = stand_ins[0].start.device if stand_ins else torch.device("cpu")
    with _generators_kept(device) as have_drawn, _classes_kept(type(optimizer)):
        for place, verb in enumerate(verbs):
            size = _SIZES[place % len(_SIZES)]
            if given is None:
                gradients = [(torch.randn(s.start.shape, generator=source) * size).to(s.start) for s in stand_ins]
                if place % 2:
                    gradients = [_across(g, w) for g, w in zip(gradients, found.weights[-1], strict=True)]
            else:
                gradients = list(given[place])
            found.gradients.append(gradients)
            found.returned = []
            for made, parts in twins:
                found.returned.append(
                    dict(leaves(_play(made, parts, stand_ins, gradients, verb, way), "what it returned"))
                )
            found.weights.append(_weights(stand_ins, [part for _, parts in twins for part in parts]))
        found.draws = have_drawn()
    found.states = [[] for _ in stand_ins]
    for made, parts in twins:
        for part in parts:
            found.states[part.number].append((part.begin, part.end, dict(made.state.get(part.tensor, {}))))
            if part.tensor.data_ptr() != part.values.data_ptr() or part.tensor.shape != part.values.shape:
                found.moved_away.append(part.number)
    found.kept = [kept_beside(made) for made, _ in twins]
    found.holding = [bool(parts) for _, parts in twins]
    return found


def call(optimizer: Any, verb: Verb) -> Any:
    """Call the class's method on `optimizer`, without the hooks that torch puts around `step`."""
    with torch.enable_grad():
        return unhooked(getattr(type(optimizer), verb.name))(optimizer, *verb.args, **verb.kwargs)


def kept_beside(optimizer: Any) -> dict[str, Any]:
    """Numbers, texts and tensors that an optimizer keeps beside the states of its parameters, by words for each."""
    found: list[tuple[str, Any]] = []
    for number, group in enumerate(optimizer.param_groups):
        found += [(setting(number, name), value) for name, value in group.items() if name != "params"]
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "defaults") and not name.startswith("_optimizer_"):
            found.append((f"{_ATTRIBUTE} {name!r}", value))
    found += [(f"the state {key!r}", value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)]
    return {
        words: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
        for name, value in found
        for words, leaf in leaves(value, name)
    }


def leaves(value: Any, words: str) -> Iterator[tuple[str, Any]]:
    """(words, value) of what can be compared in `value`: numbers, texts and tensors, also inside of containers."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{words}[{name!r}]")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from leaves(item, f"{words}[{place}]")
    elif isinstance(value, (bool, int, float, str, type(None))) or (
        isinstance(value, Tensor) and not isinstance(value, Parameter)
    ):
        yield words, value


def is_setting(words: str) -> bool:
    """Whether these are the words for a setting of a group."""
    return words.startswith(_SETTING)


def is_attribute(words: str) -> bool:
    """Whether these are the words for an attribute of the optimizer."""
    return words.startswith(_ATTRIBUTE)


def setting(group: int, name: str) -> str:
    """Words for a setting of a parameter group."""
    return f"{_SETTING} {name!r} of group {group}"


def _twin(
    optimizer: Optimizer, stand_ins: Sequence[StandIn], others: Sequence[int], cuts: Cuts, way: Way
) -> tuple[Any, list[_Part]]:
    held: dict[int, Tensor] = {key: Parameter(torch.zeros(1)) for key in others}
    parts = []
    for number, begin, end in cuts:
        stand_in = stand_ins[number]
        values = stand_in.start.reshape(-1)[begin:end].clone()
        values = values.view(stand_in.start.shape) if number in way.shaped else values
        parts.append(_Part(number, begin, end, values, Parameter(values)))
    # In attributes the optimizer has whole parameters, which the engine does not change.
    held |= {s.key: Parameter(s.start.clone()) for s in stand_ins}
    held |= {stand_ins[part.number].key: part.tensor for part in parts if way.plain}
    made = twin(optimizer, held)
    elementwise = {n for s in stand_ins for n, v in s.state.items() if s.start.ndim and is_like(v, s.start)}
    for part in parts:
        stand_in = stand_ins[part.number]
        made.param_groups[stand_in.group]["params"].append(part.tensor)
        state = {
            name: value.reshape(-1)[part.begin : part.end].clone().view(part.values.shape)
            if is_like(value, stand_in.start) and (stand_in.start.ndim or name in elementwise)
            else copy.deepcopy(value)
            for name, value in stand_in.state.items()
        }
        if state:
            made.state[part.tensor] = state
    given: Mapping[Any, Any] = optimizer.state
    for key, value in given.items():
        if not isinstance(key, Tensor):
            made.state[key] = copy.deepcopy(value)
    for group in made.param_groups:
        _lift(group, "lr", RATE)
        if group.get("weight_decay"):
            _lift(group, "weight_decay", _DECAY)
    return made, parts


def _lift(group: dict[str, Any], name: str, least: float) -> None:
    value = group.get(name)
    if isinstance(value, Tensor) and value.is_floating_point():
        value.clamp_(min=least)
    elif isinstance(value, (int, float)):
        group[name] = max(value, least)


def is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a state has its parameter's shape, and a number for each element."""
    return isinstance(value, Tensor) and value.shape == parameter.shape and not is_wrapper(value)


def _gradient(part: _Part, gradients: Sequence[Tensor]) -> Tensor:
    return gradients[part.number].reshape(-1)[part.begin : part.end].clone().view(part.values.shape)


def _play(
    made: Any,
    parts: Sequence[_Part],
    stand_ins: Sequence[StandIn],
    gradients: Sequence[Tensor],
    verb: Verb,
    way: Way,
) -> Any:
    """As a step does: the optimizer steps what is in place, and a double each part that visits.

    It does not see those that are stepped whole, whose stand-ins it holds; of others it holds what has no gradient. All calls
    begin with what it kept for groups before the first, and what they make of that is the optimizer's own call's to say.
    """
    visits: frozenset[int] = way.visits if verb.name == "step" else frozenset()
    here = [part for part in parts if part.number not in visits]
    seen = {id(part.tensor) for part in parts if part.number not in visits & way.shaped}
    for part in here:
        part.tensor.grad = _gradient(part, gradients)
    before = double(made) if visits else made
    absent: dict[int, Tensor] = {}
    for number, stand_in in enumerate(stand_ins) if way.counts and verb.name == "step" else ():
        if all(stand_ins[part.number].group != stand_in.group for part in here):
            absent.setdefault(stand_in.group, stand_in.start if number in way.shaped else stand_in.start.reshape(-1))
    device = stand_ins[0].start.device if stand_ins else torch.device("cpu")
    with (
        holding(made, seen),
        counting(made, absent, device),
        standing_in(made, lambda: [(stand_ins[p.number].key, p.tensor) for p in parts]),
    ):
        result = call(made, verb)
    for part in here:
        part.tensor.grad = None
    for part in (one for one in parts if one.number in visits):
        one = double(before)
        piece = Parameter(part.values)
        piece.grad = _gradient(part, gradients)
        group = next(n for n, g in enumerate(made.param_groups) if any(part.tensor is p for p in g["params"]))
        one.param_groups[group]["params"].append(piece)
        if part.tensor in made.state:
            one.state[piece] = made.state[part.tensor]
        with standing_in(one, lambda: [(stand_ins[part.number].key, piece)]):  # noqa: B023 - at once
            call(one, verb)
        made.state[part.tensor] = one.state[piece]
    return result


def _across(gradient: Tensor, weights: Tensor) -> Tensor:
    """`gradient` with nothing but _ALONG of what each row has in the direction of that of `weights`, which is flat."""
    rows = gradient.reshape(gradient.shape[0] if gradient.ndim > 1 else 1, -1)
    beside = weights.view(rows.shape)
    square = (beside * beside).sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    found: Tensor = rows - (1 - _ALONG) * beside * ((rows * beside).sum(1, keepdim=True) / square)
    return gradient if gradient.numel() == 1 else found.view(gradient.shape)


def _weights(stand_ins: Sequence[StandIn], parts: Sequence[_Part]) -> list[Tensor]:
    found = [s.start.reshape(-1).clone() for s in stand_ins]
    for part in parts:
        found[part.number][part.begin : part.end] = part.values.detach().reshape(-1)
    return found


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Inside, random numbers begin anew; afterwards torch's, Python's and numpy's go on as if nothing had been drawn.

    Gives a function that says whether any were.
    """
    numpy: Any = sys.modules.get("numpy")

    def states() -> list[Any]:
        found: list[Any] = [torch.get_rng_state(), random.getstate()]
        if device.type == "cuda":
            found.append(torch.cuda.get_rng_state(device))
        return found + ([repr(numpy.random.get_state())] if numpy else [])

    python, others = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ].manual_seed(0)
        if numpy:
            numpy.random.seed(0)
        before = states()
        try:
            yield lambda: any(not _equal(a, b) for a, b in zip(before, states(), strict=True))
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(others)


@contextmanager
def _classes_kept(kind: type[Optimizer]) -> Iterator[None]:
    """Afterwards the class of an optimizer has the numbers and texts that it had before: some count their steps there."""
    own = [c for c in kind.__mro__ if c not in Optimizer.__mro__]

    def plain(c: type) -> dict[str, Any]:
        return {n: v for n, v in vars(c).items() if isinstance(v, (bool, int, float, str, type(None)))}

    before = [plain(c) for c in own]
    try:
        yield
    finally:
        for c, kept in zip(own, before, strict=True):
            now = plain(c)
            for name in now.keys() - kept.keys():
                delattr(c, name)
            for name, value in kept.items():
                if name not in now or now[name] is not value:
                    setattr(c, name, value)


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
