"""GatheredParameters, and the attributes that programs read on sharded parameters.

    params         one parameter, or any iterable; None among them, repetitions and parameters of no engine are passed over
    modifier_rank  None: what is written counts where every rank writes the same, else WriteError; DeepSpeed drops it
                   r: at the end rank r's values become everybody's, masters included
    in a pass      gathered as for a module of the model; nothing can be written there

A parameter that has no memory yet (`building.py`) has it inside, and what is written is recorded:
`building/deferred_values.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook

from ...building.deferred_values import in_memory
from ...building.initialising import is_deferring, last_write, value_of
from ...errors import ConfigError
from ...ranks.ranks import Ranks
from ...zero.access import gathered
from ...zero.guard import Released
from ...zero.sharded import ShardedModel
from .comm import met


class ZeroParamStatus(Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(Enum):
    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


# What programs read on a parameter that DeepSpeed has partitioned.
_MARKS = ("ds_id", "ds_shape", "ds_numel", "ds_status", "ds_persist", "ds_active_sub_modules")
_numbers = itertools.count()


def mark(sharded: ShardedModel) -> None:
    """Set the marks on the parameters of a model whose weights are sharded: they are DeepSpeed's interface."""
    if sharded.plan.parameter.sharded or sharded.plan.frozen.sharded:
        for parameter in sharded.model.parameters():
            _mark(parameter, ZeroParamStatus.AVAILABLE)  # wherever the engine has not released it


@contextmanager
def marking() -> Iterator[None]:
    """Inside, every parameter that a module gets has the marks."""

    def see(module: nn.Module, name: str, parameter: Parameter | None) -> None:
        if parameter is not None:
            _mark(parameter, ZeroParamStatus.NOT_AVAILABLE)  # as programs expect, small ones that have memory too

    handle = register_module_parameter_registration_hook(see)
    try:
        yield
    finally:
        handle.remove()


def _mark(parameter: Parameter, status: ZeroParamStatus) -> None:
    if "ds_status" not in vars(Tensor):
        Tensor.ds_status = property(_status, _set_status, _forget_status)  # type: ignore[attr-defined]
    number = vars(parameter).get("ds_id")
    marks: tuple[Any, ...] = (
        next(_numbers) if number is None else number,
        parameter.shape,
        parameter.numel(),
        status,
        False,
        set(),
    )
    for name, value in zip(_MARKS, marks, strict=True):
        setattr(parameter, name, value)


def _status(tensor: Tensor) -> ZeroParamStatus:
    """`ds_status`: of a parameter that is marked, whether it can be read now. Of a tensor that autograd has kept of a sharded
    weight, a view, AVAILABLE.

    Autograd functions that keep a weight ask what they have kept in their backward. The engine has gathered it by then.
    """
    marked: ZeroParamStatus | None = vars(tensor).get("ds_status")
    if marked is not None:
        return ZeroParamStatus.NOT_AVAILABLE if issubclass(type(tensor), Released) else marked
    if tensor.layout is torch.strided and not tensor.is_meta:
        storage = tensor.untyped_storage()._cdata
        for sharded in ShardedModel.all():
            if any(part.whole.untyped_storage()._cdata == storage for unit in sharded.units for part in unit.parts):
                return ZeroParamStatus.AVAILABLE
    raise AttributeError("ds_status")


def _set_status(tensor: Tensor, status: ZeroParamStatus) -> None:
    vars(tensor)["ds_status"] = status


def _forget_status(tensor: Tensor) -> None:
    del vars(tensor)["ds_status"]


def forget_marks(sharded: ShardedModel) -> None:
    for parameter in sharded.model.parameters():
        for name in _MARKS:
            if name in vars(parameter):
                delattr(parameter, name)


class GatheredParameters:
    """A context in which parameters are whole on every rank. Collective."""

    def __init__(
        self,
        params: Parameter | Iterable[Parameter | None] | None,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        given = [params] if params is None or isinstance(params, Tensor) else list(params)
        found = {id(p): p for p in given if p is not None} if enabled else {}
        self.params: list[Any] = list(found.values())
        self.modifier_rank = modifier_rank
        self._stack = ExitStack()
        self._recorded: list[Any] = []  # those whose record is read and written as it is
        self._written: list[Any] = []
        self._away: list[Any] = []  # of zero.Init, and in no engine yet
        self._small: list[Any] = []  # those of them that have memory all the time

    def __enter__(self) -> None:
        deferred, held = self._deferred(), self._held()
        self._recorded = deferred if is_deferring() else []
        self._written = [last_write(parameter) for parameter in self._recorded]
        away = [p for p in self.params if vars(p).get("ds_status") is ZeroParamStatus.NOT_AVAILABLE]
        self._away, self._small = away, [p for p in away if not p.is_meta]
        if deferred and not self._recorded:
            self._stack.enter_context(in_memory(deferred, met(), self.modifier_rank))
        for parameter in away:
            vars(parameter)["ds_status"] = ZeroParamStatus.AVAILABLE
        if held:
            in_pass = any(owner.in_pass for owner in ShardedModel.all())
            self._stack.enter_context(gathered(held, modify=self.modifier_rank == 0 and not in_pass))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            if error is not None:
                return self._stack.__exit__(kind, error, trace)
            with self._stack:
                if self.modifier_rank is not None:
                    self._share()
            return None
        finally:
            for parameter in self._away:
                vars(parameter)["ds_status"] = ZeroParamStatus.NOT_AVAILABLE

    def _deferred(self) -> list[Any]:
        return [parameter for parameter in self.params if parameter.is_meta]

    def _held(self) -> list[Any]:
        return [p for p in self.params if not p.is_meta and any(owner.holds(p) for owner in ShardedModel.all())]

    def _share(self) -> None:
        """Let the values of `modifier_rank` be everybody's, where the engine does not do so itself."""
        ranks, source = met(), self.modifier_rank
        assert source is not None
        if ranks is None or ranks.world_size == 1:
            return
        if not 0 <= source < ranks.world_size:
            raise ConfigError(f"GatheredParameters: modifier_rank is {source}, and there are {ranks.world_size} ranks.")
        self._share_deferred(ranks, source)
        with torch.no_grad():
            for parameter in self._small:
                values = parameter.detach().to(ranks.device, copy=True)
                ranks.broadcast(values, source)
                parameter.copy_(values)
        if source != 0 and not any(owner.in_pass for owner in ShardedModel.all()):
            with torch.no_grad():
                for parameter in self._held():
                    values = parameter.detach().clone()
                    ranks.broadcast(values, source)
                    parameter.copy_(values)

    def _share_deferred(self, ranks: Ranks, source: int) -> None:
        recorded = self._recorded
        changed = [last_write(p) is not before for p, before in zip(recorded, self._written, strict=True)]
        for parameter, written in zip(recorded, ranks.any_of(changed), strict=True):
            if written:
                values = value_of(parameter).to(ranks.device)
                ranks.broadcast(values, source)
                with torch.no_grad():
                    parameter.copy_(values.cpu())


def register_external_parameter(module: nn.Module, parameter: Parameter) -> None:
    """Nothing to do: a weight that another module's forward reads is gathered with its unit, or refused by name."""
    if not isinstance(module, nn.Module) or not isinstance(parameter, Parameter):
        raise RuntimeError("register_external_parameter: takes a module and a parameter.")


def unregister_external_parameter(module: nn.Module, parameter: Parameter) -> None:
    """Nothing to do, as `register_external_parameter`."""
