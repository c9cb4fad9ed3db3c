"""The state of a run, as scripts ask for it: who am I, who goes first, what do the ranks say together.

There is one run per process. `join_run` joins it once, and `PartialState` and `AcceleratorState` are
views of it that may be made anywhere, any number of times, as scripts written for accelerate do. Every wait in here
ends for all ranks if one of them fails: the others get its error instead of waiting for it.

    PartialState       ranks, device, and the verbs (print, wait, split, "main process first")
    AcceleratorState   the same, with the precision and the ZeRO settings of an Accelerator: `accelerator_state.py`
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, ParamSpec, TypeVar, overload

import numpy
import torch
from torch import Tensor

from ..config.environment import fork_launched
from ..errors import ConfigError, DataError
from ..ranks import batches
from ..ranks.words import behind
from .joined import Joined, forget_run, join_run, leave_run

logger = logging.getLogger("shardwise")

P = ParamSpec("P")
R = TypeVar("R")


class DistributedType(StrEnum):
    """How the processes of a run work together. shardwise gives the first four; scripts compare with the others."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    MEGATRON_LM = "MEGATRON_LM"
    XLA = "XLA"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"


class PartialState:
    """This process's place in the run, and what the processes do together without a model.

    cpu:     take the CPU even where GPUs are visible; only the first state of a process can choose.
    timeout: a timedelta; how long a collective may wait for the other ranks.
    backend: must be the device's, nccl on CUDA and gloo on the CPU. init_method: None or env://, the launcher's address.
    Raises ConfigError for another keyword of torch's init_process_group: the place in the run is the launcher's to say.
    """

    def __init__(
        self,
        cpu: bool | None = None,
        *,
        timeout: Any = None,
        backend: str | None = None,
        init_method: str | None = None,
        **kwargs: Any,
    ) -> None:
        strange = [name for name, value in kwargs.items() if value is not None]
        if strange or init_method not in (None, "env://"):
            raise ConfigError(
                f"{type(self).__name__}: {', '.join(strange) or 'init_method'} cannot be given; rank, size and address are "
                "those that the launcher has set. timeout, and the device's own backend, can."
            )
        self._ranks = join_run(use_cpu=cpu or None, timeout_s=None if timeout is None else timeout.total_seconds())
        own = "nccl" if self.device.type == "cuda" else "gloo"
        if backend not in (None, own):
            raise ConfigError(
                f"{type(self).__name__}: backend is {backend!r}, and tensors on {self.device} are sent by {own}. Leave it out."
            )

    @staticmethod
    def _reset_state(reset_partial_state: bool = True) -> None:
        """For tests, as accelerate's: the process knows of no run. The group of torch stays."""
        if reset_partial_state:
            forget_run()

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type}\nNum processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\nLocal process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )

    # Facts.

    @property
    def initialized(self) -> bool:
        return Joined.ranks is not None

    @property
    def debug(self) -> bool:
        """Whether shapes and dtypes are compared before tensors are sent: always, not only in accelerate's debug mode."""
        return True

    @debug.setter
    def debug(self, value: bool) -> None:
        if not value:
            logger.warning(
                "debug = False has no effect: shapes and dtypes are always compared before tensors are sent."
            )

    @property
    def fork_launched(self) -> bool:
        """Whether a launcher forked this process, as accelerate's notebook launcher says of those that it does."""
        return fork_launched()

    def set_device(self) -> None:
        """Make the rank's device torch's current one, as joining the run has done."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def num_processes(self) -> int:
        return self._ranks.world_size

    @property
    def process_index(self) -> int:
        return self._ranks.rank

    @property
    def local_process_index(self) -> int:
        return self._ranks.local_rank

    @property
    def device(self) -> torch.device:
        return self._ranks.device

    @property
    def backend(self) -> str | None:
        """The backend of the data group, or None in a run of one process."""
        if self.num_processes == 1:
            return None
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def distributed_type(self) -> DistributedType:
        if self.num_processes == 1:
            return DistributedType.NO
        return DistributedType.MULTI_GPU if self.device.type == "cuda" else DistributedType.MULTI_CPU

    @property
    def use_distributed(self) -> bool:
        return self.num_processes > 1

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        return self.process_index == self.num_processes - 1

    @property
    def default_device(self) -> torch.device:
        return torch.device("cuda" if self.device.type == "cuda" else "cpu")

    # Order among the processes.

    def wait_for_everyone(self) -> None:
        """Return once every process has called this."""
        self._ranks.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the block alone, then the others run it.

        If the main process raises in it, the others raise RankError, with its words, instead of waiting.
        """
        yield from self._first(self.is_main_process)

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """As `main_process_first`, with one first process on every machine."""
        yield from self._first(self.is_local_main_process)

    def _first(self, first: bool) -> Iterator[None]:
        if not first:
            with behind(lambda: self._ranks.agree(None)):  # the first ones' verdict
                yield
            return
        with self._ranks.agreeing():
            yield

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on the first process of each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)

    def destroy_process_group(self) -> None:
        leave_run()

    # Functions for some processes only.

    def _only(self, here: bool, function: Callable[P, R]) -> Callable[P, R | None]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return function(*args, **kwargs) if here else None

        return wrapper

    @overload
    def on_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]: ...
    @overload
    def on_main_process(self, function: None = None) -> Callable[[Callable[P, R]], Callable[P, R | None]]: ...
    def on_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: run the function on the main process; elsewhere it returns None."""
        return self.on_process(function, process_index=0)

    def on_local_main_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: run the function on the first process of each machine."""
        return self.on_local_process(function, local_process_index=0)

    def on_last_process(self, function: Callable[..., Any] | None = None) -> Any:
        """Decorator: run the function on the last process."""
        return self.on_process(function, process_index=self.num_processes - 1)

    def on_process(self, function: Callable[..., Any] | None = None, process_index: int | None = None) -> Any:
        """Decorator: run the function on the process with this index."""
        if process_index is None:
            raise ConfigError("on_process needs a process_index, as in @state.on_process(process_index=1).")
        if function is None:
            return functools.partial(self.on_process, process_index=process_index)
        return self._only(self.process_index == process_index, function)

    def on_local_process(
        self, function: Callable[..., Any] | None = None, local_process_index: int | None = None
    ) -> Any:
        """Decorator: run the function on the process with this index on each machine."""
        if local_process_index is None:
            raise ConfigError("on_local_process needs a local_process_index.")
        if function is None:
            return functools.partial(self.on_local_process, local_process_index=local_process_index)
        return self._only(self.local_process_index == local_process_index, function)

    # Shares of a list.

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's share of a list, tuple, tensor, `datasets.Dataset` or dictionary of them; the share may be
        empty. The first processes take one more where it does not divide.

        apply_padding: repeat the last entry until all shares have one length. `inputs` is left alone.
        Raises DataError if the values of a dictionary differ in length.
        """
        yield self._share(inputs, apply_padding)

    def _share(self, inputs: Any, apply_padding: bool) -> Any:
        if self.num_processes == 1:
            return inputs
        if isinstance(inputs, dict):
            lengths = {key: len(value) for key, value in inputs.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f"split_between_processes: the values differ in length: {lengths}.")
            return {key: self._share(value, apply_padding) for key, value in inputs.items()}
        total = len(inputs)
        each, extra = divmod(total, self.num_processes)
        start = self.process_index * each + min(self.process_index, extra)
        indices = list(range(start, start + each + (self.process_index < extra)))
        if apply_padding and total:
            indices += [total - 1] * (each + (extra > 0) - len(indices))
        if isinstance(inputs, Tensor):
            return inputs[indices]
        if isinstance(inputs, (list, tuple)):
            return type(inputs)(inputs[index] for index in indices)
        if callable(getattr(inputs, "select", None)):  # a datasets.Dataset
            return inputs.select(indices)
        raise DataError(
            f"split_between_processes cannot split a {type(inputs).__name__}; give a list, tuple, tensor, "
            "datasets.Dataset, or a dictionary of them."
        )


# The collectives as plain functions, over the run's ranks. Their rules: `ranks/batches.py`.


def gather(tensor: Any) -> Any:
    """Every rank's tensors joined along dimension 0; see `batches.gather`."""
    return batches.gather(join_run(), tensor)


