"""The records of `user.py` as a table for a terminal, and as one for the README. It runs nothing and imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# What runs must share to stand in one part of a table.
_SHARED = ("case", "nproc", "precision", "accumulate", "free", "tiny", "layers", "save_every", "device")
_TITLES = {
    "bart": "BART-large, LoRA on q and v",
    "lora8b": "8B Llama shape, LoRA on all linears, checkpointing",
    "full1b": "1B Llama shape, all weights",
    "full8b": "8B Llama shape, all weights, checkpointing",
}


@dataclass
class Tally:
    """All runs of one plan in one part."""

    plan: str
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def ms(self) -> list[float]:
        """Of each run, its median step."""
        return [record["median_ms"] for record in self.done]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)

    def largest(self, section: str, name: str) -> float | None:
        """Of bytes, in GB; None where none were counted."""
        found = [record[section][name] for record in self.done if name in record[section]]
        return max(found) / 1e9 if found else None

    @property
    def host_gb(self) -> float:
        return max(record["host_rss_bytes"] for record in self.done) / 1e9

    def first_step(self, since: str) -> float:
        """Seconds; the least of the runs, since the first has cold caches."""
        return min(float(record["first_step_s"][since]) for record in self.done)

    @property
    def save(self) -> dict[str, float] | None:
        """Medians: per cent of stall, and ms of a call behind the first; None where nothing was saved."""
        saves = [record["save"] for record in self.done if "save" in record]
        if not saves:
            return None
        calls = [ms for save in saves for ms in save["call_ms"]]
        return {
            "stall_percent": statistics.median(save["stall_percent"] for save in saves),
            "drift_percent": max(save["drift_percent"] for save in saves),
            "call_ms": statistics.median(calls),
        }

    def apart(self, first: Tally) -> float:
        """The largest difference of a loss from the first plan's, relative."""
        pairs = zip(self.done[0]["losses"], first.done[0]["losses"], strict=False)
        return max(abs(mine - theirs) / max(abs(theirs), 1e-6) for mine, theirs in pairs)


def parts(records: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tally]]]:
    """What each part shares, and its plans, in the order in which they ran. A part's failures stand with its runs."""
    found: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Tally]]] = {}
    devices = {_key(record, device=False): record["device"] for record in records if "device" in record}
    for given in records:
        record = {"device": devices.get(_key(given, device=False)), **given}
        _, tallies = found.setdefault(_key(record), ({name: record.get(name) for name in _SHARED}, {}))
        tally = tallies.setdefault(record["plan"], Tally(record["plan"]))
        if "failed" in record:
            tally.failed.append(record["failed"])
        else:
            tally.done.append(record)
    return [(shared, list(tallies.values())) for shared, tallies in found.values()]


def _key(record: dict[str, Any], *, device: bool = True) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in _SHARED if device or name != "device")


