"""What all ranks do, as far as this one can see: its neighbours' records in shared memory, the others' through the store.

    announce     each rank says in the store in which process, at which descriptor, its record lies; once, while it joins
    look_around  maps the records of the ranks that share this one's /proc; a mapped record outlives its process
    push, hear   between places that share no memory: one rank of each writes what it sees there, slowly

Nothing here waits for another rank. The store is a connection of the watcher's own where torch can make one, so that the main
thread never waits behind it.
"""

from __future__ import annotations

import json
import mmap
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config.machine import process_fields
from .activity import SIZE, Activity, Doing, End, Record, activity, counts_of, read, start_of
from .meeting import Place, host_name

# A watcher that is later than this is looked at, and after the longer time another one takes its place.
_BEAT_LATE_S, _BEAT_LOST_S = 3.0, 15.0
_TIMES = ("moved", "waits_since", "calls_since", "asks_since", "beat", "verdict_at")


@dataclass(frozen=True)
class Seen:
    """One rank, seen from here.

    record: what it has published, with times on this machine's clock; None if nothing of it is known.
    state:  the kernel's letter for its process, "T" for one that is stopped; "" if it is gone, None if nobody can tell.
    """

    rank: int
    record: Record | None = None
    state: str | None = None

    @property
    def gone(self) -> bool:
        """Whether its process has ended."""
        return self.state is not None and self.state in ("", "Z", "X")

    @property
    def left(self) -> bool:
        """Whether it has left the run in order."""
        return self.record is not None and self.record.end is End.LEFT

    @property
    def ended(self) -> bool:
        """Whether it takes no part any more, although it has not left in order."""
        return not self.left and (self.gone or (self.record is not None and self.record.end is not End.NOT))


def process_state(pid: int, started: int) -> str | None:
    """The kernel's letter for that process; "" if it is gone or another one has its number now, None where nothing tells."""
    if not Path("/proc/self/stat").exists():
        return None
    fields = process_fields(pid)
    if fields is None:
        return ""
    return fields[0] if not started or int(fields[19]) == started else ""


def _own_place() -> str:
    """A name that processes share if they see each other in /proc."""
    try:
        return f"{host_name()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{host_name()} {os.getpid()}"


