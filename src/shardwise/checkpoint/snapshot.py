"""This rank's part of a checkpoint as it was at one moment, without waiting for the device, and written afterwards.

    training   | step | take | forward, backward      | step |
    compute                  |  waits for weights     |      | waits for states
    down                     |weights|    states     |
    thread, another process                          | sum up and write .......... |

`take` only enqueues: weights and averages first, for which the computation waits, because scripts may write them. An
optimizer's states come behind them, piece by piece (`in_turn.py`), and its next step waits for them: of 0.75 GB on a rank that
is 5 and 9 ms at 54 GB/s. What a script writes into states before that step could be in the copy: torch's own count of writes
shows it, and it is the save's error.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, StoreError
from ..files.apart import NoProcessError, write_apart
from ..files.writer import TensorFile, as_bytes
from ..offload.pinned import SharedMemory, host_tensor, shared_memory
from ..ranks.lanes import Lanes
from .file_plan import FilePlan, Span, Transfer, Way, memory_of
from .in_turn import CopiesInTurn
from .keeping import Keeping
from .patience import Progress
from .pieces import Piece, Resting
from .writers import Writers

logger = logging.getLogger("shardwise")

_WRITERS = 4  # threads: one sums up and writes about 1 GB/s
_SEVERAL_NBYTES = 64 << 20  # from which on several threads are worth their start


class Pool:
    """The buffer of saves, kept between them: pinned where there is a GPU, and of exactly the size of what is copied."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self.shared: SharedMemory | None = None
        self.said_alone = False  # that no other process writes
        self._copies: dict[str, torch.Event | None] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that it takes."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def take(self, nbytes: int, *, pinned: bool) -> Tensor:
        """(nbytes,) bytes, for one save at a time. Where so much cannot be pinned, memory that is not, which is said."""
        if self._buffer is None or self._buffer.nbytes != nbytes:
            self._buffer, self.shared, self._copies = None, None, {}
            with torch.inference_mode(False):  # it outlives the script's
                try:
                    self._buffer = self._made(nbytes, pinned=pinned)
                except StoreError as error:
                    logger.warning("A save in the background holds the training while it copies: %s", error)
                    self._buffer = self._made(nbytes, pinned=False)
        return self._buffer

    def _made(self, nbytes: int, *, pinned: bool) -> Tensor:
        if nbytes >= _SEVERAL_NBYTES:
            try:
                self.shared = shared_memory(nbytes, pinned=pinned, copies=(self._copies,))
            except OSError as error:
                logger.info("No memory that another process sees: %s", error)
            else:
                return self.shared.tensor
        return host_tensor(nbytes, torch.uint8, pinned=pinned, copies=(self._copies,))

    def note(self, event: torch.Event | None) -> None:
        """The last copy into it."""
        self._copies["last"] = event


def in_pieces(lanes: Lanes) -> bool:
    """Whether states are copied beside the training. On a CPU, and where one stream does all, `take` copies them."""
    return lanes.down.stream is not None


