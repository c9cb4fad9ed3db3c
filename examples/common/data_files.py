"""Rows of data files in the shapes that people have: CSV, TSV, JSON, JSON lines and Parquet."""

from __future__ import annotations

import csv
import itertools
import json
from collections import abc
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, Sequence, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def read_rows(paths: abc.Sequence[Path]) -> Dataset:
    """The rows of one file or several, in their order. Each file's kind is told by its ending, else by how it begins.

    CSV may be separated by commas, semicolons, tabs or bars. JSON may be lines of objects, a list of objects, lists by column
    ({"text": [...], "label": [...]}), or an object with one such list in it ({"data": [...]}).
    Raises SystemExit with one sentence for a file that cannot be read so, that has no row, or whose columns are not the
    others'.
    """
    parts = []
    for path in paths:
        try:
            if path.stat().st_size == 0:
                raise SystemExit(f"there is no row in {path}.")
            rows = _read(path)
        except (ValueError, OSError, UnicodeDecodeError, DatasetGenerationError) as error:
            cause = error.__cause__ or error
            raise SystemExit(f"{path} cannot be read as {_kind(path)}: {' '.join(str(cause).split())[:300]}") from None
        if len(rows) == 0:
            raise SystemExit(f"there is no row in {path}.")
        if parts and sorted(rows.column_names) != sorted(parts[0].column_names):
            raise SystemExit(
                f"{path} has the columns {sorted(rows.column_names)}, {paths[0]} has {sorted(parts[0].column_names)}; "
                "files that are read together have the same ones."
            )
        parts.append(rows)
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise SystemExit(
            f"the columns of {[str(path) for path in paths]} are of different types: {str(error)[:300]}"
        ) from None


def text_of(rows: Dataset, column: str, where: str) -> Dataset:
    """The rows with `column` as text: class numbers by their names ("no_complaint" reads "no complaint"), whole numbers
    without ".0", booleans as "true" and "false".

    where: the rows' name in errors. Raises SystemExit for a value that is missing, and for lists and objects.
    """
    feature = rows.features[column]
    if isinstance(feature, Sequence | LargeList | dict | list):
        raise SystemExit(f"the {where} have lists or objects in column {column!r}; each row needs one value there.")
    values = rows[column][:]
    if isinstance(feature, ClassLabel):
        names = [name.replace("_", " ") for name in feature.names]
        # -1 is how data sets of the hub mark a row without a label.
        values = [None if number is None or number < 0 else names[number] for number in values]
    # A column of whole numbers with a gap is read as floating point by every CSV reader.
    whole = all(isinstance(value, float) and value.is_integer() for value in values if value is not None)
    texts = [_as_text(value, whole=whole) for value in values]
    missing = next((number for number, text in enumerate(texts) if text is None), None)
    if missing is not None:
        raise SystemExit(f"row {missing} of the {where} (counted from 0) has nothing in column {column!r}.")
    if texts == rows[column][:]:
        return rows
    return rows.remove_columns(column).add_column(column, texts).select_columns(rows.column_names)


def has_values(rows: Dataset, column: str) -> bool:
    """Whether any row has something in `column`: a label that marks a row without one (None, -1 of a class) is nothing."""
    is_class = isinstance(rows.features[column], ClassLabel)
    return any(value is not None and not (is_class and value < 0) for value in rows[column])


def _as_text(value: Any, *, whole: bool) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if whole and isinstance(value, float):
        return str(int(value))
    return str(value)


def _kind(path: Path) -> str:
    known = KINDS.get(path.suffix.lower())
    if known is not None:
        return known
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"PAR1"):
        return "parquet"
    return "json" if start[:1] in (b"{", b"[") else "csv"


def _read(path: Path) -> Dataset:
    kind = _kind(path)
    if kind == "csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = "".join(itertools.islice(file, 20))
        if len(list(itertools.islice(csv.reader(head.splitlines(keepends=True)), 2))) < 2:
            raise SystemExit(f"there is no row in {path}.")
        return load_dataset("csv", data_files=str(path), split="train", sep=_separator(head, path))
    if kind == "json" and path.suffix.lower() not in (".jsonl", ".ndjson"):
        rows = _whole_json(path)
        if rows is not None:
            return rows
    return load_dataset(kind, data_files=str(path), split="train")


def _separator(head: str, path: Path) -> str:
    """What stands between the columns: the one of the usual four that the header has most, outside of quotes."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = head.splitlines()[0]
    fields = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in (",", ";", "\t", "|")}
    return max(fields, key=lambda mark: fields[mark])


def _whole_json(path: Path) -> Dataset | None:
    """The rows of a file that is one JSON object; None if it is a list or lines of objects, which `datasets` reads itself."""
    with path.open(encoding="utf-8-sig") as file:
        lines = (line for line in file if line.strip())
        first, second = next(lines, ""), next(lines, None)
        if not first.lstrip().startswith("{"):
            return None
        if second is not None:
            try:
                json.loads(first)
                return None  # lines of objects
            except ValueError:
                pass  # one object over several lines
        file.seek(0)
        found = json.load(file)
    lists = {key: value for key, value in found.items() if isinstance(value, list)}
    # A list of objects with roles is one conversation, and the object around it one row.
    objects = [
        value
        for value in lists.values()
        if value and all(isinstance(item, dict) and "role" not in item for item in value)
    ]
    if len(lists) == len(found) > 1 and len({len(value) for value in lists.values()}) == 1:
        return Dataset.from_dict(found)
    if len(objects) == 1:
        return Dataset.from_list(objects[0])
    return Dataset.from_list([found])
