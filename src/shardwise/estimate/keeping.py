"""What an optimizer keeps of its parameters, learned from its own step: no table of optimizers, any class will do.

    on numbers   a stand-in of at most 20,000 elements is stepped on the CPU, as in a trial        what the class really does
    on shapes    tensors without memory, of any size, are stepped; where a number is asked for     what it does in size, in a
                 it is 1                                                                          millisecond, for 10^9 elements

Shapes are believed where both keep the same of the small stand-in. How a plan holds the parameters, in shards or whole, is what
`prepare` itself would find out (`step/elementwise.py`), or refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import OptimizerError
from ..step.doubles import twin
from ..step.elementwise import Judgement, judged
from ..step.kept import nbytes_of, pieces
from ..step.rehearsal import Verb, call
from ..step.samples import small
from ..step.state_kinds import is_like
from ..step.trial import has_modes
from ..step.ways import Handling

# Elements of a stand-in with numbers: more than what optimizers of 8 bits leave in 32.
_ROOM = 20_000
# Steps, until one leaves as many tensors as the one before: some keep the last few gradients.
_LEAST_STEPS, _MOST_STEPS = 4, 16
# Numbers that are asked of tensors without memory: an iteration until an error is small would ask for ever.
_MOST_ASKED = 1000


@dataclass(frozen=True)
class Keeps:
    """What is kept of one parameter, or of a piece of one.

    elementwise: the dtype of each state that has a number for every element, by name. beside: bytes of all else: counts of
    steps, rows and columns, scales, what is in lists and objects.
    """

    elementwise: Mapping[str, torch.dtype]
    beside: int


class ShapesOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whoever asks a tensor without memory for a number gets 1, or True. Raises RuntimeError for a loop that waits."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self._asked += 1
            if self._asked > _MOST_ASKED:
                raise RuntimeError("it waits in a loop for what a tensor says")
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class Stepper:
    """One optimizer of a run that is not there.

    optimizer:  of the user's class, over parameters without memory in the shapes of the model's; never stepped.
    parameters: by group, the ids of the model's own, in the optimizer's order.
    name, said: what messages call it, and what of the model it steps, in words.
    """

    def __init__(
        self, make: Callable[[list[Parameter]], Any], own: Sequence[Tensor], name: str, said: str = ""
    ) -> None:
        """own: the model's parameters that it shall train. make: of such parameters. Raises what `make` raises."""
        self.name = name
        self.said = said
        stand_ins = [Parameter(torch.empty_like(p, device="meta"), requires_grad=True) for p in own]
        ids = {id(stand_in): id(p) for stand_in, p in zip(stand_ins, own, strict=True)}
        self.optimizer: Optimizer = make(stand_ins)
        groups = [group["params"] for group in self.optimizer.param_groups]
        self.parameters = [[ids[id(p)] for p in group if id(p) in ids] for group in groups]
        self._shapes = [[p for p in group if id(p) in ids] for group in groups]
        self._judged: dict[Handling, Judgement | OptimizerError] = {}
        self._kept: dict[Any, Keeps] = {}

    def judgement(self, handling: Handling) -> Judgement:
        """How it is stepped under such a plan. Raises OptimizerError where `prepare` would."""
        if handling not in self._judged:
            try:
                found: Judgement | OptimizerError = judged(self.optimizer, self._shapes, handling, torch.device("cpu"))
            except OptimizerError as error:
                found = error
            self._judged[handling] = found
        known = self._judged[handling]
        if isinstance(known, OptimizerError):
            raise known
        return known

    def keeps(self, group: int, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Keeps:
        """What it keeps of a parameter of that group. shape: the parameter's, or None of a flat piece.

        dtype: the master's. Raises OptimizerError for a class that cannot be stepped without numbers.
        """
        key = group, shape, dtype
        if key not in self._kept:
            like = (max(p.numel() for p in self._shapes[group]),) if shape is None else shape
            self._kept[key] = self._learned(group, like, dtype)
        return self._kept[key]

    def _learned(self, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> Keeps:
        little = small(shape, _ROOM)
        cpu, meta = torch.device("cpu"), torch.device("meta")
        state, problem = self._after_steps(group, little, dtype, cpu)
        if problem is not None:
            raise OptimizerError(
                f"{self.name} could not be tried on a parameter of shape {little} ({type(problem).__name__}: {problem})."
            ) from problem
        if little != shape:
            # What a step that fails has left counts too: it is held against that of numbers.
            alike, failed = self._after_steps(group, little, dtype, meta)
            if _tensors(alike) != _tensors(state):
                raise OptimizerError(
                    f"what {self.name} keeps of a parameter of shape {shape} cannot be said: of tensors without memory it "
                    f"keeps other states than of numbers{f' ({failed})' if failed else ''}."
                ) from failed
            state, _ = self._after_steps(group, shape, dtype, meta)
        elementwise = {name: value.dtype for name, value in state.items() if shape and is_like(value, shape)}
        beside = sum(nbytes_of(value) for name, value in state.items() if name not in elementwise)
        return Keeps(elementwise, beside)

    def _after_steps(
        self, group: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[dict[str, Any], Exception | None]:
        """The states of a parameter of this shape after steps of it alone, and what a step raised."""
        made = twin(self.optimizer, {id(p): Parameter(torch.zeros(1)) for own in self._shapes for p in own})
        if getattr(made, "is_paged", False):
            made.is_paged = False  # bitsandbytes': as many bytes, in memory that only a GPU's driver has
        source = torch.Generator().manual_seed(0)
        parameter = Parameter(
            torch.randn(shape, generator=source).to(dtype)
            if device.type == "cpu"
            else torch.empty(shape, dtype=dtype, device=device)
        )
        made.param_groups[group]["params"].append(parameter)
        begun = self._begun(group, parameter)
        if begun:
            made.state[parameter] = begun
        before: Any = None
        with torch.random.fork_rng(devices=[]), ShapesOnly() if device.type == "meta" else nullcontext():
            try:
                if has_modes(self.optimizer):
                    call(made, Verb("train"))
                for number in range(_MOST_STEPS):
                    values = (
                        torch.randn(shape, generator=source) if device.type == "cpu" else torch.empty_like(parameter)
                    )
                    parameter.grad = values.to(parameter)
                    call(made, Verb())
                    now = _tensors(made.state.get(parameter, {}))
                    if number + 1 >= _LEAST_STEPS and now == before:
                        break
                    before = now
            except Exception as error:  # whatever the class raises
                return dict(made.state.get(parameter, {})), error
        return dict(made.state.get(parameter, {})), None

    def _begun(self, group: int, parameter: Tensor) -> dict[str, Any]:
        """What the constructor made for its parameters, in this one's shape."""
        given: Mapping[str, Any] = {}
        like: Tensor = parameter
        for like in self._shapes[group]:
            given = self.optimizer.state.get(like, {})
            if given:
                break
        return {
            name: torch.ones_like(parameter, dtype=value.dtype if not value.is_floating_point() else None).detach()
            if is_like(value, tuple(like.shape)) and like.ndim
            else torch.ones(value.shape, dtype=value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in given.items()
        }


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype of every tensor in these states, by words for it."""
    found = ((words, leaf) for name, value in state.items() for words, leaf in pieces(value, name))
    return {words: (tuple(leaf.shape), leaf.dtype) for words, leaf in found if isinstance(leaf, Tensor)}