def table(records: Sequence[dict[str, Any]]) -> str:
    """All runs. ms: the median of the runs' medians, between the least and the most; `ratio` is to the first plan of a case.

    `first s` counts from the start of the launcher, `from Acc` from the call of Accelerator(), both to the end of step 1.
    """
    head = (
        f"{'case':<8}{'plan':<40}{'runs':>5}{'ms':>10}{'min':>10}{'max':>10}{'ratio':>7}{'tok/s/GPU':>11}{'peak GB':>9}"
    )
    lines = [
        f"{head}{'resv GB':>9}{'host GB':>9}{'first s':>9}{'from Acc':>9}{'loss apart':>11}{'stall %':>9}{'call ms':>9}"
    ]
    for shared, tallies in parts(records):
        first = next((tally for tally in tallies if tally.done), None)
        for tally in tallies:
            begin = f"{shared['case']:<8}{tally.plan:<40}"
            if tally.done and first is not None:
                tokens = statistics.median(record["tokens_per_s_per_gpu"] for record in tally.done)
                sizes = [tally.largest("peak_bytes", name) for name in ("allocated", "reserved")]
                saved = tally.save
                lines.append(
                    f"{begin}{len(tally.done):>5}{tally.median_ms:>10.1f}{min(tally.ms):>10.1f}{max(tally.ms):>10.1f}"
                    f"{tally.median_ms / first.median_ms:>7.3f}{tokens:>11.0f}"
                    + "".join(f"{'-' if size is None else format(size, '.2f'):>9}" for size in sizes)
                    + f"{tally.host_gb:>9.1f}{tally.first_step('from_start'):>9.1f}"
                    f"{tally.first_step('from_accelerator'):>9.1f}{tally.apart(first):>11.1e}"
                    + (f"{saved['stall_percent']:>9.2f}{saved['call_ms']:>9.1f}" if saved else "")
                )
            lines += [f"{begin} FAILED {reason}" for reason in tally.failed]
    return "\n".join(lines)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The same for the README: one table, behind it what printed it and what failed."""
    with_saves = any("save" in record for record in records)
    head = [
        "case",
        "plan",
        "ms a step",
        "of the first",
        "tokens/s per GPU",
        "peak GB",
        "reserved",
        "host GB",
        "first step, s",
    ]
    head += ["stall of saves", "call, ms"] if with_saves else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    failures = []
    for shared, tallies in parts(records):
        first = next((tally for tally in tallies if tally.done), None)
        title = _title(shared)
        for tally in tallies:
            if tally.done and first is not None:
                lines.append("| " + " | ".join([title, f"`{tally.plan}`", *_cells(tally, first, with_saves)]) + " |")
                title = ""
            failures += [f"- `{tally.plan}`, {_title(shared)}: {reason}" for reason in dict.fromkeys(tally.failed)]
    return "\n".join([*lines, "", *_origin(records), *(["", "Failed:", *failures] if failures else [])])


def _cells(tally: Tally, first: Tally, with_saves: bool) -> list[str]:
    tokens = statistics.median(record["tokens_per_s_per_gpu"] for record in tally.done)
    sizes = [tally.largest("peak_bytes", name) for name in ("allocated", "reserved")]
    spread = f" ({min(tally.ms):,.0f} to {max(tally.ms):,.0f})" if len(tally.done) > 1 else ""
    cells = [f"{tally.median_ms:,.0f}{spread}", f"{tally.median_ms / first.median_ms:.2f}", f"{tokens:,.0f}"]
    cells += ["-" if size is None else f"{size:.1f}" for size in sizes]
    cells += [f"{tally.host_gb:.1f}", f"{tally.first_step('from_start'):.1f}"]
    if with_saves:
        saved = tally.save
        cells += [f"{saved['stall_percent']:.2f}%", f"{saved['call_ms']:.0f}"] if saved else ["", ""]
    return cells


def _title(shared: dict[str, Any]) -> str:
    """What the runs of a part share, in words; what is as usual is not said."""
    said = [_TITLES[shared["case"]], f"{shared['nproc']} x {shared['device'] or 'unknown'}"]
    said += ["tiny"] if shared["tiny"] else []
    said += [f"{shared['layers']} layers"] if shared["layers"] is not None else []
    said += ["fp32"] if shared["precision"] == "no" else []
    said += [f"{shared['accumulate']} batches a step"] if shared["accumulate"] > 1 else []
    said += ["free-running"] if shared["free"] else []
    said += [f"saved every {shared['save_every']} steps"] if shared["save_every"] is not None else []
    return ", ".join(said)


def _origin(records: Sequence[dict[str, Any]]) -> list[str]:
    """Which commands, commits and versions a table comes from."""
    named = ("torch", "nccl", "transformers", "peft", "accelerate", "deepspeed")
    versions = [
        ", ".join(f"{name} {record[name]}" for name in named if record.get(name))
        for record in records
        if "torch" in record
    ]
    commits = dict.fromkeys(record["commit"] for record in records)
    return [
        "Printed by `python benchmarks/user.py --markdown` from the records of:",
        "```",
        *dict.fromkeys(record["command"] for record in records),
        "```",
        f"Commit {', '.join(commits)}; {'; '.join(dict.fromkeys(versions)) or 'no run went well'}.",
    ]
