"""Where a save may write, and what it may remove: nothing outside of its target, and nothing that it did not make.

    state                     the target; if it is a link, what it leads to
    .staging-state            beside it: the coming checkpoint. With MARK in it until it is complete
    .replaced-state           beside it: the earlier one, while the new one takes its name
    .staging-removed-state    beside it: on its way out

A directory is replaced only if it is empty or a checkpoint of shardwise. Whatever else has one of these names is somebody's,
and an error says so.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from pathlib import Path

from ..errors import CheckpointError
from ..files import disk
from ..files.documents import printed, read_json
from ..ranks.agreeing import attempt
from .manifest import FORMAT, MANIFEST
from .read import read_manifest

STAGING = ".staging-"
REPLACED = ".replaced-"
REMOVED = f"{STAGING}removed-"
MARK = ".shardwise-save"
_OF_A_RANK = re.compile(r"rank-[0-9]{5,}\.(json|safetensors)")


def followed(path: Path) -> Path:
    """The directory that `path` stands for: itself, or where it leads to as a link. Raises CheckpointError."""
    real = _real(path) if path.is_symlink() else path
    if not real.name:
        raise CheckpointError(f"{printed(path)} is the root of the file system, which is no checkpoint.")
    return real


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        # The target may be made, but not the disk that it lies on.
        target = Path(os.path.realpath(path))
        if target.parent.is_dir():
            return target
        raise CheckpointError(
            f"{printed(path)} is a link to {printed(target)}, and {printed(target.parent)} is not there. Is its disk mounted?"
        ) from None
    except OSError as error:
        what = "leads back to itself" if error.errno == errno.ELOOP else f"cannot be followed: {error.strerror}"
        raise CheckpointError(f"{printed(path)} is a link that {what}.") from None


def holds_checkpoint(path: Path) -> bool:
    """Whether the directory is a checkpoint of shardwise, complete or damaged: its manifest says so."""
    content, _ = attempt(lambda: read_json(path / MANIFEST, CheckpointError, infinities=True))
    return isinstance(content, dict) and content.get("format") == FORMAT


def refuse_foreign(target: Path) -> None:
    """CheckpointError if saving to `target` would replace something that is not a checkpoint."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{printed(target)} is a file, not a directory.")
    if os.path.ismount(target):
        raise CheckpointError(
            f"{printed(target)} is a mount point, which a save cannot replace. Save to a directory in it, such as "
            f"{printed(target / 'state')}."
        )
    if any(target.iterdir()) and not holds_checkpoint(target):
        raise CheckpointError(
            f"{printed(target)} holds files that are not a checkpoint; saving there would remove them. Save to a directory of "
            f"its own, such as {printed(target / 'state')}."
        )


def refuse_taken(target: Path) -> None:
    """CheckpointError if anything has the name `target`, but for an empty directory."""
    if not os.path.lexists(target) or (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        return
    raise CheckpointError(f"{printed(target)} is there already, and is left as it is. Give a directory that is new.")


def make_staging(staging: Path) -> None:
    """Make the directory `staging`, empty but for MARK, in place of what a save that was cut short has left."""
    disk.make_directory(staging.parent)
    if os.path.lexists(staging):
        if not _is_left_over(staging):
            raise CheckpointError(
                f"{printed(staging)} is needed for the save, but holds files that no save has left. Move it away."
            )
        disk.remove(staging)
    disk.make_directory(staging)
    # A directory of this name on another machine's own disk has another mark.
    disk.write_text(staging / MARK, uuid.uuid4().hex)


def _is_left_over(staging: Path) -> bool:
    if staging.is_symlink() or not staging.is_dir():
        return False
    names = [path.name for path in staging.iterdir()]
    # Those of earlier versions have no mark.
    return not names or MARK in names or any(_OF_A_RANK.fullmatch(name) for name in names) or holds_checkpoint(staging)


def put_in_place(staging: Path, target: Path) -> None:
    """Give the complete checkpoint `staging` its name; an earlier one keeps another until `left_behind` is discarded.

    At every moment one of them is complete under a name that is looked for.
    """
    refuse_foreign(target)
    aside = _set_aside(target) if target.is_dir() and any(target.iterdir()) else None
    try:
        disk.move(staging, target)
    except OSError:
        if aside is not None:
            attempt(lambda: disk.move(aside, target))  # the first error is the one to tell
        raise
    disk.sync_directory(target.parent)


def _set_aside(target: Path) -> Path:
    aside = target.with_name(REPLACED + target.name)
    if os.path.lexists(aside):  # both are there after a kill
        refuse_foreign(aside)
        if attempt(lambda: read_manifest(target))[1] is None:
            discard(aside)
        else:
            aside = target.with_name(REMOVED + target.name)
            disk.remove(aside)
    disk.move(target, aside)
    return aside


def left_behind(target: Path) -> list[Path]:
    """What earlier checkpoints at `target` have left beside it: to be discarded once the new one is in its place."""
    replaced, removed = target.with_name(REPLACED + target.name), target.with_name(REMOVED + target.name)
    mine = [path for path in (replaced, removed) if path.is_dir() and not path.is_symlink()]
    return [path for path in mine if path == removed or holds_checkpoint(path)]


def discard(path: Path) -> None:
    """Remove a checkpoint. Under a name that nobody takes for one first: a kill must not leave half of it under its own."""
    name = path.name.removeprefix(REPLACED)
    doomed = path if name.startswith(REMOVED) else path.with_name(REMOVED + name)
    if path != doomed:
        disk.remove(doomed)
        disk.move(path, doomed)
    disk.remove(doomed)
