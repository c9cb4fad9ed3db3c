"""Where a prepared loader is in its epochs, and what it takes up after a resume: data, and nothing that reads."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .workers import Note


@dataclass
class Course:
    """Where a loader is in its epochs; a loader and the ones made from it by `skip_first_batches` share one.

    seed:     the order's seed, or None where a generator of the user's makes the order.
    next:     the epoch that the next iteration will be.
    begun:    the epoch of an iteration that has begun and not ended, else None.
    given:    batches given out in the epoch `begun`, skipped ones included.
    resume:   batches to skip at the next iteration, from `load_state_dict`.
    generator_state: the user's generator as it was when the epoch `begun` started.
    staffed:  whether workers that outlive an epoch (persistent_workers) were there before the epoch `begun`, and made: by now.
              torch draws a seed when it makes workers, and the order of an epoch comes after that.
    note:     what such workers share with this process.
    trained:  whether a backward came while the loader was being read.
    restored_workers: where their copies of the data set's own generator take up the next epoch.
    """

    seed: int | None
    next: int = 0
    begun: int | None = None
    given: int = 0
    resume: int = 0
    generator_state: torch.Tensor | None = None
    restored_generator: torch.Tensor | None = field(default=None, repr=False)
    staffed: bool = False
    made: bool = False
    trained: bool = False
    note: Note | None = field(default=None, repr=False)
    restored_workers: torch.Tensor | None = field(default=None, repr=False)

    @property
    def epoch(self) -> int:
        """The epoch under way, or else the next one."""
        return self.next if self.begun is None else self.begun
