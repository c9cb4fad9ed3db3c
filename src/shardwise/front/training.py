"""An Accelerator's verbs of a training step: where a step ends, backward, clipping."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import PrepareError, ShardwiseError
from ..run.plugins import AutocastKwargs
from ..step.clipping import clip_factor
from ..step.optimizer import ShardedOptimizer
from ..step.plain import PlainOptimizer
from ..zero.guard import explained
from .run import Run

log = logging.getLogger("shardwise")

Steppers = list[tuple[ShardedOptimizer | PlainOptimizer, list[Tensor]]]

# Where a step ends.


def listener(run: Run) -> Callable[[], bool]:
    """What is to be called whenever `sync_gradients` is set: it tells the models of `run`, and does not keep it alive."""
    reference = weakref.ref(run)

    def declared() -> bool:
        """Where a step ends has been said: by a micro-batch of `accumulate`, or by the script. False once the run is gone."""
        alive = reference()
        if alive is None:
            return False
        push_sync(alive)
        for prepared in alive.models:
            prepared.sharded.at_boundary = prepared.sharded.sync_gradients
        return True

    return declared


def push_sync(run: Run) -> None:
    """Tell the prepared models whether the coming backward ends a step."""
    for prepared in run.models:
        ends = run.gradient_state.sync_gradients and not prepared.quiet
        prepared.sharded.sync_gradients = ends or bool(prepared.triggered)


@contextmanager
def accumulate(run: Run, *models: nn.Module) -> Iterator[None]:
    """One micro-batch of `gradient_accumulation_steps`; the last batch of a loader ends a step in any case.

    Inside, optimizer.step(), optimizer.zero_grad() and a prepared scheduler's step() act only where a step ends.
    """
    run.by_script = True
    _count_micro_batch(run)
    yield


def _count_micro_batch(run: Run) -> None:
    state = run.gradient_state
    if state.sync_with_dataloader and state.end_of_dataloader:
        run.step = 0
        state.sync_gradients = True
    else:
        run.step += 1
        state.sync_gradients = run.step % state.num_steps == 0


@contextmanager
def no_sync(run: Run, model: nn.Module) -> Iterator[None]:
    """Backward passes inside only accumulate the gradients of `model`."""
    run.by_script = True
    found = [prepared for prepared in run.models if prepared.model is model]
    for prepared in found:
        prepared.quiet += 1
    push_sync(run)
    try:
        yield
    finally:
        for prepared in found:
            prepared.quiet -= 1
        push_sync(run)


class NoSync:
    """`model.no_sync()` of a prepared model, as DDP has it. That of a copy of the model, or of a file, does nothing."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self._run, self._model = weakref.ref(run), weakref.ref(model)

    def __call__(self) -> AbstractContextManager[Any]:
        run, model = self._run(), self._model()
        return nullcontext() if run is None or model is None else no_sync(run, model)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_no_sync, ()


def _plain_no_sync() -> type[Any]:
    return nullcontext


def give_no_sync(run: Run, model: nn.Module) -> None:
    """Let `model` have `no_sync`, unless its class has a thing of this name."""
    if not hasattr(type(model), "no_sync"):
        vars(model)["no_sync"] = NoSync(run, model)


def take_no_sync(model: nn.Module) -> None:
    if isinstance(vars(model).get("no_sync"), NoSync):
        del vars(model)["no_sync"]


@contextmanager
def trigger_sync_in_backward(run: Run, model: nn.Module) -> Iterator[None]:
    """Backward passes inside end the accumulation of `model`'s gradients, also where `no_sync` or a micro-batch says otherwise.

    A step behind it uses them; on every rank alike. Does nothing for a model that is not prepared.
    """
    found = [prepared for prepared in run.models if prepared.model is model]
    earlier = [prepared.sharded.at_boundary for prepared in found]
    for prepared in found:
        prepared.triggered += 1
        prepared.sharded.at_boundary = None
    push_sync(run)
    try:
        yield
    finally:
        for prepared, said in zip(found, earlier, strict=True):
            prepared.triggered -= 1
            if prepared.sharded.accumulating:  # no backward came
                prepared.sharded.at_boundary = said
        push_sync(run)


