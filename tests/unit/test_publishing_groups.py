"""In which groups units are published, and what waits for what, with the device's side replaced by a list."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.step import publishing


class RecordingLane:
    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def wait(self, event: object) -> None:
        self._seen.append(f"gather lane waits for {event}")

    def mark(self) -> str:
        return "gather lane"

    @contextmanager
    def on(self) -> Any:
        self._seen.append("on")
        yield
        self._seen.append("off")


def engine(seen: list[str]) -> Any:
    def gathers(what: str) -> Any:
        return SimpleNamespace(all_gather_together=lambda wholes, _: seen.append(f"gather {what}{' '.join(wholes)}"))

    return SimpleNamespace(
        ranks=SimpleNamespace(owners=gathers(""), copies=gathers("over copies: ")),
        lanes=SimpleNamespace(
            gather=RecordingLane(seen),
            mark_compute=lambda: "compute",
            compute_waits=lambda event: seen.append(f"compute waits for {event}"),
        ),
    )


def unit(name: str, nbytes: int, *, publishes: bool = True, of: Any = None, sharded: bool = False) -> Any:
    buffer = SimpleNamespace(whole_nbytes=nbytes, whole=name, shard=name, travels=False)
    region = SimpleNamespace(interval=slice(1), in_shard=slice(1))
    plan = SimpleNamespace(parameter=SimpleNamespace(sharded=sharded))
    trained = SimpleNamespace(buffer=buffer, region=region, plan=plan)
    return SimpleNamespace(name=name, publishes=publishes, trained=trained, engine=of)


def names(groups: list[list[Any]]) -> list[list[str]]:
    return [[each.name for each in group] for group in groups]


def test_groups_are_filled_from_the_smallest_unit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "GROUP_NBYTES", 100)
    units = [unit("norm", 1), unit("embedding", 250), unit("a", 50), unit("b", 50), unit("c", 50), unit("d", 40)]
    assert names(publishing.in_groups(units)) == [["norm", "d", "a"], ["b", "c"], ["embedding"]]


def test_units_of_one_size_keep_the_model_s_order() -> None:
    assert names(publishing.in_groups([unit("a", 8), unit("b", 8), unit("c", 8)])) == [["a", "b", "c"]]


def test_what_nobody_gathers_steps_in_the_last_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "GROUP_NBYTES", 1)
    units = [unit("sharded", 1, publishes=False), unit("a", 2), unit("b", 3)]
    assert names(publishing.in_groups(units)) == [["a"], ["b", "sharded"]]
    assert names(publishing.in_groups(units[:1])) == [["sharded"]]
    assert publishing.in_groups([]) == []


def test_a_gather_waits_for_the_step_and_the_computation_for_the_gather() -> None:
    seen: list[str] = []
    mine = engine(seen)
    units = [unit("a", 1, of=mine), unit("frozen", 1, publishes=False, of=mine), unit("b", 1, of=mine)]
    publishing.send(units)
    assert seen == ["gather lane waits for compute", "on", "gather a b", "off"]
    seen.clear()
    after: Any = "step lane"
    publishing.send(units[:1], after=after)
    assert seen == ["gather lane waits for step lane", "on", "gather a", "off"]
    seen.clear()
    publishing.arrive(units)
    assert seen == ["compute waits for gather lane"]


def test_shards_that_are_stepped_in_parts_are_gathered_over_their_copies() -> None:
    seen: list[str] = []
    mine = engine(seen)
    publishing.send(
        [unit("whole", 1, of=mine), unit("a", 1, of=mine, sharded=True), unit("b", 1, of=mine, sharded=True)]
    )
    assert seen == ["gather lane waits for compute", "on", "gather whole", "gather over copies: a b", "off"]


def test_each_model_gathers_on_its_own_lane() -> None:
    seen: list[str] = []
    first, second = engine(seen), engine(seen)
    units = [unit("a", 1, of=first), unit("b", 1, of=second), unit("c", 1, of=first)]
    publishing.send(units)
    assert [line for line in seen if line.startswith("gather ")] == [
        "gather lane waits for compute",
        "gather a c",
        "gather lane waits for compute",
        "gather b",
    ]
    seen.clear()
    publishing.arrive(units)
    assert seen == ["compute waits for gather lane"] * 2
