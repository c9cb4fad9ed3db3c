"""`shardwise report`: a page of whatever a run has left, and one sentence where there is nothing to draw."""

from __future__ import annotations

import html.parser
import json
import math

import pytest

from shardwise.cli.main import run
from shardwise.errors import ConfigError
from shardwise.watching.curves import POINTS, Series, line_chart, stacked_chart, stretches, ticks
from shardwise.watching.page import page_of
from shardwise.watching.reading import read_record
from shardwise.watching.record import Record

# Columns that are hard to draw.
ODD = [[0.0], [5.0], [0.0, 0.0], [-3.0, -3.0], [1e-9, 1e9], [math.nan], [5e-324, 1e-323], [1e-310], [1e300, 1.0]]
TIME = {"data": 0.1, "forward_backward": 0.5, "step": 0.2, "saving": 0.0, "evaluation": 0.0, "other": 0.2}


def line(step, steps=1, elapsed=None, **changes):
    made = {
        **{"step": step, "steps": steps, "epoch": step / 10, "loss": 2.0 / step, "learning_rate": 0.1, "mfu": None},
        **{"gradient_norm": 1.0, "tokens": 100, "samples": 2, "tokens_per_s": 100.0, "tokens_per_s_per_gpu": 50.0},
        **{"samples_per_s": 2.0, "wall_s": 1.0, "time_s": TIME, "elapsed_s": step if elapsed is None else elapsed},
        "memory_bytes": {"device": None, "host": {"now": 10**9, "peak": 2 * 10**9}, "drive": {"now": 5, "peak": 5}},
    }
    return {**made, **changes}


def written(directory, lines, about=None, end="\n"):
    directory.mkdir(exist_ok=True)
    texts = [entry if isinstance(entry, str) else json.dumps(entry) for entry in lines]
    (directory / "metrics.jsonl").write_text("\n".join(texts) + end)
    if about is not None:
        (directory / "run.json").write_text(json.dumps(about))
    return directory


