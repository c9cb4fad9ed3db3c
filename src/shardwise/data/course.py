"""Where a prepared loader is in its epochs, and what it takes up after a resume: data, and nothing that reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .order import fresh_generator
from .workers import Note

# Samplers of which it is known what an order takes out of their generator, and that making one changes nothing else.
_KNOWN = {sampler.__iter__ for sampler in (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)}


@dataclass
class Course:
    """Where a loader is in its epochs; a loader and the ones made from it by `skip_first_batches` share one.

    seed:     the order's seed, or None where a generator of the user's makes the order.
    runs_on:  whether one generator makes the orders of all epochs, one after another; else epoch e has one from seed + e.
    next:     the epoch that the next iteration will be.
    begun:    the epoch of an iteration that has begun and not ended, else None.
    given:    batches given out in the epoch `begun`, skipped ones included.
    resume:   batches to skip at the next iteration, from `load_state_dict`.
    generator_state: the user's generator as it was when the epoch `begun` started.
    staffed:  whether workers that outlive an epoch (persistent_workers) were there before the epoch `begun`, and made: by now.
              torch draws a seed when it makes workers, and the order of an epoch comes after that.
    note:     what such workers share with this process.
    trained:  whether a backward came while the loader was being read.
    number:   of this loader among those that the process has prepared: ranks that prepare alike call it by the same one.
    restored_workers: where their copies of the data set's own generator take up the next epoch.
    """

    seed: int | None
    runs_on: bool = False
    next: int = 0
    begun: int | None = None
    given: int = 0
    resume: int = 0
    generator_state: torch.Tensor | None = None
    restored_generator: torch.Tensor | None = field(default=None, repr=False)
    staffed: bool = False
    made: bool = False
    trained: bool = False
    number: int = field(default_factory=itertools.count(1).__next__, repr=False, compare=False)
    note: Note | None = field(default=None, repr=False)
    restored_workers: torch.Tensor | None = field(default=None, repr=False)
    # (seed, epoch, what the generators of the samplers are where the order of that epoch begins)
    _begins: tuple[int, int, list[torch.Tensor]] | None = field(default=None, repr=False)

    @property
    def epoch(self) -> int:
        """The epoch under way, or else the next one."""
        return self.next if self.begun is None else self.begun

    def go_to(self, epoch: int) -> None:
        """Make `epoch` the next one, from its start; a position that waits in another epoch is forgotten."""
        if epoch != self.next:
            self.resume = 0
        self.next, self.begun, self.given = epoch, None, 0

    def begin_order(self, samplers: Sequence[Any], epoch: int) -> None:
        """Give each sampler the generator that makes the order of `epoch`.

        One that runs on is moved past the whole orders of the epochs before, whatever of them was read: so the order of an
        epoch follows from the seed and the epoch alone, also after a `break`, `set_epoch` and a resume.
        """
        if self.seed is None:
            return
        if not self.runs_on:
            for sampler in samplers:
                sampler.generator = fresh_generator(self.seed + epoch)
            return
        if self._begins is None or self._begins[0] != self.seed or self._begins[1] > epoch:
            self._begins = self.seed, 0, [fresh_generator(self.seed).get_state() for _ in samplers]
        _, at, states = self._begins
        for index, sampler in enumerate(samplers):
            sampler.generator = torch.Generator()
            sampler.generator.set_state(states[index])
            for _ in range(at, epoch):
                _pass_over(sampler)
        # An iterator that is under way keeps the generator that it began with.
        self._begins = self.seed, epoch, [sampler.generator.get_state() for sampler in samplers]


def can_run_on(samplers: Sequence[Any]) -> bool:
    """Whether `Course.begin_order` can move their generators past an order without a trace elsewhere."""
    return bool(samplers) and all(type(sampler).__iter__ in _KNOWN for sampler in samplers)


def _pass_over(sampler: Any) -> None:
    """Take one order out of the sampler's generator."""
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        samples = len(sampler.data_source)
        for _ in range(sampler.num_samples // samples + 1):  # torch draws one more for the rest, also of none
            torch.randperm(samples, generator=sampler.generator)
    else:
        for _ in sampler:
            pass
