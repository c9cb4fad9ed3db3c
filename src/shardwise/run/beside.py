"""accelerate beside a run of ours, in a script that changes the import of the Accelerator and keeps others from accelerate.

accelerate keeps who the ranks are in one dictionary of the process. While that is empty its logger raises, and its
collectives act as in a run of one process: `gather_object` gives each rank its own list. So it is told of the run: whatever
of it only asks for the ranks (`get_logger`, `PartialState`, `set_seed`, `gather_object`, ...) is then right, over the same
process group, and makes no second state. Its collectives compare shapes first, which it does on demand.

What would train or count beside us is refused: its Accelerator, once there is one of ours. Its `skip_first_batches`, given
a loader of ours, gives what ours gives, and not a loader that does not know its last batch.

Where accelerate is rightly in charge (`python -m shardwise.compat`) nothing of this happens. Nothing here imports accelerate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from ..config import foreign
from ..errors import ConfigError
from ..ranks.ranks import Ranks

_STATE, _LOADERS, _ACCELERATOR = "accelerate.state", "accelerate.data_loader", "accelerate.accelerator"
_MARK = (
    "_is_of_shardwise"  # in a dictionary that was filled here: accelerate may have emptied and filled it itself since
)


class _Told:
    """What accelerate is told. Class attributes, because there is one run per process.

    skip: (loader, number) -> a loader if that one is ours, else None.
    """

    ranks: Ranks | None = None
    accelerator: Callable[[], Any] | None = None
    skip: Callable[[Any, int], Any] | None = None
    watching = False


def tell(ranks: Ranks) -> None:
    """This process has joined a run. Raises ConfigError if accelerate has been told of another one."""
    if not foreign.answers():
        _Told.ranks = ranks
        _act()


def tell_accelerator(accelerator: Callable[[], Any], skip: Callable[[Any, int], Any]) -> None:
    """An Accelerator has been made; the arguments are those of _Told."""
    if not foreign.answers():
        _Told.accelerator, _Told.skip = accelerator, skip
        _act()


def forget() -> None:
    """The run has been left: accelerate knows of none, as before."""
    _Told.ranks = _Told.accelerator = None
    operations, state = sys.modules.get("accelerate.utils.operations"), sys.modules.get(_STATE)
    if state is None or not hasattr(state, "AcceleratorState"):
        return
    for known in (state.PartialState._shared_state, state.AcceleratorState._shared_state):
        if _MARK in known:
            known.clear()
    if operations is not None:
        operations.PartialState = state.PartialState  # type: ignore[attr-defined]


def _act() -> None:
    if not _Told.watching:
        _Told.watching = True
        changes = {_STATE: _describe, _LOADERS: _answer_skips, _ACCELERATOR: _refuse_a_second}
        foreign.ModuleWatch(changes).begin(0)
        return
    for name, change in ((_STATE, _describe), (_LOADERS, _answer_skips)):
        if name in sys.modules:
            change(sys.modules[name])


def _describe(module: ModuleType) -> None:
    """Fill accelerate's dictionaries with the run, unless it has found the same run by itself."""
    ranks = _Told.ranks
    if ranks is None or not hasattr(module, "AcceleratorState"):
        return
    partial, whole = module.PartialState._shared_state, module.AcceleratorState._shared_state
    if partial and _MARK not in partial:
        theirs = partial.get("process_index"), partial.get("num_processes")
        if theirs != (ranks.rank, ranks.world_size):
            raise ConfigError(
                f"accelerate's state says rank {theirs[0]} of {theirs[1]}, but this is rank {ranks.rank} of "
                f"{ranks.world_size}. Make shardwise's Accelerator or PartialState first: from shardwise import PartialState."
            )
    else:
        partial.clear()
        partial.update(_facts(module, ranks))
    accelerator = None if _Told.accelerator is None else _Told.accelerator()
    if accelerator is not None:
        if _MARK in partial:  # which each AcceleratorState copies
            partial["distributed_type"] = module.DistributedType(str(accelerator.distributed_type))
        whole.clear()
        whole.update(partial, **_settings(accelerator))
    operations = sys.modules.get("accelerate.utils.operations")
    if operations is not None:
        plain = module.DistributedType(_plain_type(ranks))
        body = {"distributed_type": property(lambda _: plain), "debug": property(lambda _: True)}
        operations.PartialState = type("PartialState", (module.PartialState,), body)  # type: ignore[attr-defined]


def _plain_type(ranks: Ranks) -> str:
    if ranks.world_size == 1:
        return "NO"
    return "MULTI_GPU" if ranks.device.type == "cuda" else "MULTI_CPU"


def _facts(module: ModuleType, ranks: Ranks) -> dict[str, Any]:
    cuda = ranks.device.type == "cuda"
    return {
        _MARK: True,
        "_cpu": not cuda,
        "backend": None if ranks.world_size == 1 else "nccl" if cuda else "gloo",
        "device": ranks.device,
        "debug": False,
        "distributed_type": module.DistributedType(_plain_type(ranks)),
        "fork_launched": False,
        "local_process_index": ranks.local_rank,
        "num_processes": ranks.world_size,
        "process_index": ranks.rank,
    }


def _settings(accelerator: Any) -> dict[str, Any]:
    """What an AcceleratorState says beside the ranks. Its deepspeed_plugin is ours."""
    return {
        _MARK: True,
        "_mixed_precision": accelerator.mixed_precision,
        "deepspeed_plugins": accelerator.deepspeed_plugin,
        "device_mesh": None,
        "dynamo_plugin": None,
        "parallelism_config": None,
        "torch_tp_plugin": None,
    }


def _refuse_a_second(module: ModuleType) -> None:
    kind = module.Accelerator
    original = kind.__init__

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        if _Told.accelerator is not None and _Told.accelerator() is not None and not foreign.answers():
            raise ConfigError(
                "accelerate's Accelerator was made in a process that has one of shardwise: each would train without knowing of "
                "the other. In its place use `from shardwise import Accelerator`, and a loop in place of transformers' Trainer."
            )
        original(self, *args, **kwargs)

    refuse.__wrapped__ = original  # type: ignore[attr-defined]
    kind.__init__ = refuse


def _answer_skips(module: ModuleType) -> None:
    """Let accelerate's `skip_first_batches`, which scripts have imported already, give ours for a loader of ours."""
    function = getattr(module, "skip_first_batches", None)
    if not isinstance(function, FunctionType) or hasattr(module, "_skip_as_shardwise") or function.__closure__:
        return
    original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)

    def skip(dataloader: Any, num_batches: int) -> Any:
        found = None if _Told.skip is None else _Told.skip(dataloader, num_batches)
        return original(dataloader, num_batches) if found is None else found

    module._skip_as_shardwise = skip  # type: ignore[attr-defined]
    function.__code__ = _passed_on.__code__


def _passed_on(dataloader, num_batches=0):  # type: ignore[no-untyped-def]
    return _skip_as_shardwise(dataloader, num_batches)  # type: ignore[name-defined]  # noqa: F821 - of accelerate's module