class Elements(html.parser.HTMLParser):
    """Counts elements, notes what would be loaded, and that each is closed."""

    EMPTY = ("meta", "line", "polyline", "polygon", "circle")

    def __init__(self, text):
        super().__init__()
        self.found, self.loads, self._open = {}, [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1
        self.loads += [value for key, value in attributes if key in ("src", "href", "action")]
        if (tag not in self.EMPTY and tag not in ("line", "circle")) or tag == "line":
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1

    def handle_endtag(self, tag):
        while self._open and self._open[-1] in ("td", "th", "tr") and self._open[-1] != tag:
            self._open.pop()
        assert self._open.pop() == tag


ABOUT = {
    **{"steps": 12, "ranks": 2, "device": "cpu", "command": ["train.py", "--name", "</script><b>"], "weights": 1234567},
    **{
        "versions": {"torch": "2.13"},
        "settings": {"zero": {"stage": 3}, "empty": None},
        "at_rest_bytes": {"frozen/gpu": 7e9},
    },
    "mfu": {"operations_per_token": "6 x 5", "peak_flops": None, "peak": "a CPU's is not known"},
}


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given(tmp_path):
    past = read_record(written(tmp_path / "run", [line(step) for step in range(1, 13)], ABOUT))
    text = page_of(past)
    elements = Elements(text)
    assert elements.loads == []
    assert "http" not in text
    assert "<b>" not in text.replace("<b>", "", text.count("<div><b>"))
    assert elements.found["svg"] == elements.found["figure"] == 6
    for words in ("Loss", "Learning rate", "Tokens per second", "Memory by tier", "Where a step's time went"):
        assert words in text.replace("&#x27;", "'")
    assert "step 12 of 12" in text
    assert "interrupted" not in text
    assert "1,234,567" in text
    assert "zero.stage" in text
    assert "not known: a CPU&#x27;s is not known" in text


def test_an_interrupted_run_has_a_page_that_says_so(tmp_path):
    past = read_record(written(tmp_path / "run", [line(1), line(2), '{"step": 3, "lo'], ABOUT, end=""))
    assert past.steps == [1, 2]
    text = page_of(past)
    assert "The last line was cut" in text
    assert "step 2 of 12 · the run goes on, or was interrupted" in text


def test_of_steps_that_a_resumed_run_did_again_the_later_lines_count(tmp_path):
    lines = [*(line(step) for step in (1, 2, 3, 4)), *(line(step, elapsed=step - 2, loss=9.0) for step in (3, 4, 5))]
    past = read_record(written(tmp_path / "run", lines))
    assert past.steps == [1, 2, 3, 4, 5]
    assert past.columns["loss"] == [2.0, 1.0, 9.0, 9.0, 9.0]
    assert past.resumed == [2]
    assert "resumed behind step 2" in page_of(past)
    assert past.notes == ["There is no run.json beside it, so nothing is known of settings and versions."]


@pytest.mark.parametrize("slower", [0.1, 10.0])
def test_a_resumed_run_is_known_however_long_its_first_step_takes(slower, tmp_path):
    for goes_on, steps, pace in ((False, (1, 2, 3, 4), 1.0), (True, (3, 4, 5), slower)):
        record = Record(tmp_path, goes_on=goes_on)
        for number, step in enumerate(steps, 1):
            record.write(line(step, elapsed=number * pace, loss=pace))
        record.close()
    past = read_record(tmp_path)
    assert past.steps == [1, 2, 3, 4, 5]
    assert past.columns["loss"] == [1.0, 1.0, slower, slower, slower]
    assert past.resumed == [2]


def test_time_behind_the_last_step_is_added_to_it(tmp_path):
    past = read_record(
        written(tmp_path / "run", [line(1), line(2), line(2, steps=0, elapsed=3, loss=None, tokens=None)])
    )
    assert past.steps == [1, 2]
    assert past.columns["loss"] == [2.0, 1.0]
    assert past.total("wall_s") == 3.0
    assert past.columns["time/step"] == pytest.approx([0.2, 0.4])


def test_numbers_that_are_not_finite_are_gaps(tmp_path):
    past = read_record(written(tmp_path / "run", [line(1), line(2, loss="NaN"), line(3, loss="Infinity"), line(4)]))
    assert [math.isfinite(loss) for loss in past.columns["loss"]] == [True, False, False, True]
    drawing = line_chart(past.steps, [Series("loss", past.columns["loss"], "k0")], str)
    assert drawing.count("<circle") == 2
    assert "nan" not in page_of(past).lower().replace("finance", "")


@pytest.mark.parametrize("values", [*ODD, [1e308, -1e308], [-1e308], [10**299, 1]])
def test_numbers_of_any_size_have_a_page(values, tmp_path):
    lines = [
        line(number, loss=value, wall_s=abs(value), tokens_per_s=value, gradient_norm=value, elapsed_s=number)
        for number, value in enumerate([value for value in values if math.isfinite(value)] or [1], start=1)
    ]
    for written_at in (-1e18, 0, 1e300):
        page = page_of(read_record(written(tmp_path / "run", lines, {"written_at": written_at})))
        Elements(page)
        assert "nan" not in page
        assert ("begun 1970" in page) == (written_at == 0)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], "has no lines"),
        (["", ""], "has no lines"),
        ([line(1), "no json", line(2)], "line 2"),
        ([line(1), "[1, 2]"], "line 2: is no line of a record"),
        (['{"step": 1, "time_s": {}}'], "line 1: is no line of a record; its step or its steps is no whole number"),
        ([line(3), line(2)], "line 2: step 2 follows step 3"),
    ],
)
def test_what_is_no_record_is_one_sentence(lines, error, tmp_path, capsys):
    if len(lines) == 2 and isinstance(lines[1], dict):
        lines[1]["elapsed_s"] = 9
    directory = written(tmp_path / "run", lines)
    with pytest.raises(ConfigError, match=error):
        read_record(directory)
    assert run(["report", str(directory)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert not (directory / "report.html").exists()


def test_a_directory_without_a_record_says_what_writes_one(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 2
    assert "accelerator.watch writes one into the project_dir" in capsys.readouterr().err
    assert run(["report", str(tmp_path / "none")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    assert run(["report", str(tmp_path)]) == 2
    assert "is no text" in capsys.readouterr().err


def test_the_command_writes_beside_the_record_or_where_it_is_told(tmp_path, capsys):
    directory = written(tmp_path / "run", [line(1)])
    assert run(["report", str(directory / "metrics.jsonl")]) == 0
    assert capsys.readouterr().out.startswith(f"{directory / 'report.html'}  1 lines, steps 1 to 1")
    Elements((directory / "report.html").read_text())
    assert run(["report", str(directory), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    (tmp_path / "file").write_text("")
    assert run(["report", str(directory), "-o", str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_long_columns_are_drawn_as_stretches_with_their_least_and_most():
    steps = list(range(1, 10_001))
    row = stretches(steps, [float(step % 7) for step in steps])
    assert len(row) == POINTS
    assert all(part.least == 0 and part.most == 6 for part in row)
    assert row[0].step == pytest.approx(9, abs=1)
    assert len(stretches([1, 2], [0.0, 1.0])) == 2
    drawing = line_chart(steps, [Series("x", [float(step) for step in steps], "k0", band=True)], str)
    assert "band" in drawing
    assert len(drawing) < 40_000


@pytest.mark.parametrize("values", ODD)
def test_columns_of_any_kind_are_drawn_within_the_axes(values):
    steps = list(range(1, len(values) + 1))
    for chart in (line_chart, stacked_chart):
        drawing = chart(steps, [Series("x", [abs(value) for value in values], "k0")], str)
        assert "nan" not in drawing
        assert "inf" not in drawing


def test_ticks_are_round_numbers():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.42) == pytest.approx([0.2, 0.3, 0.4])
    assert ticks(5, 5) == [5]
