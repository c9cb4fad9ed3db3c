"""A DeepSpeed configuration as a dictionary in its own words, that can be asked and written by dotted keys.

    a path, a dictionary, JSON text, urlsafe base64 of it, or an object with a `.config`   ->   HfDeepSpeedConfig

What its keys mean is `config/deepspeed_json.py`'s; here they are only found, filled and compared.
"""

from __future__ import annotations

import base64
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.documents import SETTINGS_NBYTES, parse_json, read_text, shown

AUTO = "auto"  # for accelerate, Trainer and an Accelerator to fill in
_UNNAMED = "the DeepSpeed configuration"


def load(source: Any) -> tuple[dict[str, Any], str]:
    """The configuration as a dictionary, the very one if it is one, and its name for errors. Raises ConfigError."""
    if isinstance(source, dict):
        return source, _UNNAMED
    if isinstance(source, Mapping):
        return dict(source), _UNNAMED
    held = getattr(source, "config", None)
    if isinstance(held, dict):  # of transformers' HfDeepSpeedConfig, accelerate's, ours
        return held, _UNNAMED
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"{_UNNAMED} is a {type(source).__name__}: give a dictionary, a path, or base64 of JSON.")
    if os.path.exists(source):  # also asked of text that is longer than a name can be
        name = str(source)
        text = read_text(source, ConfigError, SETTINGS_NBYTES)
    elif str(source).lstrip().startswith("{"):
        name, text = _UNNAMED, str(source)
    else:
        name = f"{_UNNAMED} in base64"
        try:
            text = base64.urlsafe_b64decode(str(source)).decode()
        except ValueError:
            raise ConfigError(
                f"{shown(str(source))}: there is no such file, and it is no base64 of a DeepSpeed configuration."
            ) from None
    values = parse_json(text, name, ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: is not a JSON object")
    return values, name


class HfDeepSpeedConfig:
    """What accelerate and transformers call this.

    config_file_or_dict: a path, a dictionary (which is copied), JSON text or base64 of it, or an object with a `.config`
                         (which is shared). Raises ConfigError.
    config:              the dictionary; what a script writes into it is read again.
    """

    def __init__(self, config_file_or_dict: Any) -> None:
        values, _ = load(config_file_or_dict)
        self.config: dict[str, Any] = copy.deepcopy(values) if isinstance(config_file_or_dict, Mapping) else values

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """The section that a dotted key lies in, or None where there is none, and the key's last part."""
        *above, name = ds_key_long.split(".")
        section: Any = self.config
        for part in above:
            section = section.get(part)
            if not isinstance(section, dict):
                return None, name
        return section, name

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of a dotted key."""
        section, name = self.find_config_node(ds_key_long)
        return default if section is None else section.get(name, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Remove a key, and with it what lies below. Raises ConfigError if it must be there and is not."""
        section, name = self.find_config_node(ds_key_long)
        if section is not None and name in section:
            del section[name]
        elif must_exist:
            raise ConfigError(f"the DeepSpeed configuration has no key {ds_key_long}.")

    def is_true(self, ds_key_long: str) -> bool:
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        return bool(self._stage == 2)

    def is_zero3(self) -> bool:
        return bool(self._stage == 3)

    def is_offload(self) -> bool:
        """Whether a device below the GPU is named for optimizer states or parameters, at a stage that looks at one."""
        devices = [
            self.get_value(f"zero_optimization.{role}.device") for role in ("offload_optimizer", "offload_param")
        ]
        return self._stage in (2, 3) and bool({"cpu", "nvme"} & {str(device) for device in devices})

    @property
    def _stage(self) -> Any:
        return self.get_value("zero_optimization.stage", -1)


def fill_match(
    config: HfDeepSpeedConfig, key: str, mismatches: list[str], given: Mapping[str, Any], *, must_match: bool
) -> None:
    """Put `given[key]` where the dotted key is "auto"; else note in `mismatches`, if it must match, that it does not.

    Raises ConfigError for an "auto" that nobody gives.
    """
    section, name = config.find_config_node(key)
    if section is None:
        return
    if section.get(name) == AUTO:
        if key not in given:
            raise ConfigError(f"{key} is 'auto', and nothing says what it is. Write a value in place of 'auto'.")
        section[name] = given[key]
    elif must_match and section.get(name) is not None and key in given and section[name] != given[key]:
        mismatches.append(f"{key} is {section[name]} in the DeepSpeed configuration, and {given[key]} in the arguments")


def keys_of(values: Mapping[str, Any], above: str = "") -> list[str]:
    """The dotted keys that have none below them."""
    found: list[str] = []
    for name, value in values.items():
        found += keys_of(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"]
    return found