def gather_object(object: Any) -> list[Any]:  # noqa: A002 - the name that scripts use
    """The ranks' lists joined in rank order; of anything else, the list of the ranks' values."""
    return batches.gather_object(join_run(), object)


def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
    """The tensors combined over the ranks, "sum", "mean", "max" or "min"; see `batches.reduce`."""
    return batches.reduce(join_run(), tensor, reduction, scale)


def broadcast(tensor: Any, from_process: int = 0) -> Any:
    """Rank `from_process`'s tensors, on every rank."""
    return batches.broadcast(join_run(), tensor, from_process)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Overwrite the list with rank `from_process`'s, in place, and give it back."""
    return batches.broadcast_object_list(join_run(), object_list, from_process)


def pad_across_processes(tensor: Any, dim: int = 0, pad_index: int | float = 0, pad_first: bool = False) -> Any:
    """The tensors padded along `dim` to the longest of any rank."""
    return batches.pad_across_processes(join_run(), tensor, dim, pad_index, pad_first)


def wait_for_everyone() -> None:
    """Return once every process has called this."""
    join_run().barrier()


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python's, numpy's and torch's generators, on the CPU and the GPUs.

    device_specific: add the rank to the seed, so that the ranks draw different numbers.
    deterministic:   also make torch refuse operations that have no deterministic form.
    """
    if device_specific:
        seed += join_run().rank
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_states(rng_types: list[str], generator: torch.Generator | None = None) -> None:
    """Give every rank rank 0's state of the named generators: "torch", "cuda", "generator" (the one given).

    Raises ConfigError for another name.
    """
    ranks = join_run()
    for kind in rng_types:
        if kind == "torch":
            torch.set_rng_state(ranks.broadcast_object(torch.get_rng_state()))
        elif kind == "cuda":
            if ranks.device.type == "cuda":
                torch.cuda.set_rng_state(ranks.broadcast_object(torch.cuda.get_rng_state()))
        elif kind == "generator":
            if generator is not None:
                generator.set_state(ranks.broadcast_object(generator.get_state()))
        else:
            raise ConfigError(f"rng_types holds {kind!r}; it can hold 'torch', 'cuda' and 'generator'.")
