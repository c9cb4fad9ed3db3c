"""A LoRA adapter into its base model, file by file: what PEFT's merge_and_unload gives, without ever holding the model.

Both are directories as transformers and PEFT write them. Every file of the base is read tensor by tensor and written under
the same name; a tensor that the adapter changes becomes base + (B @ A) * scaling, with DoRA m / |base + BA| times that, one
that the adapter has trained whole (`modules_to_save`) is replaced. In fp32 the result equals PEFT's to the last bit.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import disk
from ..files.documents import printed, read_configuration, read_json_object, shown
from ..files.safetensors_header import read_header
from ..files.writer import Spec, dtype_named
from ..ranks.agreeing import attempt
from ..weights.export import WeightFiles

_PREFIX = "base_model.model."
_REFUSED = (
    "target_parameters",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "megatron_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
)


@dataclass
class Base:
    """A model directory: which file each tensor is in."""

    folder: Path
    homes: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Base:
        """Raises CheckpointError if there are no safetensors disk."""
        base = cls(folder)
        found = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        for path in found:
            for name in _checked(path):
                if name in base.homes:
                    raise CheckpointError(
                        f"{folder}: {shown(name)} is in {base.homes[name].name} and in {path.name}. Remove the files of an "
                        "earlier save."
                    )
                base.homes[name] = path
        if not base.homes:
            raise CheckpointError(
                f"{folder} holds no safetensors disk. Give the directory of the base model (for a model of the hub, its "
                "snapshot)."
            )
        return base

    def find(self, module: str) -> str:
        """The tensor of `module`, a name in PEFT's model; files may leave out its first parts ("transformer.")."""
        if module in self.homes:
            return module
        found = [name for name in self.homes if module.endswith(f".{name}") or name.endswith(f".{module}")]
        if len(found) != 1:
            raise CheckpointError(
                f"{self.folder} has no tensor {module}, which the adapter changes. Is it the base of this adapter? A tied "
                "weight is stored under its first name only and cannot be merged into."
            )
        return found[0]


def _checked(path: Path) -> list[str]:
    """The names in a safetensors file that is fit to be opened. Raises CheckpointError."""
    return list(read_header(str(path), CheckpointError).tensors)


@dataclass
class Change:
    """What the adapter does to one tensor of the base: parts of a low-rank change, or a whole replacement."""

    module: str
    parts: dict[str, str] = field(default_factory=dict)  # "A", "B", "magnitude", "whole" -> name in the adapter's file
    embedding: bool = False


