"""Checkpoints as DeepSpeed lays them out, written from a plain torch model and its AdamW, without DeepSpeed.

Keys, shapes and padding are those that DeepSpeed 0.14.4, 0.16.9 and 0.19.8 were seen to write (docs/log.md says how). The
classes that DeepSpeed pickles exist only while a file is written.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Tied, frozen and shapeless weights and a buffer; no size divides by 2 or 3 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.frozen = nn.Linear(5, 5)
        self.up, self.down = nn.Linear(5, 9), nn.Linear(9, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.gain = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("scale", torch.tensor([1.5, 2.0]))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.frozen(hidden)
        hidden = hidden + self.down(torch.tanh(self.up(hidden))) * self.gain
        return self.head(self.norm(hidden) * self.scale[0])


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups as scripts make them: matrices decay, the rest does not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-2},
    ]


@dataclass
class Layout:
    """How DeepSpeed was set.

    sub_group_numel: at stage 3, as soon as a rank has so many elements in a flat tensor the next one begins.
    aligned:         weights begin at multiples of 4 elements (0.19's parameter_alignment).
    elastic:         states without padding and without parameter groups (elastic_checkpoint).
    accumulates_fp32: with bf16 at stage 1, DeepSpeed's optimizer for it: it keeps all padding, and no scale and no stage.
    round_robin:     weights are flattened in another order, which is the one of param_shapes and not of the slices.
    frozen:          False leaves frozen weights out (exclude_frozen_parameters).
    """

    stage: int = 2
    world: int = 2
    version: str = "0.16.9"
    sub_group_numel: int = 10**9
    aligned: bool = False
    elastic: bool = False
    frozen: bool = True
    bf16: bool = False
    accumulates_fp32: bool = False
    round_robin: bool = False
    scaler: Mapping[str, Any] = field(default_factory=lambda: {"cur_scale": 1.0, "dynamic": False})
    client_state: Mapping[str, Any] = field(default_factory=lambda: {"note": {"epoch": 1}, "best": 0.5})


Named = dict[str, Tensor]


def write_deepspeed(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, layout: Layout
) -> Path:
    """Write `folder`/latest and its tag; gives the tag's directory."""
    tag = folder / f"global_step{steps}"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    names = {p: n for n, p in model.named_parameters()}
    param_groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    flats = _sub_groups(param_groups, dict(model.named_parameters()), layout)
    for rank in range(layout.world):
        if layout.stage == 3 or rank == 0:
            prefix = f"zero_pp_rank_{rank}_" if layout.stage == 3 else ""
            _save(
                _model_states(model, scheduler, steps, flats, rank, layout), tag / f"{prefix}mp_rank_00_model_states.pt"
            )
        prefix = "bf16_" if layout.bf16 else ""
        states = _optimizer_states(model, optimizer, param_groups, flats, rank, layout)
        content = {"optimizer_state_dict": states, "ds_config": {}, "ds_version": layout.version}
        _save(content, tag / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


def _sub_groups(param_groups: Sequence[Sequence[str]], weights: Named, layout: Layout) -> list[tuple[int, list[str]]]:
    """(parameter group, names) of what is flattened together."""
    found: list[tuple[int, list[str]]] = []
    for number, names in enumerate(param_groups):
        found.append((number, []))
        for name in names:
            used = sum(-(-weights[other].numel() // layout.world) for other in found[-1][1])
            if layout.stage == 3 and found[-1][1] and used >= layout.sub_group_numel:
                found.append((number, []))
            found[-1][1].append(name)
    if layout.round_robin:
        return [(number, names[0::2] + names[1::2]) for number, names in found]
    return found


def _model_states(
    model: nn.Module, scheduler: Any, steps: int, flats: Sequence[tuple[int, list[str]]], rank: int, layout: Layout
) -> dict[str, Any]:
    weights = dict(model.named_parameters())
    frozen = [name for name, p in weights.items() if not p.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    module = OrderedDict(
        (name, value if name in buffers else torch.empty(0, dtype=dtype) if layout.stage == 3 else value.to(dtype))
        for name, value in model.state_dict().items()
    )
    shared = {
        name: next(n for n, p in weights.items() if p is value)
        for name, value in model.named_parameters(remove_duplicate=False)
        if name not in weights
    }
    keeps = layout.frozen and layout.stage > 1  # at stage 1 they are in the module's state alone
    fragments = OrderedDict((n, weights[n].detach().to(dtype)) for n in frozen)
    if layout.stage == 3:
        fragments = OrderedDict((name, _part(value, rank, layout.world)) for name, value in fragments.items())
    return {
        "module": module,
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [OrderedDict((name, weights[name].shape) for name in names) for _, names in flats],
        "frozen_param_shapes": OrderedDict((n, weights[n].shape) for n in frozen) if layout.stage > 1 else None,
        "shared_params": shared if rank == 0 or layout.stage < 3 else {},
        "frozen_param_fragments": fragments if keeps else None,
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": steps,
        "global_samples": 4 * layout.world * steps,
        "dp_world_size": layout.world,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": layout.stage, "round_robin_gradients": layout.round_robin}},
        "ds_version": layout.version,
        **({"sparse_tensor_module_names": set()} if layout.version < "0.19" else {}),
        **({"checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}} if layout.version > "0.19" else {}),
        **layout.client_state,
    }


def _part(value: Tensor, rank: int, world: int) -> Tensor:
    """A rank's part of a weight at stage 3, padded to the size of the others'."""
    size = -(-value.numel() // world)
    padded = torch.cat([value.detach().reshape(-1), value.new_zeros(size * world - value.numel())])
    return padded[rank * size : (rank + 1) * size].clone()


def _optimizer_states(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    param_groups: Sequence[Sequence[str]],
    flats: Sequence[tuple[int, list[str]]],
    rank: int,
    layout: Layout,
) -> dict[str, Any]:
    weights = dict(model.named_parameters())
    cut = _each if layout.stage == 3 else _run
    masters, states, paddings = [], {}, []
    for number, (_, names) in enumerate(flats):
        held = {key: {n: optimizer.state[weights[n]][key] for n in names} for key in ("exp_avg", "exp_avg_sq")}
        flat, padding = cut({n: weights[n] for n in names}, rank, layout)
        masters.append(flat if layout.accumulates_fp32 else flat[: len(flat) - padding])
        paddings.append(padding)
        states[number] = {"step": optimizer.state[weights[names[0]]]["step"]}
        for key, values in held.items():
            moment, _ = cut(values, rank, layout)
            states[number][key] = moment[: len(moment) - padding] if layout.elastic else moment
    groups = optimizer.state_dict()["param_groups"]
    for index, group in enumerate(groups):
        group["params"] = [number for number, (own, _) in enumerate(flats) if own == index]
    base: Any = list(states.values()) if layout.elastic else {"state": states, "param_groups": groups}
    common = {
        "zero_stage": ("deepspeed.runtime.zero.config.ZeroStageEnum", layout.stage),
        "loss_scaler": ("deepspeed.runtime.fp16.loss_scaler.LossScaler", dict(layout.scaler)),
        "dynamic_loss_scale": False,
        "overflow": False,
    }
    if layout.stage == 3:
        return {**common, "partition_count": layout.world, "optimizer_state_dict": base, "fp32_flat_groups": masters}
    if layout.accumulates_fp32:
        common = {}
    return {
        **common,
        "clip_grad": 0.0,
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        **(
            {"param_alignment_paddings": [_behind(weights, n, layout) for _, n in flats]}
            if layout.version > "0.19" and common
            else {}
        ),
        "partition_count": [layout.world] * len(flats),
        "ds_version": layout.version,
        "param_slice_mappings": [_slices(weights, names, rank, layout) for _, names in flats],
    }


def _behind(weights: Mapping[str, Tensor], names: Sequence[str], layout: Layout) -> list[int]:
    """The padding behind each weight; the last one needs none."""
    sizes = [-weights[name].numel() % 4 if layout.aligned else 0 for name in names]
    return [*sizes[:-1], 0]


def _run(values: Named, rank: int, layout: Layout) -> tuple[Tensor, int]:
    """A rank's part of one run of all values, and how much of it is padding that DeepSpeed takes off."""
    parts = []
    for (_, value), behind in zip(values.items(), _behind(values, list(values), layout), strict=True):
        parts += [value.detach().reshape(-1), value.new_zeros(behind)]
    whole = torch.cat(parts)
    padding = -len(whole) % (2 * layout.world)
    whole = torch.cat([whole, whole.new_zeros(padding)])
    size = len(whole) // layout.world
    # It is noted for the last rank alone, also where it is longer than that rank's part.
    return whole[rank * size : (rank + 1) * size].clone(), padding if rank == layout.world - 1 else 0


def _each(values: Named, rank: int, layout: Layout) -> tuple[Tensor, int]:
    return torch.cat([_part(value, rank, layout.world) for value in values.values()]), 0


def _slices(weights: Mapping[str, Tensor], names: Sequence[str], rank: int, layout: Layout) -> Any:
    total, places = 0, {}
    names = sorted(names, key=list(weights).index) if layout.round_robin else names
    for name, behind in zip(names, _behind(weights, names, layout), strict=True):
        places[name] = (total, weights[name].numel())
        total += weights[name].numel() + behind
    size = -(-total // (2 * layout.world)) * 2
    found = OrderedDict()
    for name, (start, numel) in places.items():
        low, high = max(start, rank * size), min(start + numel, (rank + 1) * size)
        if low < high:
            place = {"numel": high - low, "start": low - rank * size}
            found[name] = ("deepspeed.utils.tensor_fragment.fragment_address", place)
    return found


# Objects of DeepSpeed's classes.


def _save(content: Any, path: Path) -> None:
    with _classes() as make:
        torch.save(_with_objects(content, make), path)


def _with_objects(value: Any, make: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and value[0].startswith("deepspeed."):
        return make(*value)
    if isinstance(value, OrderedDict):
        return OrderedDict((key, _with_objects(item, make)) for key, item in value.items())
    if isinstance(value, dict):
        return {key: _with_objects(item, make) for key, item in value.items()}
    return [_with_objects(item, make) for item in value] if type(value) is list else value


@contextmanager
def _classes() -> Iterator[Any]:
    """Modules of DeepSpeed's names for as long as a file is pickled."""
    made: dict[str, ModuleType] = {}

    def make(name: str, content: Any) -> Any:
        module, _, short = name.rpartition(".")
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            parent = ".".join(parts[:count])
            if parent not in sys.modules:
                sys.modules[parent] = made[parent] = ModuleType(parent)
        home = sys.modules[module]
        if not hasattr(home, short):
            stage = enum.IntEnum(short, {f"stage{n}": n for n in range(4)}, module=module)
            setattr(home, short, stage if isinstance(content, int) else type(short, (), {"__module__": module}))
        if isinstance(content, int):
            return getattr(home, short)(content)
        found = getattr(home, short)()
        vars(found).update(content)
        return found

    try:
        yield make
    finally:
        for name in made:
            del sys.modules[name]
