"""A DeepSpeed configuration that stays open to the script which gave it: what it has written since it was last looked at.

    words.config  ->  changed()  ->  read(): settings, and sentences for what is wrong or without effect

`words_of` is the way back: the settings in force, as a DeepSpeed JSON says them.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..config.deepspeed_json import DeepSpeedFile, read_deepspeed_json, read_deepspeed_values
from ..config.environment import RankEnvironment
from ..config.schema import Config
from ..errors import ConfigError
from .deepspeed_words import AUTO, HfDeepSpeedConfig, fill_match, keys_of

logger = logging.getLogger("shardwise")

_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")


class OpenConfiguration:
    """What a plugin knows of its configuration.

    words:     the configuration. described: the script has given one, whole; else it only shows what is in force.
    path:      the file that it was read from, or None.
    wrote_batch_sizes: the script has written a batch size by hand.
    """

    def __init__(self, words: HfDeepSpeedConfig, path: str | os.PathLike[str] | None, *, described: bool) -> None:
        self.words = words
        self.described = described
        self.wrote_batch_sizes = False
        self._path = path
        self._seen = copy.deepcopy(words.config)

    def changed(self) -> dict[str, Any]:
        """The keys at the top that have changed since the configuration was looked at; None for one that is gone."""
        now, seen = self.words.config, self._seen
        found = {
            key: now.get(key)
            for key in dict.fromkeys((*now, *seen))
            if key not in now or key not in seen or now[key] != seen[key]
        }
        self.wrote_batch_sizes = self.wrote_batch_sizes or any(isinstance(found.get(name), int) for name in _SIZES)
        return found

    def look(self) -> None:
        """Take the configuration as it is now for known."""
        self._seen = copy.deepcopy(self.words.config)

    def read(self, part: Mapping[str, Any] | None = None) -> DeepSpeedFile:
        """The configuration, or a `part` of it, as our settings. Raises ConfigError with a line for each thing wrong."""
        if part is None and self._path is not None and os.path.exists(self._path) and not self.changed():
            read = read_deepspeed_json(os.fspath(self._path))  # which tells the lines
        else:
            values = copy.deepcopy(self.words.config if part is None else dict(part))
            read = read_deepspeed_values(values, "deepspeed_config")
        if read.problems:
            raise ConfigError("\n".join(read.problems))
        if part is not None and "zero_optimization" not in part:
            read.values.get("deepspeed_config", {}).pop("zero_stage", None)
        return read

    def write(self, words: Mapping[str, Any]) -> None:
        """Put settings where the configuration has "auto", or, where none was given, all of them."""
        if self.described:
            self.fill({key: HfDeepSpeedConfig(words).get_value(key) for key in keys_of(words)})
            for name in ("bf16", "fp16", "gradient_accumulation_steps"):
                self.words.config.setdefault(name, words[name])
        else:
            self.words.config.update(words)
        self.look()

    def fill(self, given: Mapping[str, Any]) -> None:
        """Put values, by dotted key, where the configuration says "auto"."""
        for key in keys_of(self.words.config):
            if given.get(key, AUTO) != AUTO:
                fill_match(self.words, key, [], given, must_match=False)
        self.look()


def words_of(config: Config) -> dict[str, Any]:
    """The settings of a configuration as a DeepSpeed JSON says them."""
    zero, engine = config.zero, config.engine
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": engine.micro_batch_size or AUTO,
        "train_batch_size": engine.train_batch_size or AUTO,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": zero.gradient_clipping or 0.0,
        "zero_optimization": {
            "stage": zero.zero_stage,
            "offload_optimizer": _device(zero.offload_optimizer_device, zero.offload_optimizer_nvme_path),
            "offload_param": _device(zero.offload_param_device, zero.offload_param_nvme_path),
            "stage3_gather_16bit_weights_on_model_save": zero.zero3_save_16bit_model,
        },
        "bf16": {"enabled": config.mixed_precision == "bf16"},
        "fp16": {"enabled": config.mixed_precision == "fp16"},
    }
    sections = {name: getattr(engine, name) for name in ("optimizer", "scheduler")}
    return found | {name: copy.deepcopy(section) for name, section in sections.items() if section is not None}


def _device(device: str, path: str | list[str] | None) -> dict[str, Any]:
    return {"device": device, "nvme_path": path} if device == "nvme" else {"device": device}


def keywords_of(read: DeepSpeedFile) -> dict[str, Any]:
    """What was read, as keywords of `merged`."""
    flat: dict[str, Any] = {}
    for key, value in read.values.items():
        flat.update(value if key in ("deepspeed_config", "shardwise_config") else {key: value})
    return flat


def check_precision(told: Mapping[str, Any], asked: str) -> None:
    """Raise ConfigError if a configuration enables another precision than the one that was asked for elsewhere."""
    found = told.get("mixed_precision", "no")
    if found != "no" and asked not in ("no", found):
        raise ConfigError(
            f"mixed_precision is {asked}, and the DeepSpeed configuration enables {found}. Make them the same, or write "
            "'auto' there."
        )


def tell(notes: Iterable[str]) -> None:
    """Log notes on rank 0."""
    if RankEnvironment.read().rank == 0:
        for note in notes:
            logger.warning(note)