@contextmanager
def maybe_context_parallel(
    run: Run, buffers: Any = None, buffer_seq_dims: Any = None, no_restore_buffers: Any = None
) -> Iterator[None]:
    """Does nothing: no sequence is divided over ranks, so each has its buffers whole."""
    yield


def lomo_backward(run: Run, loss: Tensor, learning_rate: float) -> None:
    """Raises ShardwiseError: LOMO updates weights inside of the backward, before their gradients have been averaged."""
    raise ShardwiseError(
        "lomo_backward: LOMO changes weights inside of the backward, where shardwise has not averaged their gradients yet. Use "
        "an optimizer of torch.optim, with zero_stage 2 or 3, or with offload_optimizer_device: cpu, to save memory."
    )


@contextmanager
def join_uneven_inputs(run: Run, joinables: Sequence[Any], even_batches: bool | None = None) -> Iterator[None]:
    """Nothing needs joining while the ranks read equally many batches, as they do by default: then it does nothing.

    Raises ShardwiseError for even_batches=False with more than one rank: a rank without a batch cannot take part in
    the gathers of the others' forward.
    """
    even = run.dataloader_config.even_batches if even_batches is None else even_batches
    if run.ranks.world_size > 1 and not even:
        raise ShardwiseError(
            "join_uneven_inputs: with even_batches=False the ranks read different numbers of batches, "
            "and a rank that has none left cannot take part in the others' gathers. Leave "
            "even_batches on; gather_for_metrics drops the repeated samples."
        )
    yield


# Backward.


