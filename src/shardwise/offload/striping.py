"""On which of several drives the bytes of a slab lie: whole blocks in turn, so that one slab keeps all of them at work.

    slab of 5 blocks, two drives, the first block on drive 0        the next slab begins on drive 1

        slab     | 0 | 1 | 2 | 3 | 4 |                                  slab     | 0 | 1 | 2 |
        drive 0  | 0 | 2 | 4 |                                          drive 0  | 1 |
        drive 1  | 1 | 3 |                                              drive 1  | 0 | 2 |

A slab has a file on each drive where it has bytes. What is read or written is cut where blocks end, so a stretch lies in one
file, and with what alignment adds in front of it fits a block of memory. Arithmetic only.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = 8 << 20  # bytes; smaller ones do not saturate a drive


@dataclass(frozen=True)
class Stretch:
    """Bytes [first, last) of a slab, all of one block: on drive number `drive`, in its file from byte `offset` on."""

    first: int
    last: int
    drive: int
    offset: int


def stretches(begin: int, end: int, drives: int, start: int) -> list[Stretch]:
    """Bytes [begin, end) of a slab whose first block is on drive `start` of `drives`."""
    found = []
    while begin < end:
        number, inside = divmod(begin, BLOCK)
        last = min(end, (number + 1) * BLOCK)
        found.append(Stretch(begin, last, (number + start) % drives, number // drives * BLOCK + inside))
        begin = last
    return found


def file_sizes(nbytes: int, drives: int, start: int) -> list[int]:
    """Bytes of a slab of `nbytes` on each drive."""
    sizes = [0] * drives
    for part in stretches(0, nbytes, drives, start):
        sizes[part.drive] = part.offset + part.last - part.first
    return sizes
