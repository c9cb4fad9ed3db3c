"""The forms in which an error of one rank becomes every rank's, without ranks."""

from __future__ import annotations

from datetime import timedelta

import pytest

from shardwise.errors import RankError, StoreError
from shardwise.ranks.agreeing import FirstError, attempt, attempt_or_interrupt, compared, raise_first, words_of
from shardwise.ranks.assembling import assemble


class Others:
    """This rank and one other, who says `theirs` in a round of messages in place of what this one says."""

    def __init__(self, *theirs):
        self.theirs = list(theirs)
        self.sent = []

    def gather_objects(self, value):
        self.sent.append(value)
        return [value, self.theirs.pop(0)(value)]

    def broadcast_object(self, value):
        return value


def test_behind_the_first_error_no_other_step_runs():
    first, ran = FirstError(), []

    def fail():
        raise StoreError("the drive is full")

    assert first.attempt(lambda: 1) == 1
    assert first.attempt(fail) is None
    assert first.attempt(lambda: ran.append(1)) is None
    assert not ran
    assert isinstance(first.error, StoreError)


def test_an_interrupt_is_an_outcome_only_where_the_ranks_agree_next():
    def stop():
        raise KeyboardInterrupt

    assert isinstance(attempt_or_interrupt(stop)[1], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        attempt(stop)


def test_a_rank_raises_its_own_error_and_else_that_of_the_first_rank_that_failed():
    own = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        raise_first(own, [None, words_of(own)])
    with pytest.raises(RankError, match=r"rank 1 failed: KeyboardInterrupt$"):
        raise_first(None, [None, words_of(KeyboardInterrupt()), words_of(own)])
    raise_first(None, [None, None])


def test_facts_that_are_the_same_take_one_message():
    others = Others(lambda mine: mine)
    assert compared(others, lambda: {"stage": 3}, "`prepare`", timedelta(seconds=1), counted=False) == []
    assert len(others.sent) == 1


def test_only_facts_that_differ_go_around():
    others = Others(lambda mine: ("another digest", None, mine[2]), lambda mine: {"stage": [2]})
    found = compared(others, lambda: {"stage": 3, "seed": 1}, "`prepare`", timedelta(seconds=1), counted=False)
    assert [one.key for one in found] == ["stage"]
    assert others.sent[1] == {}  # rank 0 differs in nothing from itself


def test_facts_that_cannot_be_had_on_another_rank_are_its_error():
    others = Others(lambda mine: (mine[0], "ValueError: no such file", mine[2]))
    with pytest.raises(RankError, match="rank 1 failed: ValueError: no such file"):
        compared(others, dict, "`prepare`", timedelta(seconds=1), counted=False)


class Store(dict):
    def check(self, keys):
        return all(key in self for key in keys)

    def set(self, key, value):
        self[key] = value

    def delete_key(self, key):
        del self[key]


def test_a_call_that_a_rank_does_not_make_names_it_and_leaves_no_mark():
    store = Store()
    with pytest.raises(
        RankError, match=r"a\.verb\(\) is collective at stage 2.*waited 0 s for rank 0, 2, which did not"
    ):
        assemble(store, 1, 3, "a.verb()", "at stage 2", timedelta(seconds=0.02), say_after_s=5)
    assert not store


def test_a_rank_that_came_and_gave_up_is_not_named_as_missing():
    store = Store({"shardwise/given.up()/0/0": "here"})
    plain = store.check

    def check(keys):
        found = plain(keys)
        if keys == ["shardwise/given.up()/0/0"]:
            store.pop(keys[0], None)
        return found

    store.check = check
    with pytest.raises(RankError, match="for rank 2, which did not"):
        assemble(store, 1, 3, "given.up()", "", timedelta(seconds=0.05), say_after_s=5)


def test_marks_of_the_call_before_are_removed_once_all_ranks_are_in_the_next():
    store = Store({f"shardwise/other.verb()/{count}/1": "here" for count in range(2)})
    for _ in range(2):
        assemble(store, 0, 2, "other.verb()", "", timedelta(seconds=1), say_after_s=5)
    assert sorted(key for key in store if key.endswith("/0")) == ["shardwise/other.verb()/1/0"]