class Board:
    """The records of one run.

    store: the one by which the ranks met.
    """

    def __init__(self, rank: int, world_size: int, store: Any, own: Activity = activity) -> None:
        self.rank = rank
        self.world_size = world_size
        self._own = own
        self._store = store
        self._place = _own_place()
        self._pids: dict[int, tuple[int, int]] = {rank: (os.getpid(), start_of(os.getpid()))}
        self._mapped: dict[int, mmap.mmap] = {}
        self._heard: dict[int, Record] = {}
        self._unclear: set[int] = set()
        self._neighbours: list[int] = []
        self._leaders: list[int] = []
        self._background: Any = None

    def announce(self) -> None:
        """Publish from now on, and say where."""
        run = uuid.uuid4().hex[:16]
        self._own.share(self.rank, run)
        said = {"place": self._place, "pid": os.getpid(), "descriptor": self._own.descriptor, "run": run}
        self._store.set(f"shardwise/activity/of {self.rank}", json.dumps(said))

    def placed(self, places: Sequence[Place]) -> None:
        """This is where every rank sits; all have announced themselves."""
        local_rank, local_size, _ = places[self.rank]
        first = max(0, self.rank - local_rank)
        self._neighbours = [r for r in range(first, min(first + local_size, self.world_size)) if r != self.rank]
        self._leaders = [r for r, (local, _, _) in enumerate(places) if local == 0]
        self.look_around()

    def look_around(self) -> None:
        """Map the records of neighbours that have announced themselves since."""
        missing = [r for r in self._neighbours if r not in self._mapped and r not in self._unclear]
        for rank in missing:
            key = f"shardwise/activity/of {rank}"
            with suppress(RuntimeError):
                if self._store.check([key]):
                    self._map(rank, json.loads(self._store.get(key)))

    def _map(self, rank: int, said: dict[str, Any]) -> None:
        self._unclear.add(rank)  # it is said once
        if said["place"] != self._place or said["descriptor"] < 0:
            return
        try:
            descriptor = os.open(f"/proc/{said['pid']}/fd/{said['descriptor']}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            found = mmap.mmap(descriptor, SIZE, prot=mmap.PROT_READ)
        except (OSError, ValueError):
            return
        finally:
            os.close(descriptor)
        record = read(found)
        if record is None or (record.rank, record.run) != (rank, said["run"]):
            found.close()
            return
        self._mapped[rank] = found
        self._pids[rank] = (record.pid, record.started)

    @property
    def several_places(self) -> bool:
        """Whether some ranks' records can only be heard through the store."""
        return len(self._mapped) + 1 < self.world_size

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its place whose watcher lives."""
        return all(self._silent(rank) for rank in self._mapped if rank < self.rank)

    def _silent(self, rank: int) -> bool:
        """Whether that neighbour's watcher has not written for a while, and its process is stopped or has ended."""
        pid, started = self._pids[rank]
        record = read(self._mapped[rank])
        if record is not None and record.end is not End.NOT:
            return True
        late_s = time.monotonic() - (record.beat if record is not None else 0.0)
        if late_s < _BEAT_LATE_S:
            return False
        return late_s > _BEAT_LOST_S or process_state(pid, started) in ("", "T", "Z", "X", None)

    def sees(self, rank: int) -> bool:
        """Whether that rank's record lies in shared memory here."""
        return rank in self._mapped

    def seen(self) -> list[Seen]:
        """Every rank, in rank order."""
        found = []
        for rank in range(self.world_size):
            if rank == self.rank:
                found.append(Seen(rank, self._own.record(), "R"))
            elif rank in self._mapped:
                pid, started = self._pids[rank]
                found.append(Seen(rank, read(self._mapped[rank]), process_state(pid, started)))
            else:
                found.append(Seen(rank, self._heard.get(rank)))
        return found

    def neighbours_batches(self) -> list[tuple[int, int, int, bool]]:
        """Of each neighbour's loader: rank, iteration, batches, whether its epoch has ended. A microsecond for each."""
        return [(rank, *counts_of(buffer)) for rank, buffer in self._mapped.items()]

    # Between places.

    def exchange(self, *, listen: bool) -> None:
        """Write what is seen in this place, and with `listen` read what the others have written. For the watcher's thread."""
        if self._background is None:
            with suppress(RuntimeError, AttributeError):
                self._background = self._store.clone()
            self._background = self._background or self._store
        now, wall = time.monotonic(), time.time()
        own = [seen for seen in self.seen() if seen.rank == self.rank or seen.rank in self._mapped]
        said = [_packed(seen, now) for seen in own if seen.record is not None]
        key = f"shardwise/activity/seen by {min(seen.rank for seen in own)}"
        self._background.set(key, json.dumps({"at": wall, "records": said}))
        for leader in self._leaders if listen else []:
            key = f"shardwise/activity/seen by {leader}"
            if leader not in self._mapped and leader != self.rank and self._background.check([key]):
                told = json.loads(self._background.get(key))
                for values in told["records"]:
                    record = _unpacked(values, now - max(0.0, wall - told["at"]))
                    if record.rank != self.rank and record.rank not in self._mapped:
                        self._heard[record.rank] = record

    def close(self) -> None:
        """Look at nothing any more. A reader may hold a record still: its memory goes with the last one."""
        self._mapped.clear()
        self._heard.clear()


def _packed(seen: Seen, now: float) -> dict[str, Any]:
    """A record for another machine: ages for times, and its end where only the kernel knows of it."""
    assert seen.record is not None
    values = asdict(seen.record)
    values.update({name: now - values[name] if values[name] else None for name in _TIMES})
    if seen.ended and values["end"] == End.NOT:
        values.update(end=int(End.FAILED), end_code=-1)
    return values


def _unpacked(values: dict[str, Any], then: float) -> Record:
    times = {name: 0.0 if values[name] is None else then - values[name] for name in _TIMES}
    return replace(Record(**{**values, **times}), doing=Doing(values["doing"]), end=End(values["end"]))
