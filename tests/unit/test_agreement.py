"""Which settings ranks must share, and the words for what they do not."""

from __future__ import annotations

import pytest

from shardwise.config.agreement import (
    AGREED,
    OBJECTS,
    OWN,
    SAME_EVERYWHERE,
    VERSIONS,
    differences,
    disagreement,
    keys_of_schema,
    ranks_said,
    settings_of,
)
from shardwise.config.check import checked
from shardwise.config.schema import Config


def test_every_key_of_the_schema_is_compared_or_a_machines_own():
    keys = keys_of_schema()
    assert len(keys) == len(set(keys))
    assert sorted([*AGREED, *OWN]) == sorted(keys)
    assert all(len(reason.split()) > 1 for reason in OWN.values())


def test_settings_are_plain_and_complete():
    found = settings_of(Config())
    assert tuple(found) == AGREED
    assert all(value is None or isinstance(value, (bool, int, float, str, list)) for value in found.values())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"dynamo_backend": "inductor"}, {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}),
        ({"distributed_type": "DEEPSPEED"}, {"distributed_type": "deepspeed", "deepspeed_config": {"zero_stage": "2"}}),
        ({}, {"shardwise_config": {"collective_timeout_s": 600}, "deepspeed_config": {"zero_stage": 0}}),
    ],
)
def test_two_spellings_of_one_thing_are_alike(one, other):
    assert settings_of(checked(one)) == settings_of(checked(other))


def test_a_difference_names_key_ranks_and_values():
    rows = [{"a": 1, "b": "x"}, {"a": 1, "b": "x"}, {"a": 1, "b": None}, {"a": 1, "b": "x"}, {"a": 1}]
    (found,) = differences(rows)
    assert str(found) == "b is x on ranks 0-1, 3 and none on rank 2 and not there on rank 4"
    assert disagreement("{ranks} differ", [found], SAME_EVERYWHERE).startswith("ranks 0 and 2 differ: b is x on")
    assert differences([{"a": 1}, {"a": 1}]) == []


def test_many_differences_are_counted_and_versions_told_alone():
    rows = [{str(n): rank for n in range(20)} for rank in range(2)]
    assert disagreement("{ranks}", differences(rows), "").count(";") == 8
    assert "; and 12 more." in disagreement("{ranks}", differences(rows), "")
    for alone in (VERSIONS[0], OBJECTS):
        mixed = [{**row, alone: "ab"[rank]} for rank, row in enumerate(rows)]
        assert [found.key for found in differences(mixed)] == [alone]


def test_ranks_in_words():
    assert ranks_said([1]) == "rank 1"
    assert ranks_said([5, 0, 1, 2]) == "ranks 0-2, 5"
