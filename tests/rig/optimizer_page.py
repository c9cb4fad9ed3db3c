"""The tables of docs/optimizers.md, made of what tests found: tests/data/optimizers.json has the outcome of each by plan.

What is above the mark in the page is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rig.every_optimizer import BOTH, KINDS, PLANS, SHARDS, WHOLE, Kind
from shardwise.step.ways import INSTEAD

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "optimizers.json"
PAGE = ROOT / "docs" / "optimizers.md"
_LONGEST = 150
_HOW = {SHARDS: "in shards", WHOLE: "whole, one rank each", BOTH: "by group: in shards, whole"}
_MARK = "<!-- What follows is written by tests/ranks/test_every_optimizer.py. -->\n"


def read() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(DATA.read_text())
    return found


def write(key: str, plan: str, outcome: str) -> None:
    """Put one outcome into the data."""
    data = read() if DATA.exists() else {}
    data.setdefault(key, {})[plan] = outcome
    ordered = {k: {p: data[k][p] for p in PLANS if p in data[k]} for k in KINDS if k in data}
    DATA.write_text(json.dumps(ordered, indent=1) + "\n")


def shortened(text: str, name: str) -> str:
    """The reason in a refusal. It has no numbers that differ between machines."""
    if text in _HOW:
        return text
    reason = text.partition(INSTEAD)[0].strip()
    for beginning in (
        "cannot work on shards: ",
        "cannot be offloaded: ",
        "cannot work on several ranks: ",
        "cannot be judged: ",
    ):
        head, found, rest = reason.partition(beginning)
        if found and len(head) < 40:
            reason = rest
            break
    if reason.startswith("in a trial ") and ": it " in reason:
        reason = "it " + reason.split(": it ", 1)[1]
    reason = reason.split(". ")[0].rstrip(".").replace("\n", " ").replace("|", "/")
    return reason if len(reason) <= _LONGEST else reason[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def row(kind: Kind, found: Mapping[str, str]) -> str:
    """The line of one optimizer."""
    parted = [found[plan] for plan in ("2", "3")]
    how = _HOW.get(parted[0])
    assert (parted[0] == parted[1]) or how is None, (kind.key, parted)
    at_zero = found["0"] in _HOW
    note = ""
    if how is None:
        how, stages = ("at stage 0 only", "0") if at_zero else ("no", "-")
        note = parted[0] if at_zero else found["0"]
    else:
        stages = "0 to 3" if at_zero else "1 to 3"
    offload = "yes" if found["3-nvme"] in _HOW else "no"
    if offload == "no" and not note:
        note = found["3-nvme"]
    resumes = "yes" if stages != "-" else "-"
    cells = [f"`{kind.name}`", kind.package, how, stages, offload, kind.bits or "", resumes, note]
    return "| " + " | ".join(cells) + " |"


def page(data: Mapping[str, Mapping[str, str]]) -> str:
    full = {key: found for key, found in data.items() if len(found) == len(PLANS)}
    runs = sum(1 for found in full.values() if found["3"] in _HOW)
    at_zero = sum(1 for found in full.values() if found["0"] in _HOW and found["3"] not in _HOW)
    lines = [
        PAGE.read_text().partition(_MARK)[0] + _MARK,
        f"Of {len(full)}, {runs} run at every stage, {at_zero} at stage 0 only, {len(full) - runs - at_zero} are refused.\n",
    ]
    for title, wanted in (
        ("torch", lambda kind: kind.package == "torch"),
        ("Packages of one or few", lambda kind: kind.package not in ("torch", "pytorch_optimizer")),
        ("pytorch_optimizer", lambda kind: kind.package == "pytorch_optimizer"),
    ):
        lines += [
            f"## {title}",
            "| optimizer | package | how, at stages 1 to 3 | stages | offload | bits | resumes | note |",
            "|---|---|---|---|---|---|---|---|",
            *(row(KINDS[key], found) for key, found in full.items() if wanted(KINDS[key])),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"
