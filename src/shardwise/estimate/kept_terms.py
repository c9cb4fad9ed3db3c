"""Terms that were measured on this machine, in a file: for machines with the same GPUs, by name. Without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import ConfigError
from ..files.documents import read_json_object
from .terms import Terms, with_values

FILE = "machine_terms.json"


def stored(path: Path, gpu_names: list[str]) -> dict[str, float]:
    """The terms that were measured on a machine with these GPUs; {} where none were.

    Raises ConfigError for a file that is none.
    """
    if not path.is_file():
        return {}
    document = read_json_object(path, ConfigError)
    terms = document.get("terms")
    if not isinstance(terms, dict):
        raise ConfigError(f"{path}: has no terms; measure again: shardwise plan --measure")
    with_values(Terms(), terms)
    return terms if document.get("gpus") == gpu_names else {}


def store(path: Path, gpu_names: list[str], found: dict[str, float]) -> None:
    """Keep them. Terms of the same GPUs that were not measured this time stay. Raises ConfigError where that cannot be done."""
    try:
        before = stored(path, gpu_names)
    except ConfigError:
        before = {}
    text = json.dumps({"gpus": gpu_names, "terms": {**before, **found}}, indent=1)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
