"""deepspeed.ops: which of its compiled operations there are, by the names that programs ask. None is compiled here.

`__compatible_ops__[AsyncIOBuilder.NAME]` is how a program asks whether it may offload to a drive.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn


class OpBuilder:
    """An operation that shardwise does with torch's own. NAME: its key in COMPATIBLE_OPS."""

    NAME: ClassVar[str]

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def load(self, verbose: bool = True) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}.load: there is no compiled {self.NAME} to be loaded: shardwise stands for DeepSpeed here, "
            "and works with torch's own operations."
        )


class AsyncIOBuilder(OpBuilder):
    NAME = "async_io"


class CPUAdamBuilder(OpBuilder):
    NAME = "cpu_adam"


class CPUAdagradBuilder(OpBuilder):
    NAME = "cpu_adagrad"


class CPULionBuilder(OpBuilder):
    NAME = "cpu_lion"


class FusedAdamBuilder(OpBuilder):
    NAME = "fused_adam"


class FusedLionBuilder(OpBuilder):
    NAME = "fused_lion"


class _Compatible(dict[str, bool]):
    """False for an operation that is not there."""

    def __missing__(self, name: Any) -> bool:
        return False


BUILDERS = (AsyncIOBuilder, CPUAdamBuilder, CPUAdagradBuilder, CPULionBuilder, FusedAdamBuilder, FusedLionBuilder)
COMPATIBLE_OPS = _Compatible({builder.NAME: True for builder in BUILDERS})
