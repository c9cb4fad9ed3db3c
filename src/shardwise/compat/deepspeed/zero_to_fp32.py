"""deepspeed.utils.zero_to_fp32: whole fp32 weights of a checkpoint, as a function and as a script, in one process.

zero_to_fp32.py CHECKPOINT_DIR OUTPUT [-t TAG] [--exclude_frozen_parameters] [--safe_serialization]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.read import Checkpoint, shared_by
from ...errors import CheckpointError, ShardwiseError
from ...weights.export import save_weights
from .checkpoints import LATEST, find


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False
) -> dict[str, Tensor]:
    """Every weight whole in fp32, and the buffers, by the model's names; tied weights are one tensor under both.

    lazy_mode: changes nothing: the tensors are read one at a time in any case.
    Raises CheckpointError.
    """
    path = find(checkpoint_dir, tag)
    if path is None:
        raise CheckpointError(
            f"{checkpoint_dir} has no file {LATEST}. Pass the tag, the name of the checkpoint's directory."
        )
    checkpoint = Checkpoint(path)
    record = checkpoint.manifest.frozen
    if record["kept"] not in ("inside", "outside"):
        checkpoint.add(shared_by(checkpoint), "model0/frozen/")
    kinds = ("trained", "buffer") if exclude_frozen_parameters else ("trained", "frozen", "buffer")
    found: dict[str, Tensor] = {}
    for kind in kinds:
        for address in checkpoint.addresses(f"model0/{kind}/"):
            value = checkpoint.read_whole(address)
            found[address.split("/", 2)[2]] = value.float() if value.is_floating_point() else value
    absent = [name for name in record["models"].get("model0", {}).get("sums", {}) if name not in found]
    if absent and not exclude_frozen_parameters:
        raise CheckpointError(
            f"{path} does not hold the frozen weights ({absent[0]}, ...): it was saved without them. Pass "
            "exclude_frozen_parameters=True for the trained ones."
        )
    aliases = checkpoint.manifest.facts.get("model0", {}).get("aliases", {})
    return found | {name: found[first] for name, first in aliases.items() if first in found}


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """`model`, which is in no engine, with the weights of a checkpoint; on the CPU."""
    model = model.cpu()
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the weights below `output_dir`: pytorch_model.bin, or model.safetensors in parts of `max_shard_size`."""
    state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    target = Path(output_dir)
    if safe_serialization:
        save_weights(state, target, max_shard_size=max_shard_size)
        return
    if target.suffix != ".bin":
        target = target / "pytorch_model.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole fp32 weights of a checkpoint of shardwise.")
    parser.add_argument("checkpoint_dir", help="the directory with the file `latest`")
    parser.add_argument("output_dir", help="where pytorch_model.bin is written, or the path of a .bin file")
    parser.add_argument("-t", "--tag", default=None, help="which checkpoint; default: the latest")
    parser.add_argument("--max_shard_size", default="5GB", help="of safetensors files")
    parser.add_argument("--safe_serialization", action="store_true", help="safetensors in place of torch's format")
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    parser.add_argument("-d", "--debug", action="store_true", help="has no effect")
    given = parser.parse_args()
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            given.checkpoint_dir,
            given.output_dir,
            given.max_shard_size,
            given.safe_serialization,
            given.tag,
            given.exclude_frozen_parameters,
        )
    except ShardwiseError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
