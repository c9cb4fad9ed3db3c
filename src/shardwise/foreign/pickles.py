"""Files of `torch.save` that other libraries wrote, read without running anything that they name.

torch's unpickler for weights alone reads them. What is neither a tensor nor plain Python becomes an `Inert`, if its name
is one of those that these libraries are known to put there: a loss scaler, an address, an enumeration, a numpy array. Any other
name is refused in a sentence that says it. Tensors are mapped from the file, so what is in memory is what is looked at.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import CheckpointError
from ..files.documents import opened, printed, shown
from ..ranks.agreeing import attempt

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
# What becomes inert, by its name in the file.
_KNOWN = (
    "argparse.Namespace",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    *(f"{module}.{name}" for module in _NUMPY for name in ("_reconstruct", "scalar")),
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
)


class Inert:
    """Stands for an object of another library: what it was called with, and its attributes. It does nothing.

    args: the arguments of the call that would have made it. state: what it would have been given afterwards, or None.
    """

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Inert:
        made = super().__new__(cls)  # an unpickler may call no more than this
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def attribute(self, name: str) -> Any:
        """The attribute of the object, None if it had none of this name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def read_pickle(path: Path) -> Any:
    """What `torch.save` put into the file, tensors on the CPU and mapped where its format allows.

    Raises CheckpointError for a file that is damaged, and for one that names what only running code would make, with its name.
    """
    where = printed(path)
    with opened(path, CheckpointError), safe_globals([(Inert, name) for name in _KNOWN]):
        found, error = attempt(lambda: torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        if error is not None and "mmap" in str(
            error
        ):  # the format of before torch 1.6 has nothing that could be mapped
            found, error = attempt(lambda: torch.load(path, map_location="cpu", weights_only=True))
        if error is None:
            return found
        named, _ = attempt(lambda: get_unsafe_globals_in_checkpoint(path))
    if named or "GLOBAL" in str(error):
        names = ", ".join(sorted(named)) if named else shown(str(error).split(" Please ")[0])
        raise CheckpointError(
            f"{where} is refused: reading it would execute {names}. shardwise reads tensors and plain Python values and runs "
            "nothing that a file names. Save it again without these objects."
        ) from error
    raise CheckpointError(
        f"{where} is damaged, or no file of torch.save: {type(error).__name__}: {shown(str(error))}."
    ) from error


def array_of_words(value: Any) -> bytes | None:
    """The bytes of a one-dimensional numpy array of 32-bit unsigned numbers, None if `value` is none."""
    state = value.state if isinstance(value, Inert) else None
    match state:
        case (_, (int() as count,), Inert() as dtype, False, bytes() as raw) if _is_words(dtype):
            return raw if len(raw) == 4 * count else None
    return None


def _is_words(dtype: Inert) -> bool:
    return bool(dtype.args) and dtype.args[0] in ("u4", "<u4")


class Fields:
    """A dictionary of such a file, asked for its entries by kind. Raises CheckpointError. where: file and place, for errors."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise CheckpointError(f"{where} is {shown(content)}, where a dictionary is expected.")
        self.content: dict[Any, Any] = content

    def get(self, key: Any, kind: type | tuple[type, ...], words: str) -> Any:
        """The entry `key`, which must be there and of `kind`; words: what that is called."""
        found = self.content.get(key, self)
        if found is self:
            raise CheckpointError(f"{self.where} has no {key}: it is incomplete, or not what its name says.")
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is int):
            raise CheckpointError(f"{self.where}: {key} is {shown(found)}, which is not {words}.")
        return found

    def below(self, key: Any) -> Fields:
        return Fields(self.get(key, dict, "a dictionary"), f"{self.where}: {printed(key)}")

    def count(self, key: Any) -> int:
        found: int = self.get(key, int, "a whole number")
        if found < 0:
            raise CheckpointError(f"{self.where}: {key} is {found}, which is below 0.")
        return found

    def rows(self, key: Any) -> list[Any]:
        found: list[Any] = self.get(key, list, "a list")
        return found

    def numbers(self, key: Any) -> list[int]:
        found = self.rows(key)
        if not all(type(number) is int and number >= 0 for number in found):
            raise CheckpointError(f"{self.where}: {key} is {shown(found)}, which is not a list of whole numbers.")
        return found


def named_tensors(found: dict[Any, Any], where: str) -> dict[str, Tensor]:
    """The tensors of `found`. Raises CheckpointError for what is no tensor with values."""
    return {checked_name(name, where): with_values(value, f"{where}: {printed(name)}") for name, value in found.items()}


def checked_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{where}: {shown(name)} is not the name of a weight.")
    return name


def number_of(value: Any, where: str) -> float:
    """A finite number, also from a tensor of one. Raises CheckpointError."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{where} is {shown(value)}, which is no number.")
    return float(value)


def with_values(value: Any, where: str) -> Tensor:
    """`value`, a dense tensor on the CPU. Raises CheckpointError for anything else."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{where} is {shown(type(value).__name__)}, where a tensor with values is expected.")
    return value.detach()