class Snapshot:
    """What of `pieces`, which the plan is of, was taken, until it is written. lanes: of the models whose states these are.

    `take` it; have `write_now` called while nothing changes; `copy` and `write` it in any thread; `close` it in any case.
    """

    def __init__(self, plan: FilePlan, pieces: Sequence[Piece], lanes: Sequence[Lanes], pool: Pool) -> None:
        self.plan = plan
        self._pieces = list(pieces)
        self._lanes = lanes
        # What rests is alive while it is read, whoever lets go of it.
        self._flats: list[Any] = [p.source.held() if isinstance(p.source, Resting) else None for p in pieces]
        cuda = any(lane.device.type == "cuda" for lane in lanes)
        with torch.inference_mode(False):
            self._buffer = pool.take(plan.nbytes, pinned=cuda) if plan.nbytes else torch.empty(0, dtype=torch.uint8)
        self._pool = pool
        self._enqueued: torch.Event | None = None  # everything that was under way before
        self._states: CopiesInTurn | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._written_by_script = False
        self.keeping = Keeping(self._await_slabs)
        self._lock = threading.Lock()

    # Taking.

    @torch.no_grad()
    def take(self) -> None:
        """Enqueue the copies, and keep what stays. The host waits for nothing but memory that is not pinned."""
        transfers = self.plan.transfers
        weights = [one for one in transfers if not one.is_state]
        states = [one for one in transfers if one.is_state]
        if not self._lanes:
            assert not transfers, "what rests belongs to a model"
        else:
            lanes = self._lanes[0]
            # Not through the compute lane: where states are offloaded, the next forward need not wait for their way down.
            for event in (lanes.mark_compute(), *(event for every in self._lanes for event in every.marks())):
                lanes.down.wait(event)
            self._enqueued = lanes.down.mark() or lanes.mark_compute()
            copies = CopiesInTurn(self._pairs(weights, are_states=False), lanes, self._enqueued, self._pool.note)
            copied = copies.hurry()
            if weights:
                lanes.compute_waits(copied)
            pairs = self._pairs(states, are_states=True)
            self._states = CopiesInTurn(pairs, lanes, copied, self._pool.note)
            if not in_pieces(lanes):
                self._states.hurry()
            if pairs and (copied is not None or in_pieces(lanes)):
                self._versions = [(one, one._version) for _, one in pairs if not one.is_inference()]
                for other in self._lanes:
                    other.before_states_change(lambda: self._states_change(lanes))
        for number, span in enumerate(self.plan.spans):
            if span.source is not None:
                self.keeping.add(self._flats[span.source], span.begin, span.begin + span.nbytes, number)
        self.keeping.watch()

    def _pairs(self, transfers: Sequence[Transfer], *, are_states: bool) -> list[tuple[Tensor, Tensor]]:
        """(place in the buffer, what is copied there) of each."""
        into = self.plan.targets(self._buffer, are_states=are_states) if transfers else []
        sources = []
        for one in transfers:
            flat = memory_of(self._flats[one.source])
            sources.append(flat if one.count == flat.numel() else flat[one.begin : one.begin + one.count])
        return list(zip(into, sources, strict=True))

    def _states_change(self, lanes: Lanes) -> None:
        """A step comes: it waits for the copies of the states, and a script must not have written them meanwhile."""
        assert self._states is not None
        lanes.compute_waits(self._states.hurry())
        self._look_at_versions()  # behind it: where Ctrl-C has met it, the next step comes here again

    def _look_at_versions(self) -> None:
        """Once: when a step comes, or the copies are there, whatever is first. Later writes are no longer in them."""
        with self._lock:
            versions, self._versions = self._versions, []
            if any(one._version != then for one, then in versions):
                self._written_by_script = True

    def _await_slabs(self) -> None:
        if self._enqueued is not None:
            self._enqueued.synchronize()

    # Writing.

    def copy(self) -> None:
        """Return when all that was taken is in the buffer."""
        self._await_slabs()
        if self._states is not None:
            self._states.copy()

    def write_now(self, file: TensorFile) -> None:
        """What rests on a drive or as codes, one tensor at a time."""
        for n in self.plan.numbers(Way.WRITTEN):
            piece = self._pieces[n]
            source = piece.source
            assert isinstance(source, Resting)
            file.write(piece.address, source.read())

    def write(self, file: TensorFile, progress: Progress) -> None:
        """Everything else. Raises CheckpointError where a script has written what was being copied."""
        self.copy()
        self._look_at_versions()
        self._refuse_written()
        for n in self.plan.numbers(Way.GIVEN):
            piece = self._pieces[n]
            file.write(piece.address, piece.source.read(), progress.advance)
        sums = [[0] * blocks for blocks in self.plan.blocks]
        self._write_spans(file, sums, progress)
        self._refuse_written()
        for n, way in enumerate(self.plan.ways):
            if way in (Way.COPIED, Way.KEPT):
                file.note(self._pieces[n].address, sums[n])

    def _refuse_written(self) -> None:
        if self._written_by_script or self.keeping.spoiled:
            raise CheckpointError(
                "the script has written into an optimizer's states behind save_state(async_=True), before they were saved. "
                "Call finish_saving() before it writes there, or save with async_=False."
            )

    def _write_spans(self, file: TensorFile, sums: list[list[int]], progress: Progress) -> None:
        copied = [span for span in self.plan.spans if span.source is None]

        def advance(nbytes: int) -> None:
            with self._lock:
                progress.advance(nbytes)

        def work(waiting: Iterator[Span]) -> None:
            for span, memory in self._kept_and(waiting):
                self._write_span(file, span, memory, sums)
                advance(span.nbytes)

        if sum(span.nbytes for span in self.plan.spans) < _SEVERAL_NBYTES:
            work(iter(copied))
            return
        file.bypass_cache()
        with Writers("shardwise-save") as threads:
            if len(copied) < len(self.plan.spans):
                threads.start(_WRITERS, lambda: work(iter(())))
            left = self._left_by_another_process(file, copied, sums, advance)
            if left:
                waiting = iter(left)
                threads.start(_WRITERS, lambda: work(waiting))

    def _left_by_another_process(
        self, file: TensorFile, spans: Sequence[Span], sums: list[list[int]], advance: Callable[[int], None]
    ) -> Sequence[Span]:
        """Have another process write what was copied; gives what is still to be written, which is all or nothing."""
        shared = self._pool.shared
        if shared is None or not spans:
            return spans
        stretches = [(shared.begin + one.begin, one.offset, [nbytes for _, _, nbytes in one.parts]) for one in spans]
        try:
            found = write_apart(file.path, shared.descriptor, stretches, _WRITERS, advance)
        except NoProcessError as error:
            level = logging.INFO if self._pool.said_alone else logging.WARNING
            self._pool.said_alone = True
            words = (
                "A save in the background may hold the training up: this process writes it, another one did not: %s."
            )
            logger.log(level, words, error)
            return spans
        for span, own in zip(spans, found, strict=True):
            for (n, block, _), value in zip(span.parts, own, strict=True):
                sums[n][block] = value
        return []

    def _kept_and(self, copied: Iterator[Span]) -> Iterator[tuple[Span, Tensor]]:
        """Spans for the caller to write, each before it asks for the next: kept ones first, for which steps may wait."""
        while True:
            with self.keeping.next_block() as found:
                if found is None:
                    break
                yield self.plan.spans[found[0]], found[1]
        while True:
            with self._lock:
                span = next(copied, None)
            if span is None:
                return
            yield span, self._buffer[span.begin : span.begin + span.nbytes]

    @staticmethod
    def _write_span(file: TensorFile, span: Span, memory: Tensor, sums: list[list[int]]) -> None:
        data, at = as_bytes(memory), 0
        for n, block, nbytes in span.parts:
            sums[n][block] = zlib.crc32(data[at : at + nbytes])
            at += nbytes
        file.write_span(data, span.offset)

    def close(self) -> None:
        """Let go of what was read. What is still being copied stays until it is."""
        self.keeping.close()
        if self._states is not None:
            self._states.drop()
        self._versions = []
        self._flats, self._pieces = [], []
