"""Names that come from files: of adapters, for one. They are names, never ways out of a directory."""

from __future__ import annotations

from pathlib import Path, PurePath

from ..errors import CheckpointError


def below(folder: Path, name: str, what: str) -> Path:
    """The directory of the thing called `name` below `folder`. Raises CheckpointError for a name that leads elsewhere.

    what: what is called so, for the error.
    """
    parts = PurePath(name).parts
    if not parts or PurePath(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"{what} {name!r} would be written outside of {folder}. Give it a name that is no path.")
    return folder.joinpath(*parts)
