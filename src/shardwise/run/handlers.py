"""The base of the small argument objects of an Accelerator."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import fields
from typing import Any


class KwargsHandler:
    """What `Accelerator(kwargs_handlers=[...])` takes."""

    def to_dict(self, ignore_keys: Collection[str] = ()) -> dict[str, Any]:
        """All fields but those of `ignore_keys`, as copies."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name not in ignore_keys}

    def to_kwargs(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        plain = type(self)()
        own = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in own.items() if value != getattr(plain, name)}
