"""What an Accelerator's run says of its steps: noted on every rank, brought together where a line is due, written on rank 0.

All that is noted stays on the device until then. The ranks meet once in a logged step, at its end, where all are anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ranks.activity import activity
from ..ranks.ranks import Ranks
from ..ranks.unfinished import AtEnd
from .late import Late
from .lines import Lines, Noted

_IDS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Wishes:
    """What a script has said of its watch; the names are the arguments of `Accelerator.watch`."""

    epochs: float | None = None
    steps: int | None = None
    log_every: int = 1
    flops_per_token: float | None = None
    peak_flops: float | None = None
    bar: bool = True

    def check(self) -> None:
        """Raises ConfigError for a wrong value."""
        for name in ("epochs", "steps", "log_every", "flops_per_token", "peak_flops"):
            value = getattr(self, name)
            whole = name in ("steps", "log_every")
            if value is None and name != "log_every":
                continue
            good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not good or not value > 0 or value == float("inf"):
                kind = "a whole number, 1 or more" if whole else "a number above 0"
                raise ConfigError(f"watch: {name} is {value!r}; it must be {kind}.")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError("watch: epochs and steps both say how long the run is; give one of them.")

    def refuse_change(self, new: Wishes) -> None:
        """Raises ConfigError if a later call says otherwise: a run has one record."""
        for field in fields(self):
            first, later = getattr(self, field.name), getattr(new, field.name)
            if first != later:
                raise ConfigError(
                    f"watch: {field.name} was {first!r} in the first call, and is {later!r} now: a run has one record. Say the "
                    "same each time; a loop that only evaluates needs no watch."
                )


def ids_in(batch: Any) -> Tensor | None:
    """The token ids of a batch: its "input_ids", or else its first tensor of whole numbers with two dimensions or more."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        found: Tensor = batch["input_ids"]
        return found
    return next((v for v in _tensors(batch) if v.dtype in _IDS and v.dim() > 1), None)