def merge(
    base_folder: str | os.PathLike[str],
    adapter_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write base + adapter below `output`, with the base's other files (configuration, tokenizer). The files of weights.

    dtype: floating tensors are written in it, and added up in it if it is wider than the base's; None keeps that.
    Raises CheckpointError for an adapter that is not LoRA or DoRA on linear layers and embeddings, and for one that does not
    fit the base.
    """
    folder, target = Path(adapter_folder), Path(output)
    if target.resolve() in (Path(base_folder).resolve(), folder.resolve()):
        raise CheckpointError(f"{target}: write the merged model to a directory of its own.")
    config = _read_config(folder)
    base = Base.open(Path(base_folder))
    described = base.folder / "config.json"
    description = read_configuration(described, CheckpointError) if described.is_file() else None
    _checked(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", "pt") as adapter:
        changes = _changes(list(adapter.keys()), base)
        specs = _specs(base, changes, adapter, dtype)
        weights = WeightFiles(target, specs, max_shard_size=max_shard_size)
        try:
            for number, path in enumerate(sorted(set(base.homes.values())), start=1):
                say(f"{path.name} ({number} of {len(set(base.homes.values()))})")
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dictionary
                        tensor = file.get_tensor(name)
                        if name in changes:
                            # In a wider dtype than the base's own the sum would else be rounded to the base's first.
                            if _cast(tensor.dtype, dtype).itemsize > tensor.dtype.itemsize:
                                tensor = tensor.to(dtype)
                            tensor = _merged(tensor, name, changes[name], adapter, config)
                        weights.write(name, tensor.to(_cast(tensor.dtype, dtype)))
            added = [name for name in changes if name not in base.homes]
            for name in added:
                tensor = adapter.get_tensor(changes[name].parts["whole"])
                weights.write(name, tensor.to(_cast(tensor.dtype, dtype)))
            written = weights.finish()
        except BaseException:
            attempt(weights.abandon)  # the first error is the one to tell
            raise
    _copy_the_rest(base.folder, target)
    if description is not None and (dtype is not None or added):
        _write_description(description, target / "config.json", dtype, untied=bool(added))
    return written


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} is not an adapter of PEFT: it has no adapter_config.json.")
    config = read_json_object(folder / "adapter_config.json", CheckpointError)
    if not (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{folder} is not an adapter of PEFT: it has no adapter_model.safetensors.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is an adapter of type {printed(kind)}; only LORA can be merged here.")
    odd = [name for name in _REFUSED if config.get(name)]
    if odd:
        raise CheckpointError(
            f"{folder} was made with {odd[0]}, which cannot be merged here. Use PEFT's merge_and_unload."
        )
    _check_scaling(config, folder)
    return config


def _check_scaling(config: Mapping[str, Any], folder: Path) -> None:
    """The settings that numbers of the merged model depend on are of their kind."""
    patterns = config.get("alpha_pattern") or {}
    values = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise CheckpointError(
            f"{folder}/adapter_config.json: lora_alpha or alpha_pattern has something else than numbers."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{folder}/adapter_config.json: alpha_pattern has {shown(pattern)}, which is no pattern: {error}."
            ) from None


def _changes(names: list[str], base: Base) -> dict[str, Change]:
    """Name in the base (or a new one, of a head that was tied) -> what happens to it."""
    found: dict[str, Change] = {}
    for name in names:
        short = name.removeprefix(_PREFIX)
        match = re.fullmatch(
            r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?", short
        )
        if match is not None:
            target = base.find(f"{match[1]}.weight")
            change = found.setdefault(target, Change(match[1]))
            change.embedding |= "embedding" in match[2]
            change.parts["magnitude" if "magnitude" in match[2] else match[2][-1]] = name
            continue
        whole = short.replace(".base_layer.", ".").replace(".original_module.", ".")
        try:
            target = base.find(whole)
        except CheckpointError:
            if not re.search(r"(lm_head|score|classifier|output)", whole):
                raise
            target = whole
        found.setdefault(target, Change(whole)).parts["whole"] = name
    for target, change in found.items():
        if "whole" not in change.parts and not {"A", "B"} <= set(change.parts):
            raise CheckpointError(
                f"the adapter has only {sorted(change.parts.values())} for {target}: it is incomplete."
            )
    return found


def _specs(base: Base, changes: Mapping[str, Change], adapter: Any, dtype: torch.dtype | None) -> list[Spec]:
    specs = []
    for path in sorted(set(base.homes.values())):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                shape, own = tuple(piece.get_shape()), dtype_named(piece.get_dtype())
                change = changes.get(name)
                if change is not None and "whole" in change.parts:
                    other = tuple(adapter.get_slice(change.parts["whole"]).get_shape())
                    if other != shape:
                        raise CheckpointError(
                            f"{name} has shape {shape} in the base and {other} in the adapter: the vocabulary was resized. "
                            "Resize the base first."
                        )
                specs.append(Spec(name, _cast(own, dtype), shape))
    for name, change in changes.items():
        if name not in base.homes:
            piece = adapter.get_slice(change.parts["whole"])
            specs.append(Spec(name, _cast(dtype_named(piece.get_dtype()), dtype), tuple(piece.get_shape())))
    return specs


def _merged(weight: Tensor, name: str, change: Change, adapter: Any, config: dict[str, Any]) -> Tensor:
    if "whole" in change.parts and "A" not in change.parts:
        whole: Tensor = adapter.get_tensor(change.parts["whole"])
        return whole.to(weight.dtype)
    if weight.ndim != 2:
        raise CheckpointError(
            f"{name} has {weight.ndim} dimensions; only linear layers and embeddings are merged here."
        )
    # PEFT keeps adapters in fp32 when it loads 16-bit ones.
    low = {key: adapter.get_tensor(part).float() for key, part in change.parts.items() if key != "whole"}
    if weight.dtype == torch.float64:
        low = {key: adapter.get_tensor(part) for key, part in change.parts.items() if key != "whole"}
    rank = low["A"].shape[0] if low["A"].ndim == 2 else 0
    if not rank or low["B"].ndim != 2 or low["B"].shape[1] != rank:
        raise CheckpointError(
            f"{name}: the adapter's A has shape {tuple(low['A'].shape)} and its B {tuple(low['B'].shape)}, which have no "
            "product. Save the adapter again."
        )
    turned = bool(config.get("fan_in_fan_out")) or change.embedding
    delta = _turn(low["B"] @ low["A"], turned) * _scaling(change.module, rank, config)
    if delta.shape != weight.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(weight.shape)}, but the adapter's change has {tuple(delta.shape)}."
        )
    if "magnitude" not in low:
        weight = weight.clone()
        weight += delta
        return weight
    norm = torch.linalg.norm(_turn(weight, turned) + _turn(delta, turned), dim=1).to(weight.dtype)
    factor = _turn((low["magnitude"].reshape(-1) / norm).view(-1, 1), turned)
    return (factor * (weight + delta)).to(weight.dtype)


def _turn(matrix: Tensor, turned: bool) -> Tensor:
    return matrix.T if turned else matrix


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    alpha = _pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


def _pattern(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The first pattern that is the end of the module's name, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point and own.itemsize > 1 else own


def _copy_the_rest(base: Path, target: Path) -> None:
    """Configuration, tokenizer and what else lies beside the weights."""
    for path in base.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and ".index." not in path.name:
            copy = target / path.name
            if copy.is_symlink():  # writing through it would change a file elsewhere
                disk.remove(copy)
            shutil.copyfile(path, copy)


def _write_description(content: dict[str, Any], path: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    """The base's config.json as it is true of the merged model."""
    if dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in content:
                content[key] = str(dtype).removeprefix("torch.")
    if untied:  # the adapter brought a head of its own
        content["tie_word_embeddings"] = False
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
