"""The run's state with the settings of an Accelerator, as scripts ask for it anywhere."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .deepspeed_plugins import plugin_named, select_plugin
from .joined import AcceleratorSettings, accelerator_in_force
from .process import DistributedType, PartialState


class AcceleratorState(PartialState):
    """The run's state with the settings of an Accelerator: by default, the one made last in this process of those that live.

    mixed_precision, deepspeed_plugin: may be given where they are those in force. dynamo_plugin and the others belong to what
    shardwise has not. kwargs: as PartialState's.
    Raises ConfigError for settings that are not those in force, or that come before there is an Accelerator: give them to it.
    """

    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool | None = None,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        *,
        accelerator: AcceleratorSettings | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("dynamo_plugin", dynamo_plugin),
            ("fsdp_plugin", fsdp_plugin),
            ("torch_tp_plugin", torch_tp_plugin),
            ("megatron_lm_plugin", megatron_lm_plugin),
            ("parallelism_config", parallelism_config),
        ):
            if value is not None:
                raise ConfigError(f"AcceleratorState: {name} cannot be given; Accelerator() says what takes its place.")
        super().__init__(cpu, **kwargs)
        self._given = accelerator
        for name, value in (("mixed_precision", mixed_precision), ("deepspeed_plugin", deepspeed_plugin)):
            if value is None:
                continue
            if not self.initialized:
                raise ConfigError(f"AcceleratorState: no Accelerator has been made yet. Give {name} to Accelerator().")
            if getattr(value, "value", value) != getattr(self, name):
                raise ConfigError(
                    f"AcceleratorState: {name} is {value!r}, and the Accelerator of this process was made with "
                    f"{getattr(self, name)!r}. Settings hold for a run: say them to Accelerator(), once."
                )

    @property
    def _accelerator(self) -> AcceleratorSettings:
        accelerator = self._given or accelerator_in_force()
        if accelerator is None:
            raise ConfigError("AcceleratorState: no Accelerator has been made in this process yet.")
        return accelerator

    @property
    def initialized(self) -> bool:
        """Whether there is an Accelerator whose settings it has."""
        return self._given is not None or accelerator_in_force() is not None

    @property
    def is_fsdp2(self) -> bool:
        return False

    @property
    def dynamo_plugin(self) -> Any:
        """How blocks are compiled (`.dynamo_backend`, ...); None where they are not."""
        return self._accelerator.dynamo_plugin

    @property
    def deepspeed_plugins(self) -> Any:
        """`deepspeed_plugin`, under its name where the script gave Accelerator() a dictionary."""
        return self._accelerator.deepspeed_plugins

    def get_deepspeed_plugin(self, name: str) -> Any:
        """The ZeRO settings of this name. Raises ConfigError if there are none."""
        return plugin_named(self.deepspeed_plugins, name)

    def select_deepspeed_plugin(self, name: str | None = None) -> None:
        """Put the ZeRO settings of this name in force for what is prepared from now on. Raises ConfigError without them."""
        select_plugin(self.deepspeed_plugins, name)

    def __repr__(self) -> str:
        return super().__repr__() + f"\nMixed precision type: {self.mixed_precision}\n"

    @property
    def mixed_precision(self) -> str:
        """ "no", "fp16" or "bf16"."""
        return self._accelerator.mixed_precision

    @property
    def deepspeed_plugin(self) -> Any:
        """The ZeRO settings in force (`.zero_stage`, ...), or None in a run without them."""
        return self._accelerator.deepspeed_plugin

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.DEEPSPEED if self.deepspeed_plugin is not None else super().distributed_type
