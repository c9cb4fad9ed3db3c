"""From a checkpoint of a run to the files that transformers and PEFT load, on any machine, one tensor in memory at a time.

What the run trained decides: with PEFT, the adapter in PEFT's own format; else the whole model. The checkpoint carries the
configurations for it (see `facts_of` in `checkpoint/model_facts.py`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import disk
from ..files.names import below
from ..files.writer import Spec, TensorFile, dtype_named
from ..weights.export import WeightFiles
from .directory import resolve
from .read import Checkpoint, shared_by


def export(
    checkpoint_folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: int = 0,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
) -> list[Path]:
    """Write the model (or its adapter) of a checkpoint below `output`; the files of weights.

    model: which of the models that the run prepared. dtype: None writes weights in the dtype that the user gave them.
    Raises CheckpointError.
    """
    checkpoint = Checkpoint(resolve(Path(checkpoint_folder)))
    facts = checkpoint.manifest.facts.get(f"model{model}")
    if facts is None:
        raise CheckpointError(f"{checkpoint.directory} has no model {model}.")
    target = Path(output)
    if facts["peft"]:
        return _export_adapters(checkpoint, facts, target, f"model{model}", dtype)
    target.mkdir(parents=True, exist_ok=True)
    return _export_model(checkpoint, facts, target, f"model{model}", dtype, max_shard_size)


def _wanted(name: str, own: torch.dtype, facts: dict[str, Any], dtype: torch.dtype | None) -> torch.dtype:
    if not own.is_floating_point or own.itemsize == 1:
        return own
    return dtype if dtype is not None else dtype_named(facts["dtypes"][name]) if name in facts["dtypes"] else own


def _export_model(
    checkpoint: Checkpoint,
    facts: dict[str, Any],
    target: Path,
    model: str,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
) -> list[Path]:
    record = checkpoint.manifest.frozen
    known = record["models"].get(model, {"sums": {}})["sums"]  # of an imported run they are what the checkpoint holds
    names = [name for name in known if f"{model}/frozen/{name}" not in checkpoint]
    if names and record["kept"] not in ("inside", "outside"):
        checkpoint.add(shared_by(checkpoint), f"{model}/frozen/")
    elif names:
        raise CheckpointError(
            f"{checkpoint.directory} does not hold the frozen weights of the model ({names[0]}, ...). Save with "
            "include_frozen=True, or export from the script with accelerator.save_model."
        )
    ignored = set(facts["ignored"])
    where = {
        address.split("/", 2)[2]: address
        for address in checkpoint.addresses(f"{model}/")
        if address.split("/", 2)[2] not in ignored
    }
    specs = [
        Spec(name, _wanted(name, checkpoint.dtype(address), facts, dtype), checkpoint.shape(address))
        for name, address in where.items()
    ]
    weights = WeightFiles(target, specs, max_shard_size=max_shard_size, aliases=facts["aliases"])
    try:
        for spec in specs:
            weights.write(spec.name, checkpoint.read_whole(where[spec.name]).to(spec.dtype))
        written = weights.finish()
    except BaseException:
        weights.abandon()
        raise
    for name in ("config", "generation_config"):
        if facts[name] is not None:
            content = dict(facts[name])
            if name == "config" and dtype is not None:
                content["dtype"] = str(dtype).removeprefix("torch.")
            (target / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return written


def _export_adapters(
    checkpoint: Checkpoint, facts: dict[str, Any], target: Path, model: str, dtype: torch.dtype | None
) -> list[Path]:
    """PEFT's adapter_config.json and adapter_model.safetensors; adapters but the default one in a directory each."""
    found = []
    for adapter, config in facts["peft"].items():
        folder = target if adapter == "default" else below(target, adapter, "the adapter")
        record = facts.get("adapters", {}).get(adapter)
        if record is None:
            found.append(
                (folder, _where_by_rule(checkpoint, facts, model, adapter), {**config, "inference_mode": True})
            )
        else:
            found.append((folder, _where_by_record(checkpoint, record, model, adapter), config))
    written = []
    for folder, where, config in found:
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / "adapter_model.safetensors")
        _write_adapter(checkpoint, facts, where, written[-1], dtype)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return written


def _write_adapter(
    checkpoint: Checkpoint, facts: dict[str, Any], where: dict[str, str], path: Path, dtype: torch.dtype | None
) -> None:
    specs = [
        Spec(name, _wanted(a.split("/", 2)[2], checkpoint.dtype(a), facts, dtype), checkpoint.shape(a))
        for name, a in where.items()
    ]
    partial = path.with_name(path.name + ".partial")
    try:
        with TensorFile(partial, specs) as file:
            for spec in specs:
                file.write(spec.name, checkpoint.read_whole(where[spec.name]).to(spec.dtype))
        disk.move_over(partial, path)
    finally:
        disk.remove(partial)


def _where_by_record(checkpoint: Checkpoint, record: Any, model: str, adapter: str) -> dict[str, str]:
    """Name in the adapter's file -> address, as peft itself said when the checkpoint was saved."""
    match record:
        case {"error": reason}:
            raise CheckpointError(
                f"peft could not save the adapter {adapter!r} when {checkpoint.directory} was saved: {reason} Load the "
                "checkpoint in the script and call model.save_pretrained."
            )
        case {"weights": dict() as weights, "computed": list() as computed} if all(
            isinstance(name, str) for name in (*weights.values(), *computed)
        ):
            pass
        case _:
            raise CheckpointError(
                f"{checkpoint.directory} does not say what the adapter {adapter!r} consists of: damaged."
            )
    where = {name: f"{model}/adapter/{adapter}/{name}" for name in computed}
    for name, source in weights.items():
        addresses = [f"{model}/{kind}/{source}" for kind in ("trained", "frozen", "buffer")]
        where[name] = next((a for a in addresses if a in checkpoint), addresses[0])
    absent = [name for name, address in where.items() if address not in checkpoint]
    if absent or not where:
        raise CheckpointError(
            f"{checkpoint.directory} holds {len(where) - len(absent)} of the {len(where)} tensors of the adapter {adapter!r}"
            + (f"; {absent[0]} is missing." if absent else ".")
        )
    return where


# Checkpoints of before peft was asked.

_ENCODERS = ("P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def _where_by_rule(checkpoint: Checkpoint, facts: dict[str, Any], model: str, adapter: str) -> dict[str, str]:
    """Name in the adapter's file -> address, for what that run trained."""
    kind = facts["peft"][adapter]["peft_type"]
    if kind in _ENCODERS:
        raise CheckpointError(
            f"an adapter of type {kind} is what its encoder computes, which a checkpoint of this age does not hold. Load the "
            "checkpoint in the script and call model.save_pretrained."
        )
    where: dict[str, str] = {}
    for address in checkpoint.addresses(f"{model}/trained/"):
        name = _peft_name(address.split("/", 2)[2], adapter, [other for other in facts["peft"] if other != adapter])
        if name is not None:
            where[name] = address
    if not where:
        raise CheckpointError(f"{checkpoint.directory} holds no trained weight of the adapter {adapter!r}.")
    return where


def _peft_name(name: str, adapter: str, others: list[str]) -> str | None:
    """A parameter's name in an adapter's file, as PEFT writes it; None if it is another adapter's."""
    if any(f".{other}." in name or name.endswith(f".{other}") for other in others):
        return None
    if name == f"prompt_encoder.{adapter}.embedding.weight":
        return "prompt_embeddings"
    if name.endswith(f"lora_magnitude_vector.{adapter}.weight"):
        name = name.removesuffix(".weight")
    name = name.replace(f".modules_to_save.{adapter}.", ".")
    return name.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
