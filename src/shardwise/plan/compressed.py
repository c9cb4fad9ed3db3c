"""What the 16-bit weights of a shard are packed into on their way to other machines, in bytes. Pure arithmetic.

A shard is cut into blocks of 256 weights, the last one shorter; each has a scale in fp32 and a code of 8 bits for each weight.
Of a shard of 320 weights:

    byte    0        4        8                 264           328         336
            scale 0  scale 1  codes of block 0  of block 1    nothing

See `docs/design/compressed_gathers.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

BLOCK = 256  # weights that share a scale
CHUNK = 1 << 22  # weights that are quantised at one time, in fp32
_SCALE_NBYTES = 4
_ALIGNMENT = 16  # of a rank's part: what all-gathers move at one time


@dataclass(frozen=True)
class Packing:
    """How a buffer travels whose members are all of one 16-bit dtype. numel: of one shard. shards: the ranks that divide it."""

    numel: int
    shards: int

    @property
    def blocks(self) -> int:
        return math.ceil(self.numel / BLOCK)

    @property
    def codes_at(self) -> int:
        """The byte of a rank's part at which its codes begin, behind the scales."""
        return self.blocks * _SCALE_NBYTES

    @property
    def part_nbytes(self) -> int:
        """What a rank sends of its shard."""
        return math.ceil((self.codes_at + self.numel) / _ALIGNMENT) * _ALIGNMENT

    @property
    def nbytes(self) -> int:
        """What a rank has of all of them."""
        return self.part_nbytes * self.shards

    @property
    def staging_nbytes(self) -> int:
        """What quantising takes for its duration: a chunk in fp32, and a few numbers for each of its blocks."""
        numel = min(self.numel, CHUNK)
        return 4 * numel + 32 * (math.ceil(numel / BLOCK) + self.shards)
