"""The report of a run: one HTML page that needs nothing else, of what `reading.py` has read and `curves.py` draws.

Every text of the record is escaped: a record may come from anywhere.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from .bar import count, duration
from .curves import LEFT, RIGHT, WIDTH, Form, Series, line_chart, stacked_chart, stretches
from .page_style import SCRIPT, STYLE
from .reading import Past

_PART_NAMES = {
    "data": "waiting for data",
    "forward_backward": "forward and backward",
    "step": "optimizer step",
    "saving": "saving",
    "evaluation": "evaluation",
    "other": "other",
}
_YEAR_3000 = 32503680000.0  # in seconds since 1970
_TIERS_AT_REST = {"gpu": "device"}  # a run on CPUs has that tier too
_TIER_NAMES = {"device": "device (GPU)", "host": "host", "drive": "drive"}


def page_of(past: Past) -> str:
    """The whole page as text."""
    name = past.directory.resolve().name
    body = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="state">{escape(_state(past))}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in past.notes),
        _tiles(past),
        f'<div class="charts">{"".join(_charts(past))}</div>',
        _time_table(past),
        _memory_table(past),
        _about(past),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


# Numbers as texts.


def seconds(value: float) -> str:
    if value >= 100:
        return duration(value)
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1000:.3g} ms"


def nbytes(value: float) -> str:
    if value == 0:
        return "0"
    for limit, divisor, unit in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if value < limit:
            return f"{value / divisor:.3g} {unit}"
    return f"{value / 1e12:.3g} TB"


def share(value: float) -> str:
    return f"{value:.1%}"


def number(value: float) -> str:
    return f"{value:.4g}"


# Parts of the page.


def _state(past: Past) -> str:
    """How far the run has come."""
    last, total = past.steps[-1], past.about.get("steps")
    words = [f"{last} steps" if not isinstance(total, int) else f"step {last} of {total}"]
    if isinstance(total, int) and last < total:
        words.append("the run goes on, or was interrupted")
    words.append(f"{seconds(past.total('wall_s'))} watched")
    words += [f"resumed behind step {step}" for step in past.resumed]
    written = past.about.get("written_at")
    if isinstance(written, (int, float)) and 0 <= written < _YEAR_3000:
        words.append(f"begun {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(written))}")
    return " · ".join(words)


def _tiles(past: Past) -> str:
    tiles: list[tuple[str, str]] = []
    loss = past.last("loss")
    if loss is not None:
        tiles.append(("last loss", number(loss)))
    speeds: list[tuple[str, str, Form]] = [("samples_per_s", "samples/s", count)]
    if past.known("tokens_per_s") is not None:
        speeds = [("tokens_per_s", "tokens/s, all", count), ("tokens_per_s_per_gpu", "tokens/s per device", count)]
    for name, words, form in (*speeds[: 1 if past.about.get("ranks") == 1 else 2], ("mfu", "MFU", share)):
        column = past.known(name)
        if column is not None:
            tiles.append((f"{words} (median)", form(statistics.median(filter(math.isfinite, column)))))
    if past.known("mfu") is None:
        tiles.append(("MFU", "not known"))
    wall = past.total("wall_s")
    if wall:
        tiles.append(("waiting for data", share(past.total("time/data") / wall)))
    for tier in past.tiers:
        peaks = past.known(f"memory/{tier}/peak")
        if peaks is not None:
            tiles.append((f"{_TIER_NAMES.get(tier, tier)}, peak", nbytes(max(filter(math.isfinite, peaks)))))
    rows = "".join(f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in tiles)
    return f'<div class="tiles">{rows}</div>'


def _charts(past: Past) -> Iterable[str]:
    def lines(
        title: str, names: Sequence[tuple[str, str]], form: Form, *, band: bool = True, from_zero: bool = False
    ) -> str:
        found = [(column, words) for name, words in names if (column := past.known(name)) is not None]
        series = [Series(words, column, f"k{i}", band=band) for i, (column, words) in enumerate(found)]
        return _figure(past, title, series, form, functools.partial(line_chart, from_zero=from_zero)) if series else ""

    yield lines("Loss", [("loss", "loss")], number)
    yield lines("Learning rate", [("learning_rate", "learning rate")], number, band=False)
    each = [("tokens_per_s", "all")]
    if past.about.get("ranks") != 1:
        each.append(("tokens_per_s_per_gpu", "per device"))
    yield lines("Tokens per second", each, count, from_zero=True)
    if past.known("tokens_per_s") is None:
        yield lines("Samples per second", [("samples_per_s", "all")], count, from_zero=True)
    yield lines("Gradient norm, before clipping", [("gradient_norm", "norm")], number, from_zero=True)
    yield lines("MFU", [("mfu", "MFU")], share, from_zero=True)
    yield _memory(past)
    parts = [
        Series(_PART_NAMES.get(part, part), _per_step(past, f"time/{part}"), f"k{i}")
        for i, part in enumerate(past.parts)
    ]
    yield _figure(past, "Where a step's time went", parts, seconds, stacked_chart) if parts else ""


def _memory(past: Past) -> str:
    series = []
    for i, tier in enumerate(past.tiers):
        words = _TIER_NAMES.get(tier, tier)
        series.append(Series(words, past.columns[f"memory/{tier}/now"], f"k{i}"))
        if past.known(f"memory/{tier}/peak") is not None:
            series.append(Series(f"{words}, peak", past.columns[f"memory/{tier}/peak"], f"k{i}", dashed=True))
    chart = functools.partial(line_chart, from_zero=True)
    return _figure(past, "Memory by tier, of rank 0", series, nbytes, chart) if series else ""


def _per_step(past: Past, name: str) -> list[float]:
    """A column's values of a line as values of a step, of which a line may have several."""
    return [value / max(steps, 1.0) for value, steps in zip(past.columns[name], past.columns["steps"], strict=True)]