def backward(run: Run, /, loss: Tensor, **kwargs: Any) -> None:
    """Backward of the loss divided by the accumulation steps, and scaled in fp16. kwargs go to torch's backward.

    In a script that never says where a step ends (`accumulate`, `no_sync`, `sync_gradients`), each call is one
    micro-batch: so `gradient_accumulation_steps` of a configuration acts in the plainest of loops too.
    """
    steps = run.gradient_state.num_steps
    if not run.by_script and steps > 1:
        _count_micro_batch(run)
    push_sync(run)
    loader = run.gradient_state.active_dataloader
    if loader is not None:
        loader.trains()
    if run.watch is not None:
        run.watch.note_loss(loss)
    share = loss / steps if steps > 1 else loss
    scaled = run.scaler.scale(share)
    for entry in run.optimizers:
        entry.stepper.note_loss(loss)
    with explained():
        scaled.backward(**kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def autocast(run: Run, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
    """Torch's autocast in the run's precision, for computations outside of a prepared model."""
    handler = autocast_handler or run.autocast_handler or AutocastKwargs()
    dtype = run.precision.compute
    if dtype is None or not run.native_amp:
        yield
        return
    with torch.autocast(
        run.ranks.device.type, dtype=dtype, enabled=handler.enabled, cache_enabled=handler.cache_enabled
    ):
        yield


# Clipping.


def _steppers_of(run: Run, parameters: Iterable[Tensor] | Tensor, verb: str) -> Steppers:
    """The optimizers that these parameters belong to, with the parameters of each: the same ones on every rank, in one order.

    No parameters on any rank belong to none: [], and it is said once, for the usual cause is a generator that is used up.

    A rank may hold no element of an optimizer, and then finds no parameter in its groups: the ranks say together which are
    meant. With one optimizer nobody waits for that but such a rank. Parameters that no optimizer steps are clipped beside
    those of any that has their model. Raises PrepareError, on every rank, if there is none.
    """
    items = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    owned = run.ranks.any_of([entry.holds(items) for entry in run.optimizers])
    owners = [entry for entry, meant in zip(run.optimizers, owned, strict=True) if meant]
    owners = owners or [entry for entry in run.optimizers if items and entry.stepper.knows(items)][:1]
    if not owners and not items:
        _say_nothing_is_clipped(run, verb)
        return []
    if not owners:
        raise PrepareError(
            f"{verb}: none of these parameters belongs to a prepared optimizer, or to its model. Prepare the model "
            "and its optimizer, and pass model.parameters()."
        )
    if len(owners) == 1:
        return [(owners[0].stepper, items)]
    # Of a model with several optimizers each takes its own; what none of them has goes to the first that has the model.
    parts: list[list[Tensor]] = [[] for _ in owners]
    for item in items:
        place = next((i for i, entry in enumerate(owners) if entry.holds([item])), None)
        if place is None:
            place = next((i for i, entry in enumerate(owners) if entry.stepper.knows([item])), None)
        if place is not None:
            parts[place].append(item)
    return [(entry.stepper, part) for entry, part in zip(owners, parts, strict=True)]


def _say_nothing_is_clipped(run: Run, verb: str) -> None:
    if verb not in run.told_of_empty and run.ranks.rank == 0:
        log.warning(
            "%s was given no parameters, and clips nothing. A generator or a filter gives its parameters once: if the "
            "optimizer was made from the same one, it is used up. Make a list of it: list(filter(...)).",
            verb,
        )
    run.told_of_empty.add(verb)


def clip_grad_norm_(
    run: Run, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0
) -> Tensor | None:
    """Clip the gradients of this step to a global norm, and give the norm before clipping, over all ranks.

    The parameters may be those of several prepared models and optimizers: then it is one norm over all of them. None, without
    clipping, while gradients are only accumulated: they have no norm yet. Of no parameters the norm is 0, as in torch.
    """
    if not run.gradient_state.sync_gradients:
        return None
    steppers = _steppers_of(run, parameters, "clip_grad_norm_")
    if not steppers:
        return torch.tensor(0.0)
    if len(steppers) == 1:
        stepper, items = steppers[0]
        norm = stepper.clip_norm(items, max_norm, norm_type=norm_type)
    else:
        norm = _clip_together(run, steppers, max_norm, norm_type)
    if run.watch is not None:
        run.watch.note_norm(norm)
    return norm


def _clip_together(run: Run, steppers: Steppers, max_norm: float, norm_type: float) -> Tensor:
    """Clip the gradients of several optimizers to one norm, which it gives."""
    order = float(norm_type)
    norms = []
    for stepper, items in steppers:
        if isinstance(stepper, ShardedOptimizer):
            stepper.verdicts.note_clipping(max_norm=float(max_norm), norm_type=order)
        norms.append(stepper.held.norm(items, order).to(run.ranks.device))
    every = torch.stack([norm.to(max(norms, key=lambda one: one.dtype.itemsize).dtype) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(every, order)
    factor = clip_factor(total, float(max_norm))
    for stepper, items in steppers:
        stepper.held.multiply(items, factor)
    return total


def clip_grad_value_(run: Run, parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Clip each element of this step's gradients to [-clip_value, clip_value]; nothing while accumulating."""
    if run.gradient_state.sync_gradients:
        for stepper, items in _steppers_of(run, parameters, "clip_grad_value_"):
            stepper.clip_value(items, clip_value)


def unscale_gradients(run: Run, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
    """Take the loss scale off the gradients of these optimizers (None: of all), for scripts that look at `p.grad`.

    Clipping and steps undo it by themselves. Raises PrepareError for an optimizer that is not prepared.
    """
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    prepared = {id(entry.optimizer): entry.stepper for entry in run.optimizers}
    steppers = [prepared.get(id(item)) for item in given] if given else list(prepared.values())
    if None in steppers:
        raise PrepareError("unscale_gradients: this optimizer is not prepared.")
    for stepper in steppers:
        if stepper is not None:
            stepper.unscale()
