"""What every rank sends, in order, is what it was: group, collective, dtype, number of elements, for some 70 scenarios.

    python -m pytest tests/ranks/test_transcripts.py --write-data

writes tests/data/transcripts/*.json anew; the difference in git is the change of what is sent, to be read line by line.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rig.transcribed import SCENARIOS, transcript
from rig.transcripts import Phases, difference, packed, unpacked

DATA = Path(__file__).resolve().parents[1] / "data" / "transcripts"


def read(file: str) -> dict[str, list[Phases]]:
    path = DATA / f"{file}.json"
    return unpacked(json.loads(path.read_text())) if path.exists() else {}


def write(file: str, name: str, found: list[Phases]) -> None:
    known = {**read(file), name: found}
    ordered = {key: known[key] for key in SCENARIOS[file] if key in known}
    (DATA / f"{file}.json").write_text(json.dumps(packed(ordered), indent=1) + "\n")


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, own in SCENARIOS.items() for name in own])
def test_every_rank_sends_what_it_sent(world, tmp_path, request, file, name):
    found = world(SCENARIOS[file][name].ranks).run(transcript, file, name, str(tmp_path), timeout_s=60)
    if request.config.getoption("--write-data"):
        write(file, name, found)
    problem = difference(found, read(file)[name])
    assert problem is None, f"{file}, {name}:\n{problem}"


def test_every_transcript_has_a_scenario():
    assert {path.stem for path in DATA.iterdir()} == set(SCENARIOS)
    for file, own in SCENARIOS.items():
        assert list(read(file)) == list(own)


def test_a_difference_is_shown_with_its_neighbours():
    sent = [f"data all_gather float32 {number}" for number in range(20)]
    other = [*sent[:10], "data fence", *sent[10:]]
    assert difference([{"step": sent}], [{"step": sent}]) is None
    text = difference([{"step": sent}, {"step": other}], [{"step": sent}] * 2)
    assert text is not None
    assert text.splitlines()[0] == "rank 1, in 'step', line 11 (of 21, of 20 expected):"
    assert "  found     data fence" in text
    assert "            data all_gather float32 9" in text
    assert "  expected  data all_gather float32 10" in text


def test_packing_loses_nothing():
    first, second = ["a", "a", "b"], ["c", "c"]
    scenarios = {
        "one": [{"x": first, "y": second}] * 2,
        "two": [{"x": second, "z": first}, {"z": first, "x": [*first, "d"]}],
        "none": [{}],
    }
    assert unpacked(json.loads(json.dumps(packed(scenarios)))) == scenarios
