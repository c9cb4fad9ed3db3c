"""The engine that `initialize` returns: one model, its optimizer and schedule, under DeepSpeed's verbs.

    engine(batch) ........... the model's own forward
    engine.backward(loss) ... its gradients, divided by the micro-batches of a step
    engine.step() ........... at the boundary: clip, step, drop gradients, next learning rate; before it, nothing but a count

A boundary is every `gradient_accumulation_steps`-th backward, or what `set_gradient_accumulation_boundary` says from then on.
Attributes that the engine lacks are the model's.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PrepareError
from ...front.entering import PreparedModel
from ...run.joined import join_run
from ...tuning.compiling import CompiledBlocks
from ...zero.guard import explained
from .boundaries import Boundaries
from .checkpoints import load, save
from .gathering import forget_marks, mark
from .optimizer import ZeroOptimizer
from .settings import Settings
from .whole_model import compiled, consolidated, save_16bit

# id(model) -> the engine that holds it.
_engines: weakref.WeakValueDictionary[int, DeepSpeedEngine] = weakref.WeakValueDictionary()


def former_engine(model: nn.Module) -> DeepSpeedEngine | None:
    """The engine that `model`, a part of it or a model around it is in, or None."""
    for engine in list(_engines.values()):
        held = engine.module
        if held is model or any(m is model for m in held.modules()) or any(m is held for m in model.modules()):
            return engine
    return None


_DESTROYED = (
    "this DeepSpeed engine has been destroyed and cannot train. Call deepspeed.initialize again. If this is Trainer.train() "
    "after an evaluate(), predict() or train() of the same Trainer: Trainer has kept the engine that accelerate destroyed, as "
    "it does with DeepSpeed. Set trainer.model_wrapped = trainer.model before train(), or make a new Trainer."
)
_NOT_ANSWERED = (
    "the DeepSpeed engine of shardwise has no {!r}, and neither has the model in it. docs/design/deepspeed.md lists what is "
    "answered."
)


class DeepSpeedEngine(nn.Module):
    """See above. Made by `initialize`.

    module: the model. optimizer: a ZeroOptimizer, or None. lr_scheduler: the schedule that `step` steps, or None.
    config: the DeepSpeed configuration.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        optimizer: ZeroOptimizer | None,
        lr_scheduler: Any,
        settings: Settings,
        training_dataloader: Any = None,
    ) -> None:
        super().__init__()
        self.module = prepared.model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader = training_dataloader
        self.settings = settings
        self.config = settings.raw
        self.global_steps = 0
        self.micro_steps = 0
        self.skipped_steps = 0
        self.loaded_checkpoint_tag: str | None = None
        self._prepared: PreparedModel | None = prepared
        self._boundaries = Boundaries(settings)
        self._applied = False
        self.training = prepared.model.training
        self._compiled: list[CompiledBlocks] = []
        mark(prepared.sharded)
        _engines[id(prepared.model)] = self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(_NOT_ANSWERED.format(name)) from None
            return getattr(module, name)

    # The pass.

    @property
    def prepared(self) -> PreparedModel:
        """The model in shardwise. Raises PrepareError after `destroy`."""
        if self._prepared is None:
            raise PrepareError(_DESTROYED)
        return self._prepared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._prepared is not None:
            self._announce()
        elif self.training and torch.is_grad_enabled():
            raise PrepareError(_DESTROYED)
        outputs = self.module(*args, **kwargs)
        if self.optimizer is not None:
            self.optimizer.backwards.watch(outputs)
        return outputs

    def _announce(self) -> None:
        """Tell the model whether a step ends here; `step` does too, where the script has left a backward out."""
        self._boundaries.tell(self.prepared.sharded, self.micro_steps)

    def backward(
        self,
        loss: Tensor,
        allreduce_gradients: bool = True,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """The gradients of a scalar loss, divided by the accumulation steps unless scale_wrt_gas is False. Gives the loss."""
        if kwargs or not allreduce_gradients:
            raise NotImplementedError(
                f"engine.backward: {next(iter(kwargs), 'allreduce_gradients=False')} is not taken: use no_sync for "
                "backwards that are not reduced."
            )
        if self.optimizer is None:
            raise PrepareError("engine.backward: this engine has no optimizer: it was made to evaluate.")
        share = loss / self.settings.steps if scale_wrt_gas and self.settings.steps > 1 else loss
        self._announce()
        with explained(), self.optimizer.backwards.divided_already():
            self.optimizer.backward(share, retain_graph=retain_graph)
        return share

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for a script that calls `loss.backward()` itself."""
        if self.optimizer is None:
            raise PrepareError("engine.scale: this engine has no optimizer: it was made to evaluate.")
        self._announce()
        self.optimizer.stepper.note_loss(loss)
        return self.optimizer.backwards.scaled(self.optimizer.scaler.scale(loss))

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """At a boundary a step; before it a count of the micro-batch. Collective.

        lr_kwargs: keywords of the schedule's step.
        """
        if self.optimizer is None:
            raise PrepareError("engine.step: this engine has no optimizer: it was made to evaluate.")
        if self._boundaries.quiet:
            raise PrepareError(
                "engine.step was called inside of no_sync, where gradients are not reduced. Step behind it."
            )
        self._applied = False
        if self._boundaries.may_step(self.micro_steps):
            stepper = self.optimizer.stepper
            self._announce()
            stepper.step()
            stepper.zero_grad()
            self.global_steps += 1
            self._applied = not stepper.step_was_skipped
            if stepper.step_was_skipped:
                self.skipped_steps += 1
            elif self.lr_scheduler is not None:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        self.micro_steps += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch that is at work ends a step; False where the script does not have them counted."""
        return self._boundaries.ends_step(self.micro_steps)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """From now on, whether micro-batches end a step, in place of counting them."""
        self._boundaries.said = is_boundary
        self._announce()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only accumulate on this rank. Raises ConfigError where gradients are sharded, as DeepSpeed does."""
        yield from self._boundaries.no_sync(self._announce)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also of the micro-batches that are still to be stepped."""
        if self.optimizer is not None and self._prepared is not None:
            self.optimizer.zero_grad(set_to_none)

    def get_global_grad_norm(self) -> Tensor | None:
        """The gradients' global norm at the last step, before it clipped them, a scalar; None before the first."""
        return None if self.optimizer is None else self.optimizer.stepper.norm

    def compile(
        self, backend: str = "inductor", compile_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Compile the blocks of the model with torch.compile, one by one: their gathers stay outside of the graphs."""
        if not self._compiled:
            self._compiled += compiled(self.prepared, backend, {**(compile_kwargs or {}), **options})

    def empty_partition_cache(self) -> None:
        """Nothing to do: between two passes no weight stays gathered."""

    @property
    def is_compiled(self) -> bool:
        return bool(self._compiled)

    def destroy(self) -> None:
        """Give the model its whole weights back, in place. Nothing of this engine works afterwards. Collective."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        for blocks in self._compiled:
            blocks.undo()
        forget_marks(prepared.sharded)
        if not prepared.sharded.released:
            prepared.release()
        _engines.pop(id(prepared.model), None)
        gc.collect()

    # Facts.

    @property
    def device(self) -> torch.device:
        return join_run().device

    @property
    def local_rank(self) -> int:
        return join_run().local_rank

    @property
    def global_rank(self) -> int:
        return join_run().rank

    @property
    def world_size(self) -> int:
        return join_run().world_size

    @property
    def global_samples(self) -> int:
        """The samples of all ranks that steps have used; where the script counts its micro-batches, those of its backwards."""
        if self.settings.managed or self.optimizer is None:
            return self.global_steps * (self.settings.batch[0] or 0)
        return self.optimizer.backwards.count * (self.settings.batch[1] or 0) * self.world_size

    @property
    def basic_optimizer(self) -> Any:
        return None if self.optimizer is None else self.optimizer.optimizer

    def train_batch_size(self) -> int | None:
        return self.settings.batch[0]

    def train_micro_batch_size_per_gpu(self) -> int | None:
        return self.settings.batch[1]

    def gradient_accumulation_steps(self) -> int:
        return self.settings.steps

    def managed_gradient_accumulation(self) -> bool:
        return self.settings.managed

    def zero_optimization(self) -> bool:
        return self.settings.stage > 0

    def zero_optimization_stage(self) -> int:
        return self.settings.stage

    def zero_optimization_partition_weights(self) -> bool:
        return self.settings.stage == 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self.settings.gathers_on_save

    def gradient_clipping(self) -> float:
        return self.settings.clipping

    def bfloat16_enabled(self) -> bool:
        return self.settings.compute is torch.bfloat16

    def fp16_enabled(self) -> bool:
        return self.settings.compute is torch.float16

    def dynamic_loss_scale(self) -> bool:
        return self.optimizer is not None and self.optimizer.dynamic_loss_scale

    @property
    def loss_scale(self) -> float:
        return 1.0 if self.optimizer is None else self.optimizer.loss_scale

    def was_step_applied(self) -> bool:
        """Whether the last call of `step` was a step: not one before the boundary, nor skipped for an overflow."""
        return self._applied

    def get_lr(self) -> list[float]:
        return [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group["betas"] if "betas" in group else group.get("momentum") for group in groups]

    # Whole weights.

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any] | None:
        """The whole state dict in the precision that the model computes in, on rank 0's CPU; None elsewhere. Collective."""
        return consolidated(self.prepared.sharded, self.settings.compute, trained_only=exclude_frozen_parameters)

    def module_state_dict(
        self, destination: Any = None, prefix: str = "", keep_vars: bool = False, **options: Any
    ) -> Any:
        """The whole state dict of the model, on the CPU of rank 0; an empty one elsewhere. Collective."""
        return self.prepared.sharded.state_dict()

    def save_16bit_model(self, save_dir: str, save_filename: str = "pytorch_model.bin", **options: Any) -> bool:
        """Write the weights in 16 bits as a file of torch. Collective; False at stage 3 without the key that allows it."""
        if self.settings.stage == 3 and not self.settings.gathers_on_save:
            return False
        save_16bit(self.prepared.sharded, self.settings.compute, Path(save_dir) / save_filename)
        return True

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save the run as `save_dir/tag`; see checkpoints.py. Collective."""
        return save(self, save_dir, tag, dict(client_state or {}), save_latest, exclude_frozen_parameters)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """(the path that was loaded, the client's state); (None, None) where there is none. Collective.

        load_module_strict: False passes over weights that only one of the two has. load_module_only: nothing but the weights.
        """
        if custom_load_fn is not None:
            raise NotImplementedError("load_checkpoint: custom_load_fn is not taken; checkpoints are shardwise's own.")
        wanted = {"optimizer": load_optimizer_states, "scheduler": load_lr_scheduler_states, "counts": True}
        beside = dict.fromkeys(wanted, False) if load_module_only else wanted
        return load(self, load_dir, tag, strict=load_module_strict, **beside)
