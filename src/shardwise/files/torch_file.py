"""A file of `torch.save` read for its structure: large tensors without memory, beside them the bytes of the file they are.

Both formats keep what was pickled apart from the bytes of the tensors, so only the pickle is read here:

    zip       data.pkl | data/0 | data/1 ...        since torch 1.6; entries are not compressed
    legacy    pickle | keys | numel, bytes | numel, bytes ...

The pickle is read by torch's unpickler for weights alone, so a file cannot run code. What is in neither format (tar files,
the other byte order) and what that unpickler does not know is left to `torch.load`.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import Unpickler

from ..errors import LoadingError
from .documents import opened, shown
from .reader import FileStretch

# torch.serialization's, which has been the same in every release.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_PICKLE_LIMIT = 256 << 20  # bytes: of a million tensors


class OtherFormatError(Exception):
    """Nothing that is read here."""


class TorchFile:
    """A file of `torch.save` by its pickle.

    content:   what was saved. Tensors of floating storages of at least `least_numel` elements are on the meta device.
    storages:  those of them, each with where its bytes lie.
    Raises OtherFormatError for a file that torch.load may read and this does not, LoadingError for one that is cut off.
    """

    def __init__(self, path: str | os.PathLike[str], least_numel: int) -> None:
        self.path = os.fspath(path)
        self._least_numel = least_numel
        self._found: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}
        self._parts: list[tuple[torch.UntypedStorage, str, int]] = []  # legacy: cut from another, at a byte
        with opened(self.path, LoadingError) as (descriptor, size), open(descriptor, "rb", closefd=False) as file:
            self._size = size
            try:
                self.content, places = self._zip(file) if zipfile.is_zipfile(file) else self._legacy(file)
            except LoadingError:
                raise
            except Exception as error:  # of the unpickler, on whatever the bytes happen to be
                raise OtherFormatError(str(error)) from error
        self.storages: list[tuple[torch.UntypedStorage, FileStretch]] = []
        for key, (storage, _) in self._found.items():
            self._place(storage, FileStretch(self.path, places[key], storage.nbytes(), f"storage {key}"), size)
        for storage, key, begin in self._parts:
            self._place(storage, FileStretch(self.path, places[key] + begin, storage.nbytes(), f"storage {key}"), size)

    def _place(self, storage: torch.UntypedStorage, stretch: FileStretch, size: int) -> None:
        if stretch.offset + stretch.nbytes > size:
            raise LoadingError(
                f"{self.path} is cut off: {stretch.name} ends at byte {stretch.offset + stretch.nbytes}, the file has {size}. "
                "Download or copy it again."
            )
        if storage.device.type == "meta":
            self.storages.append((storage, stretch))
        elif stretch.nbytes:
            storage.copy_(stretch.read(0, stretch.nbytes).untyped_storage())

    def _zip(self, file: BinaryIO) -> tuple[Any, dict[str, int]]:
        # Below the archive's own name. A compressed record does not lie in the file as it is, and its size is anything.
        with zipfile.ZipFile(file) as archive:
            records = {record.filename.split("/", 1)[-1]: record for record in archive.infolist()}
        if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
            raise OtherFormatError("a compressed archive")
        if records["data.pkl"].file_size > _PICKLE_LIMIT:
            raise OtherFormatError("a pickle that holds more than the structure")
        reader: Any = torch._C.PyTorchFileReader(self.path)
        if not reader.has_record("data.pkl") or reader.has_record("constants.pkl"):
            raise OtherFormatError("a TorchScript archive")
        if reader.has_record("byteorder") and reader.get_record("byteorder").decode() != sys.byteorder:
            raise OtherFormatError("the other byte order")

        def resolve(storage_type: Any, key: str, location: str, numel: int) -> Any:
            return self._storage(storage_type, key, numel)

        content = _load(io.BytesIO(reader.get_record("data.pkl")), resolve)
        for key, (storage, _) in self._found.items():
            held = records[f"data/{key}"].file_size
            if held < storage.nbytes():
                raise LoadingError(
                    f"{self.path}: storage {key} has {held} bytes, but {storage.nbytes()} by its description. Download or copy "
                    "the file again."
                )
        return content, {key: reader.get_record_offset(f"data/{key}") for key in self._found}

    def _legacy(self, file: BinaryIO) -> tuple[Any, dict[str, int]]:
        file.seek(0)
        if _load(file) != _MAGIC_NUMBER or _load(file) != _PROTOCOL_VERSION:
            raise OtherFormatError("no file of torch.save")
        if not _load(file).get("little_endian", True) or sys.byteorder != "little":
            raise OtherFormatError("the other byte order")

        def resolve(storage_type: Any, key: str, location: str, numel: int, part: Any = None) -> Any:
            whole = self._storage(storage_type, key, numel)
            if part is None:
                return whole
            _, begin, length = part
            if not (_is_count(begin) and _is_count(length) and begin + length <= numel):
                raise LoadingError(
                    f"{self.path}: a view of storage {key} reaches beyond it. Download or copy the file again."
                )
            itemsize = whole.dtype.itemsize
            cut = _storage_of(length * itemsize, whole._untyped_storage.device.type)
            self._parts.append((cut, key, begin * itemsize))
            return _with_dtype(cut, whole.dtype)

        content = _load(file, resolve)
        places = {}
        for key in _load(file):
            places[key] = file.tell() + 8  # after the number of elements
            file.seek(places[key] + self._found[key][0].nbytes())
        return content, places

    def _storage(self, storage_type: Any, key: str, numel: int) -> Any:
        if key not in self._found:
            dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
            if not _is_count(numel) or numel * dtype.itemsize > self._size:
                raise LoadingError(
                    f"{self.path} is cut off: storage {key} is described with {shown(numel)} elements of {dtype}, the file has "
                    f"{self._size} bytes. Download or copy it again."
                )
            large = dtype.is_floating_point and numel >= self._least_numel
            self._found[key] = _storage_of(numel * dtype.itemsize, "meta" if large else "cpu"), dtype
        return _with_dtype(*self._found[key])


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _storage_of(nbytes: int, device: str) -> torch.UntypedStorage:
    return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]


def _with_dtype(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    """As torch's functions that rebuild tensors want a storage."""
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _load(file: Any, resolve: Callable[..., Any] | None = None) -> Any:
    """One pickle. resolve: (type, key, location, numel, ...) of a storage -> the storage."""
    unpickler: Any = Unpickler(file, encoding="utf-8")

    def persistent_load(saved: tuple[Any, ...]) -> Any:
        kind, *rest = saved
        if resolve is None or kind not in ("storage", b"storage"):
            raise OtherFormatError(f"a {kind}")
        return resolve(*rest)

    unpickler.persistent_load = persistent_load
    return unpickler.load()
