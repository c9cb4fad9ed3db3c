"""Copies that a save's thread makes one by one, until a step takes what is left: each element once, behind what came before."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.checkpoint import in_turn
from shardwise.checkpoint.in_turn import CopiesInTurn
from shardwise.errors import CheckpointError


class Event:
    def __init__(self, waits: threading.Event | None = None) -> None:
        self.waits = waits
        self.asked = threading.Event()

    def synchronize(self) -> None:
        self.asked.set()
        if self.waits is not None:
            assert self.waits.wait(10)


def _lanes(events: list[Any]) -> Any:
    """Whose marks are `events`, one after another, and then events that are done."""
    left = iter(events)
    down = SimpleNamespace(on=nullcontext, mark=lambda: next(left, None) or Event())
    return SimpleNamespace(down=down, mark_compute=Event)


def _pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    sources = [torch.arange(1.0, n + 1) for n in (3, 1, 12, 5)] + [torch.arange(1, 9, dtype=torch.int64)]
    return [(torch.zeros_like(one), one) for one in sources]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "PIECE_NBYTES", 16)


def _done(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(int((into != 0).sum()) for into, _ in pairs)


def test_pieces_hold_each_element_once_and_no_more_than_their_bytes():
    pieces = list(in_turn._pieces(_pairs()))
    assert [sum(source.nbytes for _, source in piece) for piece in pieces] == [16] * 5 + [12] + [16] * 3 + [8]
    assert sum(source.nbytes for piece in pieces for _, source in piece) == sum(source.nbytes for _, source in _pairs())


def test_one_piece_is_enqueued_when_the_one_before_is_there():
    pairs, gate, noted = _pairs(), threading.Event(), []
    second = Event(gate)
    copies = CopiesInTurn(pairs, _lanes([None, second]), None, noted.append)
    thread = threading.Thread(target=copies.copy)
    thread.start()
    assert second.asked.wait(10)
    assert _done(pairs) == 8, "two pieces of four"
    assert noted[-1] is second
    gate.set()
    thread.join(10)
    assert all(torch.equal(*pair) for pair in pairs)


def test_who_cannot_wait_has_the_rest_enqueued_and_the_thread_waits_for_that():
    pairs, gate, last = _pairs(), threading.Event(), threading.Event()
    first, end = Event(gate), Event(last)
    copies = CopiesInTurn(pairs, _lanes([first, end]), None, lambda event: None)
    thread = threading.Thread(target=copies.copy)
    thread.start()
    assert first.asked.wait(10)
    assert copies.hurry() is end
    assert all(torch.equal(*pair) for pair in pairs)
    assert copies.hurry() is end
    gate.set()
    assert end.asked.wait(10)
    assert thread.is_alive()
    last.set()
    thread.join(10)
    assert not thread.is_alive()


def test_nothing_is_copied_before_what_it_lies_behind_and_without_copies_that_is_the_end():
    behind = Event()
    CopiesInTurn([], _lanes([]), behind, lambda event: None).copy()
    assert behind.asked.is_set()
    assert CopiesInTurn([], _lanes([]), behind, lambda event: None).hurry() is behind


def test_what_was_dropped_is_not_copied():
    pairs = _pairs()
    copies = CopiesInTurn(pairs, _lanes([]), None, lambda event: None)
    copies.drop()
    assert copies.hurry() is None
    assert _done(pairs) == 0


def test_what_failed_is_still_to_be_copied():
    pairs = _pairs()
    wrong = [(torch.zeros(2), torch.ones(4)), *pairs]
    copies = CopiesInTurn(wrong, _lanes([]), None, lambda event: None)
    for ask in (copies.copy, copies.hurry, copies.copy):
        with pytest.raises(RuntimeError):
            ask()
    assert _done(pairs) == 0


def test_a_writer_does_not_take_what_was_dropped_for_what_is_there():
    copies = CopiesInTurn(_pairs(), _lanes([]), None, lambda event: None)
    copies.drop()
    with pytest.raises(CheckpointError, match="given up"):
        copies.copy()
    copies.drop()
    done = CopiesInTurn(_pairs(), _lanes([]), None, lambda event: None)
    done.hurry()
    done.drop()
    done.copy()
