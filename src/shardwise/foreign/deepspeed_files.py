"""Which files a DeepSpeed checkpoint consists of, and what they say, checked by kind before anything is made of it.

latest                                                  the name of the newest tag
global_step3/
  mp_rank_00_model_states.pt                            stages 1, 2: 16-bit weights, buffers, frozen weights, shapes
  zero_pp_rank_1_mp_rank_00_model_states.pt             stage 3: of each rank; weights are empty, frozen ones are parts
  [bf16_]zero_pp_rank_1_mp_rank_00_optim_states.pt      of each rank: fp32 partitions and optimizer states
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files.documents import SETTINGS_NBYTES, printed, read_text, shown
from .pickles import Fields, Inert, checked_name, read_pickle

_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_OTHER_LAYOUTS = (
    ("layer_*-model_states.pt", "a pipeline of stages"),
    ("*expert_*_model_states.pt", "a mixture of experts"),
    ("zero/*/fp32.pt", "DeepSpeed's universal form"),
)
# What DeepSpeed itself puts beside a script's client_state.
_OWN = {
    *("module", "buffer_names", "optimizer", "lr_scheduler", "data_sampler", "random_ltd", "num_experts"),
    *("param_shapes", "frozen_param_shapes", "shared_params", "frozen_param_fragments"),
    *("sparse_tensor_module_names", "csr_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size"),
    *("ds_config", "ds_version", "checkpoint_parallel_dimensions", "universal_checkpoint_info"),
}


@dataclass(frozen=True)
class DeepSpeedFiles:
    """The files of one tag. models: one at stages 1 and 2, at stage 3 one of each rank. optimizers: one of each rank."""

    folder: Path
    models: list[Path]
    optimizers: list[Path]


def find_tag(source: Path) -> Path | None:
    """The directory of the tag that `source` is, or names as its newest one; None if it is no DeepSpeed checkpoint."""
    if any(_MODEL.fullmatch(path.name) for path in source.iterdir()):
        return source
    latest = source / "latest"
    if latest.is_file():
        tag = read_text(latest, CheckpointError, SETTINGS_NBYTES).strip()
        if not tag or "/" in tag or tag in (".", "..") or not (source / tag).is_dir():
            raise CheckpointError(
                f"{printed(latest)} names {shown(tag)}, which is no directory beside it. Give the tag's directory."
            )
        return source / tag
    tags = sorted(path.parent for path in source.glob("*/*mp_rank_*_model_states.pt"))
    if len(set(tags)) > 1:
        names = ", ".join(printed(tag.name) for tag in dict.fromkeys(tags))
        raise CheckpointError(
            f"{printed(source)} has several tags ({names}) and no file `latest`. Give the directory of one."
        )
    return tags[0] if tags else None


def files_of(folder: Path) -> DeepSpeedFiles:
    """The files of the tag at `folder`. Raises CheckpointError for a layout that is not read, and a missing rank."""
    where = printed(folder)
    for pattern, words in _OTHER_LAYOUTS:
        if any(folder.glob(pattern)):
            raise CheckpointError(
                f"{where} holds {words}, which is not imported: only weights under ZeRO-1, 2 and 3 are."
            )
    models, optimizers = _by_rank(folder, _MODEL), _by_rank(folder, _OPTIMIZER)
    if not models:
        raise CheckpointError(f"{where} is incomplete: it has no *mp_rank_00_model_states.pt.")
    if not optimizers:
        raise CheckpointError(
            f"{where} has no *_optim_states.pt: it was saved without ZeRO, or its optimizer states were left behind. Load its "
            "weights in the script."
        )
    for kind, found in (("model", models), ("optim", optimizers)):
        gap = next((rank for rank in range(len(found)) if rank not in found), None)
        if gap is not None:
            raise CheckpointError(f"{where} is incomplete: rank {gap}'s *_{kind}_states.pt is missing.")
    return DeepSpeedFiles(
        folder, [models[rank] for rank in range(len(models))], [optimizers[rank] for rank in range(len(optimizers))]
    )


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        rank, part = int(match[1] or 0), int(match[2])
        if part:
            raise CheckpointError(
                f"{printed(path)} is a part of a model whose tensors are split over ranks, which is not imported: only weights "
                "under ZeRO-1, 2 and 3 are."
            )
        if rank in found:
            raise CheckpointError(f"{printed(folder)} has two files of rank {rank}: {found[rank].name}, {path.name}.")
        found[rank] = path
    return found


@dataclass(frozen=True)
class ModelStates:
    """What a file of model states says.

    groups: of trained weights, see `partitions`. frozen: name -> shape. shared: tied name -> first name.
    content: the rest, by DeepSpeed's names.
    """

    content: Fields
    groups: list[dict[str, tuple[int, ...]]]
    frozen: dict[str, tuple[int, ...]]
    shared: dict[str, str]
    world_size: int
    version: str
    steps: int

    @classmethod
    def read(cls, path: Path) -> ModelStates:
        content = Fields(read_pickle(path), printed(path))
        if "mp_world_size" in content.content and content.count("mp_world_size") != 1:
            raise CheckpointError(
                f"{content.where} is of a model whose tensors are split over ranks, which is not imported."
            )
        if content.content.get("param_shapes") is None:
            raise CheckpointError(
                f"{content.where} has no param_shapes: it was saved without ZeRO, which is not imported."
            )
        groups = [
            _shapes(group, f"{content.where}: param_shapes of group {number}")
            for number, group in enumerate(content.rows("param_shapes"))
        ]
        twice = next((name for name, count in Counter(chain.from_iterable(groups)).items() if count > 1), None)
        if twice is not None:
            raise CheckpointError(f"{content.where}: {printed(twice)} is in two groups.")
        shared = content.content.get("shared_params") or {}
        return cls(
            content,
            groups,
            _shapes(content.content.get("frozen_param_shapes") or {}, f"{content.where}: frozen_param_shapes"),
            {
                checked_name(a, content.where): checked_name(b, content.where)
                for a, b in Fields(shared, content.where).content.items()
            },
            content.count("dp_world_size"),
            str(content.content.get("ds_version", "of an unknown version")),
            content.count("global_steps") - content.count("skipped_steps"),
        )

    @property
    def round_robin(self) -> bool:
        """Whether weights were reordered before they were flattened (round_robin_gradients)."""
        settings: Any = self.content.content.get("ds_config")
        zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
        return isinstance(zero, dict) and zero.get("round_robin_gradients") is True

    def client_state(self) -> dict[str, Any]:
        """What the script gave to save_checkpoint."""
        return {key: value for key, value in self.content.content.items() if key not in _OWN}


@dataclass(frozen=True)
class OptimizerStates:
    """What a file of optimizer states says.

    stage:      1, 2 or 3. masters: the flat fp32 partition of each group.
    states:     of each group, by the optimizer's names. param_groups: None where only states were kept (elastic_checkpoint).
    slices:     of each group, name -> (start, numel) in the partition, where that was written.
    alignment:  of each group, the padding behind each weight, where that was written.
    """

    content: Fields
    stage: int
    masters: list[Any]
    states: list[dict[Any, Any]]
    param_groups: list[dict[Any, Any]] | None
    slices: list[dict[str, tuple[int, int]]] | None
    alignment: list[list[int]] | None

    @classmethod
    def read(cls, path: Path) -> OptimizerStates:
        content = Fields(read_pickle(path), printed(path)).below("optimizer_state_dict")
        # DeepSpeed's optimizer for bf16 with fp32 accumulation, which is of stage 1, does not say so.
        says = "zero_stage" in content.content or "single_partition_of_fp32_groups" not in content.content
        stage = content.get("zero_stage", (int, Inert), "a stage") if says else 1
        stage = stage.args[0] if isinstance(stage, Inert) and stage.args else stage
        if type(stage) is not int or stage not in (1, 2, 3):
            raise CheckpointError(f"{content.where}: zero_stage is {shown(stage)}; stages 1, 2 and 3 are imported.")
        if content.content.get("ds_zero_partition_groups") is not None:
            raise CheckpointError(
                f"{content.where}: weights lie in groups of ranks of different sizes, which is not imported."
            )
        masters = content.rows("fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups")
        base = content.get(
            "optimizer_state_dict" if stage == 3 else "base_optimizer_state", (dict, list), "an optimizer's state"
        )
        states, groups = _states(base, content.where, len(masters))
        return cls(content, stage, masters, states, groups, _slices(content), _alignment(content))


def _states(base: Any, where: str, count: int) -> tuple[list[dict[Any, Any]], list[dict[Any, Any]] | None]:
    """The states of each of `count` flat groups, and the parameter groups, from either form in which they are kept."""
    if isinstance(base, list):
        states, groups = dict(enumerate(base)), None
    else:
        fields = Fields(base, f"{where}: the optimizer")
        states, groups = fields.get("state", dict, "a dictionary"), fields.rows("param_groups")
        for group in groups:
            Fields(group, f"{fields.where}: a parameter group").numbers("params")
    found = []
    for number in range(count):
        if not isinstance(states.get(number), dict):
            raise CheckpointError(
                f"{where}: group {number} has no optimizer states. Were they on a drive? Save from memory."
            )
        found.append(states[number])
    return found, groups


def _slices(content: Fields) -> list[dict[str, tuple[int, int]]] | None:
    if "param_slice_mappings" not in content.content:
        return None
    found = []
    for row in content.rows("param_slice_mappings"):
        addresses = Fields(row, f"{content.where}: param_slice_mappings").content
        found.append(
            {
                name: (_count(address.attribute("start")), _count(address.attribute("numel")))
                for name, address in addresses.items()
                if isinstance(address, Inert)
            }
        )
    return found


def _count(value: Any) -> int:
    return value if type(value) is int else -1


def _alignment(content: Fields) -> list[list[int]] | None:
    found = content.content.get("param_alignment_paddings")
    if found is None:
        return None
    if not isinstance(found, list) or not all(
        isinstance(row, list) and all(type(n) is int and n >= 0 for n in row) for row in found
    ):
        raise CheckpointError(
            f"{content.where}: param_alignment_paddings is {shown(found)}, which is no list of numbers."
        )
    return found


def _shapes(value: Mapping[Any, Any], where: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in Fields(value, where).content.items():
        if not isinstance(shape, (torch.Size, tuple, list)) or not all(type(n) is int and n > 0 for n in shape):
            raise CheckpointError(f"{where}: {shown(name)} has the shape {shown(shape)}.")
        found[checked_name(name, where)] = tuple(shape)
    return found
