"""What `initialize` returns as the optimizer: the torch optimizer that steps on shards, under DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...plan.precision import LossScaler
from ...step.optimizer import ShardedOptimizer
from .backwards import Backwards


class OffloadedModule:
    """A model's parameters, with the ones that it reads of other modules, of which DeepSpeed keeps a list: here none."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        return self._model.named_parameters(recurse=recurse)

    def ds_external_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return []


class ParameterOffload:
    """module: the model's parameters. The lists of hooks are empty."""

    def __init__(self, model: nn.Module) -> None:
        self.module = OffloadedModule(model)
        self.forward_hooks: list[Any] = []
        self.backward_hooks: list[Any] = []

    def _register_deepspeed_module(self, module: OffloadedModule) -> None:
        pass


class LossScale:
    """`optimizer.loss_scaler`: the loss scale of an optimizer, for reading, under DeepSpeed's names."""

    def __init__(self, scaler: LossScaler, stepper: ShardedOptimizer) -> None:
        self._scaler = scaler
        self._stepper = stepper

    @property
    def cur_scale(self) -> float:
        """What the next loss is multiplied by."""
        return self._scaler.coming

    loss_scale = cur_scale

    @property
    def cur_iter(self) -> int:
        """Steps until now, skipped ones too."""
        return self._stepper.steps

    @property
    def dynamic(self) -> bool:
        return self._scaler.enabled and self._scaler.dynamic

    dynamic_loss_scale = dynamic

    @property
    def scale_window(self) -> int:
        """Steps without an overflow after which the scale rises."""
        return self._scaler.growth_interval

    @property
    def scale_factor(self) -> float:
        return self._scaler.growth_factor

    @property
    def min_scale(self) -> float:
        return self._scaler.min_scale


class ZeroOptimizer(Optimizer):
    """A view of `optimizer`: its groups are the live ones, and what is unknown here is asked of it.

    optimizer: the torch optimizer, which `stepper` drives. backwards: what those of its losses count.
    """

    def __init__(
        self, optimizer: Optimizer, stepper: ShardedOptimizer, scaler: LossScaler, backwards: Backwards
    ) -> None:
        # Not torch's constructor: the groups are those of `optimizer`.
        self.optimizer = optimizer
        self.stepper = stepper
        self.scaler = scaler
        self.backwards = backwards

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def single_partition_of_fp32_groups(self) -> list[Tensor]:
        """This rank's masters, flat, a copy for each group; DeepSpeed's name of them below stage 3."""
        return [
            torch.cat([torch.empty(0), *(p.detach().cpu().reshape(-1) for p in group["params"])])
            for group in self.param_groups
        ]

    @property
    def fp32_partitioned_groups_flat(self) -> list[Tensor]:
        """The same under its name at stage 3."""
        return self.single_partition_of_fp32_groups

    @property
    def overflow(self) -> bool:
        """Whether the last step was skipped because fp16 gradients overflowed."""
        return self.stepper.step_was_skipped

    @property
    def loss_scaler(self) -> LossScale:
        return LossScale(self.scaler, self.stepper)

    loss_scale_config = loss_scaler  # where DeepSpeed trains without ZeRO

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by: after a step the scale that it has led to."""
        return self.scaler.coming

    @property
    def cur_scale(self) -> float:
        return self.scaler.coming

    @property
    def dynamic_loss_scale(self) -> bool:
        return self.scaler.enabled and self.scaler.dynamic

    def needs_scaler(self) -> bool:
        """Whether a loss must go through `scale` before its backward: in fp16."""
        return self.scaler.enabled

    @property
    def parameter_offload(self) -> ParameterOffload:
        """Where TRL takes DeepSpeed's hooks off a model before it generates. There are none: the engine's own know of it."""
        return ParameterOffload(self.stepper.models[0].model)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the shards, clipped as the engine clips."""
        return self.stepper.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also of the micro-batches that are still to be stepped."""
        for model in self.stepper.models:
            model.sync_gradients = True  # else they are being accumulated, and the stepper keeps them
        self.stepper.zero_grad(set_to_none)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of the loss times the loss scale."""
        self.stepper.note_loss(loss)
        scaled = self.backwards.scaled(self.scaler.scale(loss))
        scaled.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The whole dictionary that plain torch would give. Collective."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def __repr__(self) -> str:
        return f"ZeroOptimizer of shardwise over {self.optimizer!r}"

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "stepper", "scaler", "backwards"):  # not made yet
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.optimizer.state, "param_groups": self.optimizer.param_groups}


class DeepSpeedZeroOptimizer(ZeroOptimizer):
    """What programs ask isinstance of at stages 1 and 2."""


class DeepSpeedZeroOptimizer_Stage3(ZeroOptimizer):  # noqa: N801 - DeepSpeed's name
    """The same at stage 3."""


def optimizer_class(stage: int) -> type[ZeroOptimizer]:
    """The class of the optimizer at a stage."""
    if stage == 3:
        return DeepSpeedZeroOptimizer_Stage3
    return DeepSpeedZeroOptimizer if stage else ZeroOptimizer
