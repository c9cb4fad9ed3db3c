"""`shardwise merge` and `shardwise export`: weights from one directory to another, without processes and without GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


def run_merge(base: str, adapter: str, output: str, *, dtype: str | None, max_shard_size: str) -> None:
    """Raises CheckpointError or ConfigError."""
    _check_dtype(dtype)
    import torch

    from ..checkpoint.merge import merge

    written = merge(
        base,
        adapter,
        output,
        dtype=None if dtype is None else getattr(torch, dtype),
        max_shard_size=max_shard_size,
        say=lambda text: print(f"shardwise merge: {text}", file=sys.stderr),
    )
    _report(written)


def run_export(checkpoint: str, output: str, *, model: int, dtype: str | None, max_shard_size: str) -> None:
    """Raises CheckpointError or ConfigError."""
    _check_dtype(dtype)
    import torch

    from ..checkpoint.from_checkpoint import export

    kind = None if dtype is None else getattr(torch, dtype)
    _report(export(checkpoint, output, model=model, dtype=kind, max_shard_size=max_shard_size))


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")


def _report(written: list[Path]) -> None:
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
