"""bitsandbytes' weights in the frozen buffer: their codes as they are, and the scales that belong to them beside.

    Params4bit   codes: 4 bits a weight      quant_state.absmax: a scale for each 64 weights, a byte or fp32
    Int8Params   codes: 8 bits a weight      SCB: an fp32 scale for each row

Codes and scales are bytes to the engine: no precision casts them, and what is gathered is what the library wrote. Scales
below 1/256 of their codes (rows of an 8-bit weight, second-level scales) and tables of a few numbers stay whole on every
rank: sharding them would save less than half a per cent.

The library hangs scales on the weight and, for 8 bits, on the layer. Those objects stay: the ones in the buffer become views of
it, guarded like parameters. A weight that has not been quantised yet is, one at a time, when its unit is built. Without memory
it is read and quantised by one rank, in turns, and the others are sent codes and scales:

    unit   [ q k v o | gate up down ]      rank 0 reads and quantises q, v, gate; rank 1 k, o, up, down

Nothing is imported here: who has such weights has imported the library.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PrepareError
from ..files.scratch import give_back_free_memory
from ..plan.blueprint import Blueprint, Member
from ..ranks.ranks import Ranks
from .flat import give_memory
from .sources import Makers, Source, agree_on_facts

# Of the codes' bytes: scales below this share stay whole.
_WHOLE_SHARE = 1 / 256
# What the library leaves on a weight beside its codes: an object with tensors for 4 bits, a tensor for 8.
_HUNG_ON = ("quant_state", "SCB")


class QuantisedWeights:
    """The quantised weights of one model, by their parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[int, Any] = {}  # id(weight) -> the layer that computes with it
        self._packing: dict[int, bool] = {}
        self.whole_nbytes = 0  # scales and tables that every rank has whole
        library: Any = sys.modules.get("bitsandbytes")
        if library is None:
            return
        for module in model.modules():
            weight: Any = module._parameters.get("weight")
            if isinstance(weight, library.nn.Params4bit) or (
                isinstance(weight, library.nn.Int8Params) and not weight.has_fp16_weights
            ):
                self._layers[id(weight)] = module

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __contains__(self, key: object) -> bool:
        """Whether the parameter of that id is quantised, or is to be."""
        return key in self._layers

    def holds(self, members: Sequence[Member]) -> bool:
        """Whether any of these is quantised, or is to be."""
        return any(id(member.parameter) in self for member in members)

    def with_scales(
        self, blueprint: Blueprint, sources: MutableMapping[int, Source], makers: Makers, ranks: Ranks
    ) -> Blueprint:
        """`portion` with its weights quantised and with their scales as members. Collective where it has such weights.

        sources: the entries of weights that are quantised here are taken out. makers: the rank that quantises each of them.
        Raises PrepareError on every rank if the library cannot do it on this device.
        """
        quantised = [member for member in blueprint.frozen if id(member.parameter) in self]
        if not quantised:
            return blueprint
        found = {id(m.parameter): sources.pop(id(m.parameter)) for m in quantised if id(m.parameter) in sources}
        if found:
            give_back_free_memory()  # of the unit before this one
            agree_on_facts(list(found.values()), ranks)

        def quantise() -> None:
            for member in quantised:
                if makers.get(id(member.parameter), ranks.rank) == ranks.rank:
                    self._quantise(member, found.get(id(member.parameter)), ranks.device)

        ranks.together(quantise)
        if ranks.world_size > 1:
            for member in quantised:
                if id(member.parameter) in found:
                    self._send(member.parameter, makers[id(member.parameter)], ranks)
        members: list[Member] = []
        whole: list[Tensor] = []
        for member in blueprint.frozen:
            members.append(member)
            if id(member.parameter) in self:
                members[-1] = replace(member, dtype=member.parameter.dtype)
                for name, scales in self._scales(member.parameter):
                    if scales.nbytes >= member.parameter.nbytes * _WHOLE_SHARE:
                        owned: Any = scales
                        members.append(Member(f"{member.name}.{name}", owned, scales.dtype))
                whole += self._whole(member.parameter)
        for tensor in whole if ranks.world_size > 1 else ():
            ranks.broadcast(tensor)
        self.whole_nbytes += sum(tensor.nbytes for tensor in whole)
        return replace(blueprint, frozen=tuple(members))

    def _send(self, weight: Any, maker: int, ranks: Ranks) -> None:
        """Let every rank have what `maker` has made of `weight`, as the library leaves it."""
        mine = ranks.rank == maker
        parts = [weight.data, *(getattr(weight, name, None) for name in _HUNG_ON)] if mine else None
        codes, *hung = _broadcast(parts, maker, ranks)
        if mine:
            return
        give_memory(weight, codes)
        for name, value in zip(_HUNG_ON, hung, strict=True):
            if value is not None:
                setattr(weight, name, value)
        if hasattr(weight, "bnb_quantized"):
            weight.bnb_quantized = True
        layer = getattr(weight, "module", None)
        if layer is not None:
            layer.quant_state = weight.quant_state

    def _quantise(self, member: Member, source: Source | None, device: torch.device) -> None:
        weight: Any = member.parameter
        if source is not None:
            give_memory(weight, source.read(0, weight.numel()).view(weight.shape))
        try:
            if weight.is_floating_point() and not getattr(weight, "bnb_quantized", False):
                weight.data = weight.data.to("cpu")  # the library quantises what it moves from there
                weight.to(device)
            elif getattr(weight, "quant_state", None) is not None:
                weight.quant_state.to(device)
        except (RuntimeError, NotImplementedError, ValueError) as caught:
            raise PrepareError(
                f"{member.name}: bitsandbytes cannot quantise it on {device}: {caught} Take another bitsandbytes, or load the "
                "model without quantisation."
            ) from caught
        if not dict(self._scales(weight)):
            raise PrepareError(
                f"{member.name} holds codes without scales. Load the model with transformers' BitsAndBytesConfig, or leave its "
                "layer as it was built: prepare quantises it."
            )

    def _scales(self, weight: Any) -> Iterator[tuple[str, Tensor]]:
        """What grows with the weight: the same tensor objects for good."""
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield "absmax", state.absmax
            if state.state2 is not None:
                yield "nested_absmax", state.state2.absmax
        layer = self._layers[id(weight)]
        rows = getattr(weight, "SCB", None)
        if rows is None and hasattr(layer, "state"):
            rows = layer.state.SCB
        if rows is not None:
            yield "SCB", rows

    def _whole(self, weight: Any) -> Iterator[Tensor]:
        for _, scales in self._scales(weight):
            if scales.nbytes < weight.nbytes * _WHOLE_SHARE:
                yield scales
        state = getattr(weight, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for table in (getattr(part, "code", None), getattr(part, "offset", None)):
                if isinstance(table, Tensor):
                    yield table

    def settle(self, members: Sequence[Member]) -> None:
        """The weights are views now, and whole: let the layers compute with those, and never with copies of their own."""
        for layer in [self._layers[id(m.parameter)] for m in members if id(m.parameter) in self._layers]:
            weight: Any = layer.weight
            if hasattr(layer, "state"):
                rows = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
                layer.state.CB, layer.state.SCB = weight.data, rows
                weight.CB = weight.SCB = None
            elif getattr(layer, "support_avx512bf16_for_cpu", False):
                # In eval the library would give the weight another layout in memory of its own.
                self._packing[id(weight)] = True
                layer.support_avx512bf16_for_cpu = False

    def unsettle(self) -> None:
        """The weights have memory of their own again."""
        for key, layer in self._layers.items():
            if hasattr(layer, "state"):
                layer.state.CB = layer.weight.data
            elif key in self._packing:
                layer.support_avx512bf16_for_cpu = True


class _Outline(pickle.Pickler):
    """Pickles an object without its tensors, which are kept aside, in order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return None
        self.tensors.append(item.detach().contiguous())
        return tuple(item.shape), item.dtype


class _Outlined(pickle.Unpickler):
    """Makes the object again, with tensors of any content on `device`."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._device = device

    def persistent_load(self, described: Any) -> Tensor:
        shape, dtype = described
        self.tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
        return self.tensors[-1]


def _broadcast(value: Any, source: int, ranks: Ranks) -> Any:
    """Rank `source`'s `value` on every rank, its tensors over the data group. Collective."""
    if ranks.rank == source:
        file = io.BytesIO()
        outline = _Outline(file)
        outline.dump(value)
        ranks.broadcast_object(file.getvalue(), source)
        tensors = outline.tensors
    else:
        outlined = _Outlined(io.BytesIO(ranks.broadcast_object(None, source)), ranks.device)
        value = outlined.load()
        tensors = outlined.tensors
    for tensor in tensors:
        ranks.broadcast(tensor, source)
    return value


def refuse_other_kinds(model: nn.Module) -> None:
    """Raise PrepareError for weights that are several tensors in one, as torchao's and DTensors are."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise PrepareError(
                f"{name} is a {type(parameter).__name__}, several tensors in one, which cannot be laid into a buffer. Of "
                "quantised weights bitsandbytes' can be sharded: BitsAndBytesConfig(load_in_4bit=True)."
            )
