"""What stands where accelerate has a name that is refused here.

It can be imported, for many scripts import at their top what they use under a branch that is never taken. Whoever calls it,
makes one, inherits from it or reads an attribute of it gets one ConfigError that says why, and what to do. `isinstance(x,
it)` is False.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import ConfigError


class RefusedError(ConfigError, AttributeError):
    """A name of accelerate that is refused was used. Also an AttributeError: `hasattr` of it is False."""


class Refused(type):
    """The class of the names that are refused; each is a class that cannot be made."""

    reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedError(cls.reason)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RefusedError(f"{cls.reason} (asked for its {name})")

    def __iter__(cls) -> NoReturn:
        raise RefusedError(cls.reason)

    def __instancecheck__(cls, item: Any) -> bool:
        return False


def _refuse_to_inherit(cls: Any, /, **_: Any) -> NoReturn:
    raise RefusedError(cls.__mro__[1].reason)


def refused(name: str, reason: str) -> Refused:
    """What stands for `name`, whose use says `reason`."""
    body = {
        "reason": f"shardwise does not have accelerate's {name}: {reason}",
        "__doc__": f"Refused: {reason}",
        "__init_subclass__": classmethod(_refuse_to_inherit),
    }
    made = Refused.__new__(Refused, name, (), body)
    return made