Chart = Callable[..., str]


def _figure(past: Past, title: str, series: Sequence[Series], form: Form, chart: Chart) -> str:
    drawing = chart(past.steps, series, form, marks=[step for step in past.resumed if step >= past.steps[0]])
    rows = [stretches(past.steps, one.values) for one in series]
    told = {
        "left": LEFT,
        "width": WIDTH - LEFT - RIGHT,
        "steps": [round(part.step, 1) for part in rows[0]],
        "values": [[form(part.mean) if math.isfinite(part.mean) else "" for part in row] for row in rows],
        "names": [one.name for one in series],
    }
    shown = {one.kind: one.name for one in reversed(series)} if len(series) > 1 else {}
    legend = "".join(f'<li class="{kind}">{escape(words)}</li>' for kind, words in sorted(shown.items()))
    dashed = "<li>dashed: peak</li>" if any(one.dashed for one in series) else ""
    return (
        f'<figure><figcaption>{escape(title)}</figcaption>{drawing}<ul class="legend">{legend}{dashed}</ul>'
        f'<output></output><script type="application/json">{_script_json(told)}</script></figure>'
    )


def _script_json(value: Any) -> str:
    """JSON that cannot end the script that it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _time_table(past: Past) -> str:
    wall = past.total("wall_s")
    if not past.parts or not wall:
        return ""
    steps = max(past.total("steps"), 1.0)
    bar, rows = [], []
    for i, part in enumerate(past.parts):
        spent = past.total(f"time/{part}")
        bar.append(f'<i class="k{i}" style="width:{spent / wall:.4%}"></i>')
        cells = (_PART_NAMES.get(part, part), seconds(spent), share(spent / wall), seconds(spent / steps))
        rows.append(
            f'<tr class="k{i}"><td>{escape(cells[0])}</td>' + "".join(f"<td>{escape(c)}</td>" for c in cells[1:])
        )
    return (
        f'<section><h2>Where the time went</h2><div class="shares">{"".join(bar)}</div>'
        "<table><tr><th>part</th><th>time</th><th>share</th><th>per step</th></tr>"
        + "</tr>".join(rows)
        + f"</tr><tr><td>all</td><td>{seconds(wall)}</td><td>100%</td><td>{seconds(wall / steps)}</td></tr>"
        "</table></section>"
    )


def _memory_table(past: Past) -> str:
    found = past.about.get("at_rest_bytes")
    if not isinstance(found, dict) or not found:
        return ""
    rows = "".join(
        f"<tr><td>{escape(role)}</td><td>{escape(_TIERS_AT_REST.get(tier, tier))}</td><td>{nbytes(value)}</td></tr>"
        for name, value in found.items()
        if isinstance(value, (int, float))
        for role, _, tier in [name.partition("/")]
    )
    return (
        "<section><h2>At rest on rank 0, before the first step</h2>"
        f"<table><tr><th>role</th><th>tier</th><th>bytes</th></tr>{rows}</table></section>"
    )


def _about(past: Past) -> str:
    """How MFU comes about; the model; versions and settings."""
    about, sections = past.about, []
    mfu = about.get("mfu")
    if isinstance(mfu, dict):
        peak = mfu.get("peak_flops")
        rows = {
            "formula": "operations per token x tokens/s per device / peak",
            "operations per token": mfu.get("operations_per_token"),
            "peak": f"{peak / 1e12:g} Tera operations/s: {mfu.get('peak')}"
            if isinstance(peak, (int, float))
            else f"not known: {mfu.get('peak')}",
        }
        sections.append(_table("MFU", rows))
    run = {key: about.get(key) for key in ("command", "ranks", "device", "plan", "weights", "log_every")}
    if isinstance(run["command"], list):
        run["command"] = " ".join(map(str, run["command"]))
    if isinstance(run["weights"], int):
        run["weights"] = f"{run['weights']:,}"
    sections.append(_table("Run", {key: value for key, value in run.items() if value is not None}))
    sections.append(_table("Versions", about.get("versions")))
    sections.append(_table("Settings", _flat(about.get("settings"))))
    return "".join(section for section in sections if section)


def _flat(settings: Any, before: str = "") -> dict[str, Any]:
    """Nested settings as one level: deepspeed_config.zero_stage."""
    if not isinstance(settings, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        elif value is not None:
            found[f"{before}{key}"] = value
    return found


def _table(title: str, rows: Any) -> str:
    if not isinstance(rows, dict) or not rows:
        return ""
    body = "".join(f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    is_long = len(rows) > 12
    table = f'<table class="facts">{body}</table>'
    if is_long:
        table = f"<details><summary>{len(rows)} of them</summary>{table}</details>"
    return f"<section><h2>{escape(title)}</h2>{table}</section>"
