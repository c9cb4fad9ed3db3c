"""The settings of torch.compile: accelerate's `dynamo_config`, and its older spelling as one word."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

from .fields import Flag, one_of, wrong

BACKENDS = ("no", "inductor", "aot_eager", "eager")

GRAPH_MODES = ("reduce-overhead", "max-autotune")


class CompileConfig(BaseModel):
    """How the blocks of a model are compiled. The names are accelerate's."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=False, protected_namespaces=())

    dynamo_backend: Annotated[str, one_of(*BACKENDS)] = "no"
    dynamo_mode: Annotated[str, one_of("default", "max-autotune-no-cudagraphs", *GRAPH_MODES)] = "default"
    dynamo_use_fullgraph: Flag = False
    dynamo_use_dynamic: Flag = False
    dynamo_use_regional_compilation: Flag = True

    @property
    def records_graphs(self) -> bool:
        """Whether the kernels of a block are recorded as a CUDA graph, which reads weights at fixed addresses."""
        return self.dynamo_backend == "inductor" and self.dynamo_mode in GRAPH_MODES


def section(value: Any) -> Any:
    """A mapping as it is, a word as its backend, nothing as no backend."""
    if value is None or value is False or value == {}:
        return {}
    if isinstance(value, str):
        return {"dynamo_backend": value}
    if not isinstance(value, (dict, CompileConfig)):
        raise wrong(f"{value!r} is not a mapping with the key dynamo_backend")
    return value


def word(value: Any) -> Any:
    """The older spelling: a word, or a mapping with nothing but the backend."""
    if isinstance(value, dict) and set(value) <= {"dynamo_backend"}:
        value = value.get("dynamo_backend")
    return "no" if value in (None, "") else value
