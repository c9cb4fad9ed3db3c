"""`shardwise merge`, `export` and `import`: from one directory to another, without processes and without GPUs."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import ConfigError
from ..files.documents import read_text

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


def run_import(source: str, output: str, *, names: str | None) -> None:
    """Raises CheckpointError or ConfigError."""
    from ..foreign.importing import import_checkpoint

    given = None
    if names is not None:
        given = [line.strip() for line in read_text(names, ConfigError).splitlines() if line.strip()]
    found = import_checkpoint(source, output, names=given)
    for note in found.notes:
        print(f"shardwise import: {note}", file=sys.stderr)
    print(f"{found.path}  step {found.step}, {found.world_size} rank(s), from {found.source}")


def _check_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")


def _report(written: list[Path]) -> None:
    for path in written:
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
