"""accelerate's object for torch.compile, as settings of the configuration's `dynamo_config`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.check import merged
from ..config.schema import Config
from ..config.variables import parse_choice_from_env, parse_flag_from_env
from ..errors import ConfigError
from .handlers import KwargsHandler

_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "backend": ("ACCELERATE_DYNAMO_BACKEND", parse_choice_from_env),
    "mode": ("ACCELERATE_DYNAMO_MODE", parse_choice_from_env),
    "fullgraph": ("ACCELERATE_DYNAMO_USE_FULLGRAPH", parse_flag_from_env),
    "dynamic": ("ACCELERATE_DYNAMO_USE_DYNAMIC", parse_flag_from_env),
}


@dataclass
class TorchDynamoPlugin(KwargsHandler):
    """How the blocks of prepared models are compiled, for `Accelerator(dynamo_plugin=...)`; see `config/compiling.py`.

    backend, mode, fullgraph, dynamic: torch.compile's; None takes the variable ACCELERATE_DYNAMO_BACKEND and its like, and else
                                       the configuration's.
    disable:                           compile nothing.
    options, use_regional_compilation=False: refused.
    """

    backend: Any = None
    mode: str | None = None
    fullgraph: bool | None = None
    dynamic: bool | None = None
    options: Any = None
    disable: bool = False
    use_regional_compilation: bool | None = None

    def __post_init__(self) -> None:
        for name, (variable, read) in _VARIABLES.items():
            if getattr(self, name) is None and parse_choice_from_env(variable, ""):
                setattr(self, name, read(variable))
        if self.options is not None:
            raise ConfigError("TorchDynamoPlugin: options are not passed on to a backend. Use mode, or leave them out.")
        if self.use_regional_compilation is False:
            raise ConfigError(
                "TorchDynamoPlugin: use_regional_compilation=False is refused: the engine gathers between blocks, so "
                "blocks are what is compiled."
            )

    def to_kwargs(self) -> dict[str, Any]:
        """What differs from a call of torch.compile without arguments, for such a call."""
        backend = getattr(self.backend, "value", self.backend)
        said = self.to_dict(["use_regional_compilation"]) | {"backend": None if backend is None else backend.lower()}
        plain = {"backend": "no", "mode": "default"}
        return {name: value for name, value in said.items() if value and value != plain.get(name)} | (
            {"dynamic": False} if self.dynamic is False else {}
        )

    def merged_into(self, config: Config) -> Config:
        """`config` with what this plugin says over it. Raises ConfigError for what the configuration does not take."""
        backend = "no" if self.disable else getattr(self.backend, "value", self.backend)
        said = {
            "dynamo_backend": backend,
            "dynamo_mode": self.mode,
            "dynamo_use_fullgraph": self.fullgraph,
            "dynamo_use_dynamic": self.dynamic,
        }
        given = {name: value for name, value in said.items() if value is not None}
        if not given:
            return config
        section = {**config.dynamo_config.model_dump(mode="json"), **given}
        # The older spelling holds where it is there: it is said as well.
        return merged(config, dynamo_config=section, dynamo_backend=backend)
