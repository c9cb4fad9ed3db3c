"""zero.Init: models are built without memory, and each rank makes its own shard at `initialize`.

What a constructor does to its weights inside is recorded and gives the numbers of an ordinary build with the same seed. They
can be read and written in `with GatheredParameters(...)`. No dtype is forced on them: the engine computes in the
configuration's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ...building.loading import building
from ...errors import ConfigError
from ...run.deepspeed_words import load
from .comm import init_distributed
from .gathering import marking

original_arange = torch.arange


class Init:
    """A context that models are built in.

    module:              built already: nothing is to be done, `initialize` shards it.
    config_dict_or_path: the DeepSpeed configuration; it may have "auto" in it. Below stage 3 the context does nothing.
    enabled:             False does nothing either.
    Joins the run where it does something, as DeepSpeed's does: a constructor may ask for its rank. Collective.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        **options: Any,
    ) -> None:
        for name, value in (("data_parallel_group", data_parallel_group), ("mpu", mpu)):
            if value is not None:
                raise NotImplementedError(f"zero.Init: {name} is not taken; models are sharded over all ranks.")
        if (
            options.get("sequence_data_parallel_group") is not None
            or options.get("zero_param_parallel_group") is not None
        ):
            raise NotImplementedError("zero.Init: groups of ranks are not taken; models are sharded over all ranks.")
        source = config_dict_or_path if config_dict_or_path is not None else config
        stage = 3 if source is None else _stage_of(load(source)[0])
        self.enabled = enabled and stage == 3 and module is None
        self.dtype = dtype
        self._stack = ExitStack()
        if self.enabled:
            init_distributed()

    def __enter__(self) -> Init:
        if self.enabled:
            self._stack.enter_context(building())
            self._stack.enter_context(marking())
            if self.dtype is not None:
                self._stack.enter_context(_default_dtype(self.dtype))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)


def _stage_of(values: dict[str, Any]) -> int:
    section = values.get("zero_optimization") or {}
    if not isinstance(section, dict):
        raise ConfigError("zero.Init: zero_optimization is not an object.")
    stage = section.get("stage", 0)
    return stage if isinstance(stage, int) else 0


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class OnDevice:
    """Models are built in `dtype` on `device` inside; "meta" builds them for their shapes."""

    def __init__(self, dtype: torch.dtype, device: str = "meta", enabled: bool = True) -> None:
        self._dtype, self._device, self._enabled = dtype, device, enabled
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._enabled:
            self._stack.enter_context(_default_dtype(self._dtype))
            self._stack.enter_context(torch.device(self._device))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)


def zero_wrapper_for_fp_tensor_constructor(
    function: Callable[..., Any], target_fp_dtype: torch.dtype
) -> Callable[..., Any]:
    """`function`, whose floating results are in `target_fp_dtype`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        return made.to(target_fp_dtype) if isinstance(made, torch.Tensor) and made.is_floating_point() else made

    return wrapped