def rows_of(batch: Any) -> int:
    """Samples of a batch: the first dimension of its first tensor that has one."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.dim()), 0)


def _tensors(batch: Any) -> Iterator[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else (batch,)
    yield from (value for value in values if isinstance(value, Tensor))


class Watch:
    """Listens to a run and says when a line is due. One lives at a time: the one that was made last is told.

    ranks:     of the run.
    wishes:    of the script.
    steps:     gives the optimizer steps done.
    rate:      gives the learning rate, a number or a tensor.
    norm:      gives the gradient norm of the last step, or None.
    lines:     on rank 0; None on the others, which only add theirs.
    """

    def __init__(
        self,
        ranks: Ranks,
        wishes: Wishes,
        steps: Callable[[], int],
        rate: Callable[[], float | Tensor | None],
        norm: Callable[[], Tensor | None],
        lines: Callable[[], Lines] | None,
    ) -> None:
        self.wishes = wishes
        self.closed = False
        self._ranks, self._steps, self._rate, self._norm = ranks, steps, rate, norm
        self._make_lines = lines
        self._lines: Lines | None = None
        self._at_end = AtEnd("The last line of the run's record", functools.partial(self.close, wait=False))
        self._step = self._logged = steps()
        self._begin_line()

    def _begin_line(self) -> None:
        self._loss: Tensor | None = None
        self._losses = self._tokens = self._samples = 0
        self._clipped: Tensor | None = None

    # What a loop tells.

    def asks(self) -> None:
        """The watched loader is asked for a batch. The first time, the clock begins."""
        if self._make_lines is not None and not self.closed:
            self._lines, self._make_lines = self._make_lines(), None
        if not self.closed:
            activity.listener = self
        if self._lines is not None:
            self._lines.asks()

    def given(self, batch: Any) -> None:
        """It has given this one."""
        ids = ids_in(batch)
        if ids is not None:
            self._tokens += ids.numel()
        self._samples += rows_of(batch) if ids is None else len(ids)
        if self._lines is not None:
            self._lines.given()

    def note_loss(self, loss: Tensor) -> None:
        """The loss of a micro-batch, a scalar. Nothing waits for it."""
        value = loss.detach().float()
        self._loss = value if self._loss is None else self._loss + value
        self._losses += 1

    def note_norm(self, norm: Tensor) -> None:
        """The norm of the gradients, which the script has clipped."""
        self._clipped = norm.detach()

    def ends_pass(self) -> None:
        """No step comes that the ones so far could share a line with: steps that no line has yet get one. Collective.

        The loader has no more batches, on any rank, or the run ends.
        """
        if self._step != self._logged and not self.closed:
            self._log()

    def rests(self) -> None:
        """The loop is left, at its end or before."""
        if self._lines is not None:
            self._lines.rest()

    # What the engine tells; see ranks/listener.py.

    def begins(self, doing: int) -> None:
        if self._lines is not None:
            self._lines.begins(doing)

    def calls(self, verb: str) -> None:
        if self._lines is not None:
            self._lines.calls(verb)

    def returns(self) -> None:
        if self._lines is not None:
            self._lines.returns()

    def stepped(self) -> None:
        step = self._steps()
        if step == self._step:  # it was another optimizer's
            return
        self._step = step
        if step % self.wishes.log_every == 0:
            self._log()
        if self._lines is not None:
            self._lines.stepped()

    # Lines.

    @torch.no_grad()
    def _log(self) -> None:
        """Bring together what the ranks have noted, for a line. One all_reduce."""
        facts = self._facts(self._ranks.device)
        if self._lines is not None:
            norm = self._clipped if self._clipped is not None else self._norm()
            self._give(self._lines, facts, self._rate(), norm)
        self._logged = self._step
        self._begin_line()

    def _facts(self, device: torch.device) -> Tensor | list[float]:
        """Four numbers, of all ranks: the sum of their mean losses, how many have one, tokens, samples."""
        facts: Tensor
        if device.type == "cpu":
            mean = 0.0 if self._loss is None else float(self._loss) / self._losses
            numbers = [mean, float(self._loss is not None), float(self._tokens), float(self._samples)]
            if self._ranks.world_size == 1:
                return numbers
            facts = torch.tensor(numbers, dtype=torch.float64)
        else:
            facts = torch.zeros(4, dtype=torch.float64, device=device)
            if self._loss is not None:
                facts[0] = self._loss.to(device) / self._losses
                facts[1].fill_(1)
            facts[2].fill_(self._tokens)  # to assign it would copy it from the host, which waits for the device
            facts[3].fill_(self._samples)
        if self._ranks.world_size > 1:
            self._ranks.all_reduce(facts)
        return facts

    def _give(
        self, lines: Lines, facts: Tensor | list[float], rate: float | Tensor | None, norm: Tensor | None
    ) -> None:
        on_device: list[Tensor] = []
        known: dict[str, float | None] = {"rate": None, "norm": None}
        places: dict[str, int] = {}
        for name, value in (("rate", rate), ("norm", norm)):
            if isinstance(value, Tensor) and value.device.type != "cpu":
                places[name] = 4 + len(places)
                on_device.append(value.detach().double().reshape(1))
            elif value is not None:
                known[name] = float(value)
        late = Late(torch.cat([facts, *on_device]) if on_device and isinstance(facts, Tensor) else facts)

        def noted() -> Noted:
            numbers = late.read()
            loss, ranks, tokens, samples = numbers[:4]
            found = known | {name: numbers[place] for name, place in places.items()}
            return Noted(
                loss=loss / ranks if ranks else None,
                learning_rate=found["rate"],
                gradient_norm=found["norm"],
                tokens=round(tokens) or None,
                samples=round(samples) or None,
            )

        lines.due(self._step, noted, late.has_come)

    def close(self, *, wait: bool = True) -> None:
        """Write what is left, and listen no more; more than once does no harm. No other rank is waited for.

        wait: for the device, too.
        """
        if activity.listener is self:
            activity.listener = None
        self._at_end.cancel()
        self.closed = True
        self._make_lines = None
        if self._lines is not None:
            self._lines.close(self._step, wait=wait)


class Watched:
    """The batches of a loader, each as the loader gives it, while its run is watched. `len` is the loader's."""

    def __init__(self, watch: Watch, loader: Any) -> None:
        self._watch, self._loader = watch, loader

    def __len__(self) -> int:
        assert isinstance(self._loader, Sized)
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        watch, batches = self._watch, None
        watch.asks()
        try:
            batches = iter(self._loader)
            for batch in batches:
                watch.given(batch)
                yield batch
                watch.asks()
            watch.ends_pass()
        finally:
            close = getattr(batches, "close", None)
            if close is not None:  # the loader shall know that it is left, as it would without a watch
                close()
            watch.rests()
