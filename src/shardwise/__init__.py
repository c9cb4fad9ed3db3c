"""shardwise trains models that do not fit: ZeRO-1/2/3 and offload on torch.distributed."""

from .version import __version__

__all__ = ["__version__"]
