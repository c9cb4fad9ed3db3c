"""Who keeps the others waiting, and what is said of each rank: records in, text out. See docs/design/waits.md for the rules.

Nothing here reads a clock, a process or the store, so that each rule is tested by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ..config.agreement import ranks_said
from .activity import BARRIER, Doing, End, Record
from .board import Seen

# A watcher that has not written for so long does not get the interpreter, or its process does not run.
_NO_BEAT_S = 10.0
_NAMED = re.compile(r"ranks? [0-9, -]+ keeps? the others waiting: ")
_IN = {
    Doing.FORWARD: "forward of step {}",
    Doing.EVALUATION: "evaluation after step {}",
    Doing.BACKWARD: "backward of step {}",
    Doing.STEP: "optimizer step {}",
}


def named(text: str) -> str:
    """The line that names a rank, if `text` begins with one; else ""."""
    line = text.split("\n", 1)[0]
    return line if _NAMED.match(line) else ""


def led_by(line: str, text: str) -> str:
    """An error's text behind the line that names a rank; alone where none is named."""
    return f"{line}\n{text}" if line else text


@dataclass(frozen=True)
class Judgement:
    """culprits: the ranks that the others wait for; none if nobody is to be named. waiting: those that wait."""

    culprits: tuple[int, ...]
    waiting: tuple[int, ...]
    line: str
    screen: str


def judge(seen: Sequence[Seen], now: float, *, memory_kills: int = 0, here: int | None = None) -> Judgement:
    """seen: every rank, in order. now: on the records' clock. here: a rank that waits for certain, because it says so.

    memory_kills: how many processes the kernel has killed for memory since the run began.
    """
    waiting = [one for one in seen if _waits(one)]
    culprits, why = _culprits(seen, waiting, now)
    words = _Words(now, memory_kills)
    if culprits:
        line = _line(culprits, waiting, why, words)
    elif waiting:
        line = f"{_waiting_words(waiting, words)}; no rank is missing there: a machine, or the network, is slow."
    else:
        line = "no rank waits for another."
    rows = [f"  rank {one.rank}: {words.of(one)}{words.where(one)}" for one in _first(seen, culprits)]
    numbers = tuple(one.rank for one in culprits)
    return Judgement(numbers, tuple(one.rank for one in waiting), line, "\n".join([line, *rows]))


def _first(seen: Sequence[Seen], culprits: Sequence[Seen]) -> list[Seen]:
    return [*culprits, *(one for one in seen if one not in culprits)]


def _waits(one: Seen) -> bool:
    return one.record is not None and bool(one.record.waits_in) and not one.ended and not one.left and one.state != "T"


def _line(culprits: Sequence[Seen], waiting: Sequence[Seen], why: str, words: _Words) -> str:
    first = culprits[0]
    alike = [one for one in culprits if words.of(one) == words.of(first)]
    verb = "keeps" if len(alike) == 1 else "keep"
    it = "it" if len(alike) == 1 else "each"
    text = (
        f"{ranks_said(one.rank for one in alike)} {verb} the others waiting: {it} {words.of(first)}{words.where(first)}"
    )
    others = [one for one in culprits if one not in alike]
    if others:
        text += f"; {'; '.join(f'rank {one.rank} {words.of(one)}' for one in others[:3])}"
    text += why
    rest = [one for one in waiting if one not in culprits]
    return f"{text}; {_waiting_words(rest, words)}." if rest else f"{text}."


def _waiting_words(waiting: Sequence[Seen], words: _Words) -> str:
    """`ranks 0, 2 wait in all_gather of unit layers.3 since 62 s`, by place."""
    parts: dict[str, list[Seen]] = {}
    for one in waiting:
        parts.setdefault(words.wait(one.record), []).append(one)
    texts = []
    for place, there in list(parts.items())[:3]:
        longest = max(words.age(one.record.waits_since) for one in there if one.record is not None)
        verb = "waits" if len(there) == 1 else "wait"
        texts.append(f"{ranks_said(one.rank for one in there)} {verb} in {place} since {longest:.0f} s")
    return ", ".join(texts)


# Who it is.


def _culprits(seen: Sequence[Seen], waiting: Sequence[Seen], now: float) -> tuple[list[Seen], str]:
    """Those who are waited for, and what more there is to say of the first."""
    ended = [one for one in seen if one.ended]
    if ended:
        return sorted(ended, key=_when_ended), ""
    if not waiting:
        return _behind(seen, now), ""
    missing = [one for one in seen if not _waits(one)]
    if missing:
        return sorted(missing, key=lambda one: _severity(one, now)), ""
    for rule in (_fewer_batches, _extra_forward, _smaller_part, _alone_in_a_call, _ahead):
        culprits, why = rule([(one, one.record) for one in waiting if one.record is not None])
        if culprits:
            return culprits, why
    return [], ""


def _when_ended(one: Seen) -> tuple[int, float, int]:
    """Without a word before those with an error, which they may have because of it; then in order of their last word."""
    record = one.record
    if record is None or record.end is End.NOT:
        return (0, 0.0, one.rank)
    return (1 if record.end is End.ENDED else 2, record.moved, one.rank)


def _severity(one: Seen, now: float) -> tuple[int, int]:
    record = one.record
    if one.left:
        kind = 0
    elif one.state == "T":
        kind = 1
    elif record is None:
        kind = 2
    elif record.asks:
        kind = 3
    else:
        kind = 4
    return (kind, one.rank)


_Rows = list[tuple[Seen, Record]]


def _fewer_batches(rows: _Rows) -> tuple[list[Seen], str]:
    most = max(record.batches for _, record in rows)
    same = len({record.iteration for _, record in rows}) == 1
    fewer = [one for one, record in rows if record.epoch_ended and record.batches < most]
    if not same or not fewer:
        return [], ""
    given = min(record.batches for _, record in rows)
    return fewer, f"; its data loader has ended after {given} batches, another rank's has given {most}"


