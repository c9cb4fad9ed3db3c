"""Every error that shardwise raises on purpose.

    ShardwiseError
    ├── ConfigError (ValueError)      a setting, a YAML key, a flag or a keyword is wrong
    ├── LaunchError                   processes cannot be started as asked
    ├── PlanError (ValueError)        a combination of placements that ZeRO does not have
    ├── LayoutError (ValueError)      sizes or dtypes that do not fit the flat buffers
    ├── PrepareError (ValueError)     an object that `prepare` cannot take as it is
    ├── OptimizerError (ValueError)   an optimizer that cannot work on flat shards
    ├── ReleasedParameterError        a weight is read while its unit is not gathered
    ├── WriteError                    a weight is written in a way that cannot count
    ├── UnitStateError                an illegal move of a unit's state: a fault of shardwise
    ├── ScheduleError                 ranks or passes use units in a way that cannot be kept in step
    ├── StoreError (OSError)          a shard cannot be read from, or written to, where it rests
    ├── NonFiniteError                the loss or the gradients are NaN or infinite
    ├── LossError (ValueError)        logits and labels that have no cross entropy
    ├── LoadingError (ValueError)     a file of weights that is damaged, or not what its index says
    ├── DataError (ValueError)        a data loader that cannot be sharded
    ├── CheckpointError               a checkpoint that cannot be written, found or read
    └── RankError                     another rank failed; says which one and why

Each text says what happened, to what, and what to do. Those that are a wrong value are also a `ValueError`, so that
code written for other libraries catches them.
"""

from __future__ import annotations


class ShardwiseError(Exception):
    """The root: `except ShardwiseError` catches whatever shardwise raises on purpose."""


class ConfigError(ShardwiseError, ValueError):
    """A setting is wrong: an unknown key, a wrong type, a value outside its range, an impossible combination."""


class LaunchError(ShardwiseError):
    """The processes cannot be started as asked: no such script, too few devices, a port in use."""


class PlanError(ShardwiseError, ValueError):
    """A combination of placements that ZeRO does not have, such as sharded parameters with whole gradients."""


class LayoutError(ShardwiseError, ValueError):
    """Sizes or dtypes that do not fit the flat buffers."""


class PrepareError(ShardwiseError, ValueError):
    """An object given to `prepare` cannot be taken as it is."""


class OptimizerError(ShardwiseError, ValueError):
    """An optimizer that cannot work on flat shards, or that holds parameters which are not the model's."""


class ReleasedParameterError(ShardwiseError, RuntimeError):
    """A weight was read while its unit is not gathered: at this moment the rank holds only its shard."""


class WriteError(ShardwiseError, RuntimeError):
    """A prepared weight was written, or was to be, in a way that cannot count: it would be undone, or differ between ranks."""


class UnitStateError(ShardwiseError, RuntimeError):
    """A unit was moved to a state that its present one does not lead to."""


class ScheduleError(ShardwiseError, RuntimeError):
    """Units are used in a way that the ranks cannot follow together."""


class StoreError(ShardwiseError, OSError):
    """A shard cannot be read from, or written to, the tier where it rests: no space, a failing disk, memory not pinned."""


class NonFiniteError(ShardwiseError, ArithmeticError):
    """The loss or the gradients are NaN or infinite."""


class LossError(ShardwiseError, ValueError):
    """Logits, hidden states or labels that have no cross entropy: their shapes, dtypes or values do not fit."""


class LoadingError(ShardwiseError, ValueError):
    """A file of weights is damaged, or lacks what its index or the model says that it has."""


class DataError(ShardwiseError, ValueError):
    """A data loader that cannot be sharded over the ranks."""


class CheckpointError(ShardwiseError, RuntimeError):
    """A checkpoint, or a file of weights, that cannot be written, found, trusted or fitted to this run."""


class RankError(ShardwiseError, RuntimeError):
    """Another rank failed. The text names it and repeats its error."""
