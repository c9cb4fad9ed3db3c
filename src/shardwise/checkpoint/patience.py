"""Waiting together for what a disk does: as long as it takes, while every rank is alive.

A collective waits for the other ranks as long as `collective_timeout_s`; a disk may take longer on one rank than on the
others. So while a rank writes, a thread of it tells the others every few seconds how far it is, over the group that its next
agreement would use:

    rank 0   write ......................... done
    rank 1   write ...................................................... done
             .      beat: 0 done, 1 has 3.1 GiB left      beat: ...     beat: all done; the first error is everybody's

Where all end within a beat, that is one exchange, as an agreement without this would be. A rank that died, or was stopped,
does not come to a beat: that is an error after the timeout of a collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import CheckpointError
from ..ranks.agree import agreed_words, raise_first
from ..ranks.agreeing import attempt
from ..ranks.blame import named
from ..ranks.ranks import Ranks

T = TypeVar("T")
logger = logging.getLogger("shardwise")

BEAT_S = 10.0
SAY_EVERY_S = 60.0


class Progress:
    """How far this rank is with something long. The thread that does it counts, another one reads.

    doing: what the rank is at, in a few words. left_nbytes: None where bytes say nothing.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.left_nbytes: int | None = None
        self.lost: Exception | None = None

    def start(self, nbytes: int, doing: str) -> None:
        self.left_nbytes, self.doing = nbytes, doing

    def advance(self, nbytes: int) -> None:
        """So many bytes are done. Raises CheckpointError if another rank is gone: nobody needs the rest."""
        if self.left_nbytes is not None:
            self.left_nbytes -= nbytes
        if self.lost is not None:
            raise CheckpointError("another rank is gone.") from self.lost

    def words(self) -> str:
        return self.doing if self.left_nbytes is None else f"{self.doing}, {_size(self.left_nbytes)} left"


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.0f} MiB"


@dataclass
class _Beat:
    """What a rank tells. left: it was interrupted, and comes to no other beat."""

    done: bool
    words: str
    error: str | None = None
    left: bool = False


@dataclass
class _Beats:
    """The beats of one action of this rank."""

    ranks: Ranks
    what: str
    progress: Progress
    ended: threading.Event = field(default_factory=threading.Event)
    last: _Beat | None = None  # this rank's, once it has ended
    texts: list[str | None] = field(default_factory=list)
    broken: Exception | None = None

    def run(self) -> None:
        interval = min(BEAT_S, self.ranks.timeout_s / 4)
        began = said = time.monotonic()
        while True:
            self.ended.wait(interval)
            mine = self.last or _Beat(False, self.progress.words())
            found, self.broken = attempt(lambda: self.ranks.gather_objects(mine))  # noqa: B023 - called at once
            if found is None:
                self.progress.lost = self.broken
                return
            if any(beat.left for beat in found) or all(beat.done for beat in found):
                self.texts = [beat.error for beat in found]
                self.progress.lost = next((CheckpointError(beat.error or "") for beat in found if beat.left), None)
                return
            now = time.monotonic()
            if self.ranks.rank == 0 and now - said >= SAY_EVERY_S:
                said = now
                logger.warning("%s: for %d s now. %s.", self.what, now - began, _who(found))


def _who(beats: list[_Beat]) -> str:
    waiting = [f"rank {rank}: {beat.words}" for rank, beat in enumerate(beats) if not beat.done]
    more = f"; and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    done = len(beats) - len(waiting)
    return f"{'; '.join(waiting[:4])}{more}; {done} of {len(beats)} ranks are done"


def patiently(
    ranks: Ranks, action: Callable[[], T], progress: Progress, *, what: str, on: int | None = None, failed: str = ""
) -> T | None:
    """As `agree.together`, for an action that takes as long as a disk does. Collective; `action` does not communicate.

    progress: what `action` counts on. what: the subject of the lines in the log. failed: how the error's text begins.
    """
    beats = _Beats(ranks, what, progress)
    thread = threading.Thread(target=beats.run, name="shardwise-beat", daemon=True)
    thread.start()
    try:
        result, error = attempt(action) if on is None or ranks.rank == on else (None, None)
        beats.last = _Beat(True, "done", agreed_words(error))
    except BaseException as interrupt:  # Ctrl-C: the others hear it at once, and this rank goes
        beats.last = _Beat(True, "gone", agreed_words(interrupt), left=True)
        raise
    finally:
        beats.ended.set()
        thread.join()
    if beats.broken is not None:
        first = error or beats.broken
        raise CheckpointError(f"{failed}{_lost(ranks, error, beats.broken)}") from first
    raise_first(ranks, beats.texts, error, failed)
    return result


def _lost(ranks: Ranks, error: Exception | None, broken: Exception) -> str:
    """The cause that this rank has met itself comes before the silence of the others, which it may have caused."""
    if error is not None and error.__cause__ is not broken:
        return agreed_words(error) or ""
    culprit = named(str(broken))
    if culprit:
        return culprit
    return f"another rank is gone, or did not answer for {ranks.timeout_s:g} s ({' '.join(str(broken).split())[:200]})."
