"""Masters in the state dicts of a model: `model.state_dict()` gives them, and `load_state_dict` writes into them.

A script that made its model in fp32 and has it computed with in 16 bits expects fp32 there, as under torch's autocast.

    at rest        weight (16 bits) | master (fp32)
    state_dict     master, the very memory: no copy                      where this rank has the masters whole, on its device
                   weight                                                elsewhere: sharded over ranks, or offloaded
    load           master <- this rank's part of the fp32 value, then torch writes the rounded value into the weight

Nothing is communicated. Hooks lie on every module that has weights of its own, so a part's state dict is as the model's.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..plan.plan import Tier
from .guard import Released
from .listening import ModuleHook, call_before_forwards
from .sharded import ShardedModel
from .trained import Trained


class MastersInStateDicts:
    """Of one prepared model, until `undo`. dtypes: of its parameters as the script made them, by their ids."""

    def __init__(self, sharded: ShardedModel, dtypes: Mapping[int, torch.dtype]) -> None:
        self._sharded = sharded
        self._dtypes = dtypes
        self._shown: dict[int, Tensor] = {}  # by the id of the parameter
        self._told = False  # whether it is called before what is computed with the weights
        self._versions: dict[int, int] = {}  # of those, when what was written into them was last looked at
        self._homes: tuple[list[int], dict[int, tuple[Trained, int]]] = ([], {})
        self._followed: weakref.ref[Any] | None = None  # the state dict that is being made
        self._handles: list[RemovableHandle] = []
        for module in sharded.model.modules():
            if any(id(parameter) in dtypes for parameter in module._parameters.values()):
                show, load = ModuleHook(self._show), ModuleHook(self._load)
                self._handles.append(module.register_state_dict_post_hook(show))  # type: ignore[no-untyped-call]
                self._handles.append(module.register_load_state_dict_pre_hook(load))  # type: ignore[no-untyped-call]
        plan, ranks = sharded.plan, sharded.ranks
        here = plan.optimizer.tier is Tier.GPU and not (plan.optimizer.sharded and ranks.owners.size > 1)
        self._whole = here and not plan.parameter.leaves(ranks.shards.size)

    def undo(self) -> None:
        """State dicts are torch's own again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._shown.clear()
        if self._told:
            self._sharded.before_following.remove(self._take)

    def _home(self, parameter: Any) -> tuple[Trained, int] | None:
        """What trains it, and where; None unless the script made it in its master's dtype and it computes in less."""
        trained = self._sharded.trained()
        key = [id(one) for one in trained]
        if self._homes[0] != key:
            homes = {
                id(member.parameter): (one, index)
                for one in trained
                if not one.shares_weights
                for index, member in enumerate(one.buffer.members)
            }
            self._homes = key, homes
        home = self._homes[1].get(id(parameter))
        if home is None or self._dtypes.get(id(parameter)) != home[0].master.dtype:
            return None
        return home

    # Out.

    def _show(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if not self._whole:
            return
        if self._followed is None or self._followed() is not state:  # once for all modules
            self._followed = weakref.ref(state)
            self._sharded.follow_weights()
            self._sharded.engine.lanes.join()
        for name, parameter in module._parameters.items():
            found = state.get(prefix + name)
            if found is None or found is parameter:  # the script asked for its parameters themselves: keep_vars
                continue
            home = self._home(parameter)
            if home is not None:
                state[prefix + name] = self._master(parameter, *home).detach()

    def _master(self, parameter: Any, trained: Trained, index: int) -> Tensor:
        """A tensor over the master's memory, with a version of its own: it counts what scripts write, and not the steps."""
        slot, memory = trained.buffer.layout.slots[index], trained.master.tensor
        shown = self._shown.get(id(parameter))
        start = memory.storage_offset() + slot.offset
        address = memory.data_ptr() + slot.offset * memory.itemsize
        if shown is None or shown.data_ptr() != address:
            shown = torch.empty(0, dtype=memory.dtype, device=memory.device)
            shown.set_(memory.untyped_storage(), start, slot.shape, torch.empty(slot.shape, device="meta").stride())
            self._shown[id(parameter)], self._versions[id(parameter)] = shown, shown._version
            if not self._told:
                self._told = True
                self._sharded.before_following.append(self._take)
                self._handles.append(call_before_forwards(self._sharded.model, self._take))
        return shown

    @torch.no_grad()
    def _take(self) -> None:
        """Weights follow what the script has written into masters that it was shown."""
        for key, shown in self._shown.items():
            if shown._version != self._versions[key]:
                self._versions[key] = shown._version
                trained, index = self._homes[1][key]
                self._sharded.engine.lanes.join()
                trained.buffer.view(index).copy_(shown)

    # In.

    @torch.no_grad()
    def _load(self, module: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
        if metadata.get("assign_to_params_buffers") or self._sharded.takes_first_ranks:
            return
        for name, parameter in module._parameters.items():
            value, home = state.get(prefix + name), self._home(parameter)
            if home is None or not isinstance(value, Tensor) or value.is_meta or isinstance(parameter, Released):
                continue
            trained, index = home
            if (
                value.shape == trained.buffer.layout.slots[index].shape
                and value.dtype.itemsize > trained.buffer.dtype.itemsize
            ):
                _write(self._sharded, trained, index, value)


def _write(sharded: ShardedModel, trained: Trained, index: int, value: Tensor) -> None:
    """This rank's part of the master becomes that of `value`."""
    engine = sharded.engine
    engine.lanes.join()
    master = engine.look_at(trained.master)
    flat = value.reshape(-1)
    for piece in trained.region.pieces:
        if piece.slot == index:
            into = master[piece.in_shard : piece.in_shard + piece.numel]
            into.copy_(flat[piece.in_slot : piece.in_slot + piece.numel])
    if trained.master.tier is not Tier.GPU:
        engine.put_to_rest(master, trained.master)