def _extra_forward(rows: _Rows) -> tuple[list[Seen], str]:
    counts = [record.forwards for _, record in rows]
    if len({(record.iteration, record.batches) for _, record in rows}) != 1 or not rows[0][1].batches:
        return [], ""
    more = [one for one, record in rows if record.forwards > record.batches]
    if not more or len(more) == len(rows):
        return [], ""
    return (
        more,
        f"; it has begun {max(counts)} forwards on as many batches as the others, which have begun {min(counts)}",
    )


def _place(record: Record) -> Hashable:
    return (record.waits_in, record.doing, record.unit, record.calls)


def _smaller_part(rows: _Rows) -> tuple[list[Seen], str]:
    parts = Counter(_place(record) for _, record in rows)
    (largest, most), *others = parts.most_common()
    if not others or others[0][1] == most:
        return [], ""
    return [one for one, record in rows if _place(record) != largest], ""


def _alone_in_a_call(rows: _Rows) -> tuple[list[Seen], str]:
    in_a_call: Callable[[Record], bool] = lambda record: bool(record.calls) or record.waits_in == BARRIER  # noqa: E731
    evaluates: Callable[[Record], bool] = lambda record: record.doing is Doing.EVALUATION  # noqa: E731
    for is_there in (in_a_call, evaluates):
        there = [one for one, record in rows if is_there(record)]
        if there and 2 * len(there) <= len(rows):
            return there, ", which the others are not in"
    return [], ""


def _ahead(rows: _Rows) -> tuple[list[Seen], str]:
    if len({_place(record) for _, record in rows}) == 1:
        return [], ""

    def progress(record: Record) -> tuple[int, ...]:
        return (record.steps, record.batches, int(record.asks), record.forwards, int(record.doing))

    most = max(progress(record) for _, record in rows)
    ahead = [one for one, record in rows if progress(record) == most]
    if len(ahead) == len(rows):
        return [], ""
    return ahead, ", and has left out what the others wait in"


def _behind(seen: Sequence[Seen], now: float) -> list[Seen]:
    """Where the host does not wait in collectives: those that have begun the fewest."""
    known = [one for one in seen if one.record is not None and not one.left]
    stopped = [one for one in known if one.state == "T"]
    if stopped:
        return stopped
    counts = {one.record.begun for one in known if one.record is not None}
    return (
        [one for one in known if one.record is not None and one.record.begun == min(counts)] if len(counts) > 1 else []
    )


# In words.


class _Words:
    def __init__(self, now: float, memory_kills: int) -> None:
        self._now = now
        self._memory_kills = memory_kills

    def age(self, then: float) -> float:
        return max(0.0, self._now - then)

    def wait(self, record: Record | None) -> str:
        assert record is not None
        unit = f" of unit {record.unit}" if record.unit and record.doing is not Doing.NONE else ""
        if record.calls and record.calls not in re.split(r"\W+", record.waits_in):
            return f"{record.calls} ({record.waits_in})"
        return f"{record.waits_in}{unit}"

    def of(self, one: Seen) -> str:
        """What it does, or has done last, without its subject."""
        record = one.record
        if record is None:
            return "is not known here: it publishes nothing, or its machine is not heard"
        if one.left:
            return "has left the run"
        if record.end is End.ENDED:
            code = (
                f"left with exit code {record.end_code}"
                if record.end_code >= 0
                else "has ended: its script came to its end"
            )
            return code
        if record.end is End.FAILED:
            return f"has ended with an error{f' ({record.end_words})' if record.end_words else ''}"
        if one.gone:
            return self._killed(one)
        if one.state == "T":
            return f"is stopped by a signal (kill -CONT {record.pid} lets it go on)"
        return self._alive(record)

    def _killed(self, one: Seen) -> str:
        if self._memory_kills:
            return "was killed by the kernel: memory ran out"
        return "was killed, or has crashed: its process is gone"

    def _alive(self, record: Record) -> str:
        if record.waits_in:
            return f"waits in {self.wait(record)} since {self.age(record.waits_since):.0f} s"
        if record.asks:
            return (
                f"waits for its data loader since {self.age(record.asks_since):.0f} s, for batch {record.batches + 1}"
            )
        if record.beat and self.age(record.beat) > _NO_BEAT_S:
            return f"does not let its interpreter go since {self.age(record.beat):.0f} s"
        if record.calls:
            return f"is in {record.calls} since {self.age(record.calls_since):.0f} s"
        if record.doing is not Doing.NONE:
            unit = f" in unit {record.unit}" if record.unit else ""
            return f"computes{unit} since {self.age(record.moved):.0f} s"
        return "is in its script"

    def where(self, one: Seen) -> str:
        """Line and step, behind what it does."""
        record = one.record
        if record is None:
            return ""
        gone = one.gone or record.end is not End.NOT
        line = record.end_words if record.end is End.ENDED and record.end_words else record.line
        parts = [f"{'last ' if gone and line is record.line else ''}at {line}"] if line else []
        if gone and record.calls:
            parts.append(f"in {record.calls}")
        phase = _IN.get(record.doing)
        unit = f" in unit {record.unit}" if gone and record.unit and phase else ""
        parts.append(phase.format(self._step(record)) + unit if phase else f"after step {record.steps}")
        return "".join(f", {part}" for part in parts)

    @staticmethod
    def _step(record: Record) -> int:
        """Counted from 1: the step that a pass is for, or the one that an evaluation follows."""
        return record.steps if record.doing is Doing.EVALUATION else record.steps + 1
