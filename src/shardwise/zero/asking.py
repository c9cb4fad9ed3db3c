"""`gathered` inside a running forward or backward of its model: the units are asked for as by a module that reads them.

    forward     need(head)  x @ head.T  done(head)      the other ranks come to the same place of their own passes
    backward    need(head)  g @ head    done(head)      where the script enters again, as an autograd function of its own does

What autograd keeps of these weights is followed for good (`saved.py`): no output of a module announces their backward. Holding
units, as between passes, would end the pass.
Nothing can be written: the pass computes with these weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..errors import WriteError
from .hooks import Hooks, in_backward
from .unit import Unit, Weights


@contextmanager
def asking(hooks: Hooks, units: Sequence[Unit], *, modify: bool) -> Iterator[None]:
    """Inside, `units` are gathered. Raises WriteError for modify, and for a weight that was written."""
    if modify:
        raise WriteError(
            "gathered(modify=True) was entered inside a forward or a backward of its model, which computes with these weights. "
            "Write between the passes."
        )
    mine = []
    for unit in units if not hooks.schedule.holds else ():
        here = unit.state is Weights.GATHERED
        if in_backward():
            hooks.recall(unit)
        else:
            hooks.schedule.need(unit)
        if not here:  # else whoever asked before says when it is done
            mine.append(unit)
    try:
        yield
    finally:
        if not in_backward():
            hooks.note_read()
        names = [name for unit in units for name in unit.written()]
        for unit in mine:
            if not hooks.uses(unit):
                hooks.schedule.done(unit)
    if names:
        raise WriteError(
            f"{', '.join(names[:3])} was written inside a forward or a backward of its model: the write is lost. Write between "
            "the passes."
        )
