"""The verbs of random programs: what scripts do to a model, its gradients, its optimizers and their files.

Each takes a Script and plain arguments, and is written as a script would have it, without asking what it runs under.
A verb that has nothing to act on, as one on gradients that are not there, does nothing: so verbs may be left out of a program.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rig.kinds import KINDS, loss_of
from rig.scripts import Script

Verb = Callable[..., None]
VERBS: dict[str, Verb] = {}


def verb(function: Verb) -> Verb:
    VERBS[function.__name__.rstrip("_")] = function
    return function


# What is trained.


@verb
def freeze(script: Script, part: str) -> None:
    for _, parameter in script.chosen(part):
        parameter.requires_grad_(False)


@verb
def thaw(script: Script, part: str) -> None:
    for _, parameter in script.chosen(part):
        parameter.requires_grad_(True)


@verb
def set_adapter(script: Script, name: str) -> None:
    script.model.set_adapter(name)


@verb
def add_group(script: Script, number: int, part: str, rate: float) -> None:
    script.add_group(number, part, rate)


# Forward and backward.


@verb
def backward(script: Script, number: int, name: str, quiet: bool = False) -> None:
    script.backward(KINDS[name], number, quiet=quiet)


@verb
def forward_only(script: Script, number: int) -> None:
    """A forward that records a graph which nobody uses."""
    script.see("unused output", _of_a_forward(script, number))


def _of_a_forward(script: Script, number: int) -> Tensor:
    with torch.enable_grad():
        return loss_of(script, script.setting.batch(number)[:2])


@verb
def evaluate(script: Script, number: int, inference: bool = False) -> None:
    script.model.eval()
    with torch.inference_mode() if inference else contextlib.nullcontext():
        script.see("output", script.forward(number).clone())
    script.model.train()


@verb
def evaluate_without_adapter(script: Script, number: int) -> None:
    if script.setting.model == "lora":
        with script.model.disable_adapter():
            script.see("output", script.forward(number))


@verb
def generate(script: Script, number: int) -> None:
    if script.setting.model == "lora":
        script.model.eval()
        with torch.no_grad():
            script.see("tokens", script.generate(number))
        script.model.train()


# Gradients.


def with_gradient(script: Script, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in script.chosen(part):
        if parameter.grad is not None:
            yield name, parameter


def _is_own_sum(script: Script) -> bool:
    """Whether ranks may see sums of their own: while micro-batches are accumulated at stages 0 and 1."""
    return not script.synced


READS: dict[str, Callable[[Script, nn.Parameter], Any]] = {
    "norm": lambda script, p: p.grad.norm(),
    "sum": lambda script, p: p.grad.sum(),
    "largest": lambda script, p: p.grad.abs().max(),
    "clone": lambda script, p: p.grad.clone(),
    "gradient": lambda script, p: script.gradient(p),
    "part": lambda script, p: script.whole_of_parts(script.part_of_gradient(p)),
    "norm of a list": lambda script, p: torch.stack(torch._foreach_norm([p.grad, p.grad])),
    "detach": lambda script, p: p.grad.detach() * 1,
    "indexed": lambda script, p: p.grad.reshape(-1)[0],
}


@verb
def read(script: Script, part: str, how: str) -> None:
    for name, parameter in script.chosen(part):
        script.see(f"{name} has a gradient", parameter.grad is not None)
    for name, parameter in with_gradient(script, part):
        value = READS[how](script, parameter)
        if not _is_own_sum(script):
            script.see(f"{how} of the gradient of {name}", value)


CHANGES: dict[str, Callable[[Script, nn.Parameter, float], Any]] = {
    "mul_": lambda script, p, factor: p.grad.mul_(factor),
    "div_": lambda script, p, factor: p.grad.div_(1 / factor),
    "through data": lambda script, p, factor: p.grad.data.mul_(factor),
    "gradient": lambda script, p, factor: script.gradient(p).mul_(factor),
    "part": lambda script, p, factor: script.part_of_gradient(p).mul_(factor),
    "half": lambda script, p, factor: p.grad.view(-1)[::2].mul_(factor),
    "zero the first": lambda script, p, factor: p.grad.view(-1)[:1].zero_(),
    "zero": lambda script, p, factor: p.grad.zero_(),
    "copy": lambda script, p, factor: p.grad.copy_(p.grad * factor),
    "assign itself": lambda script, p, factor: setattr(p, "grad", p.grad),
    "assign a copy": lambda script, p, factor: setattr(p, "grad", p.grad.clone() * factor),
    "operator": lambda script, p, factor: _by_operator(p, factor),
}


def _by_operator(parameter: nn.Parameter, factor: float) -> None:
    parameter.grad *= factor  # type: ignore[operator]


@verb
def change(script: Script, part: str, how: str, factor: float) -> None:
    for _, parameter in with_gradient(script, part):
        CHANGES[how](script, parameter, factor)


@verb
def scale_by_a_list(script: Script, part: str, factor: float) -> None:
    found = [p.grad for _, p in with_gradient(script, part)]
    if found:
        torch._foreach_mul_(found, factor)


@verb
def give(script: Script, part: str, value: float) -> None:
    """A gradient of the script's own."""
    for _, parameter in script.chosen(part):
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value) if script.setting.stage < 3 else _full(parameter, value)


def _full(parameter: nn.Parameter, value: float) -> Tensor:
    return torch.full(parameter.shape, value, dtype=parameter.dtype)


@verb
def add_noise(script: Script, part: str, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for _, parameter in with_gradient(script, part):
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter.dtype)
        if script.synced:
            parameter.grad.add_(noise, alpha=0.01)  # type: ignore[union-attr]


@verb
def drop(script: Script, part: str) -> None:
    for _, parameter in script.chosen(part):
        parameter.grad = None


@verb
def zero_model(script: Script, set_to_none: bool) -> None:
    script.model.zero_grad(set_to_none=set_to_none)


@verb
def zero(script: Script, number: int, set_to_none: bool = True) -> None:
    script.zero_grad(number, set_to_none)


@verb
def clip(script: Script, part: str, how: str, largest: float) -> None:
    """By the Accelerator: all that were chosen, or those of each optimizer where there are two."""
    named = script.chosen(part)
    for others in script.known[::-1] if len(script.known) > 1 else [set()]:
        found = [p for n, p in named if n not in others]
        ended = script.synced or script.setting.accumulate > 1  # nobody clips what is summed up in `no_sync`
        # torch's clipping of values fails where there is no gradient.
        if ended and found and (how != "value" or any(p.grad is not None for p in found)):
            script.clip(found, how, largest)


@verb
def clip_by_torch(script: Script, part: str, how: str, largest: float) -> None:
    found = [p for _, p in script.chosen(part)]
    if not script.synced or (how == "value" and all(p.grad is None for p in found)):
        return
    if how == "value":
        nn.utils.clip_grad_value_(found, largest)
    else:
        script.see("norm", nn.utils.clip_grad_norm_(found, largest, norm_type=float(how)))


# Weights.


WRITES: dict[str, Callable[[nn.Parameter, float], Any]] = {
    "mul_": lambda p, factor: p.mul_(factor),
    "data": lambda p, factor: p.data.mul_(factor),
    "assign data": lambda p, factor: setattr(p, "data", p.data * factor),
    "copy_": lambda p, factor: p.copy_(p * factor),
    "a view": lambda p, factor: p.view(-1)[:3].mul_(factor),
    "clamp": lambda p, factor: p.clamp_(-0.3 * factor, 0.3 * factor),
    "normalise": lambda p, factor: p.div_(p.norm() + 1).mul_(factor),
    "data, a part": lambda p, factor: p.data.view(-1)[::2].fill_(0.1 * factor),
}


@verb
def write(script: Script, part: str, how: str, factor: float, modify: bool = False) -> None:
    with script.writing(modify), torch.no_grad():
        for _, parameter in script.chosen(part):
            WRITES[how](parameter, factor + script.rank if modify else factor)


@verb
def load_weights(script: Script, seed: int) -> None:
    """`load_state_dict` of what the model has, a little changed."""
    source = torch.Generator().manual_seed(seed)
    with script.writing(False):
        state = script.model.state_dict()
        noise = {n: torch.randn(v.shape, generator=source, dtype=torch.float64).to(v.dtype) for n, v in state.items()}
        script.model.load_state_dict({n: 0.9 * v + 0.01 * noise[n] for n, v in state.items()})


@verb
def average(script: Script) -> None:
    """An exponential average of the weights."""
    with script.reading(), torch.no_grad():
        for name, parameter in script.chosen(""):
            before = script.averages.get(name, torch.zeros_like(parameter))
            script.averages[name] = before.lerp(parameter, 0.3).clone()


@verb
def evaluate_average(script: Script, number: int) -> None:
    """The average is swapped in, evaluated, and swapped out again."""
    if not script.averages:
        return
    with script.writing(False), torch.no_grad():
        own = {name: parameter.clone() for name, parameter in script.chosen("")}
        for name, parameter in script.chosen(""):
            parameter.copy_(script.averages[name])
    script.see("output", script.forward(number))
    with script.writing(False), torch.no_grad():
        for name, parameter in script.chosen(""):
            parameter.copy_(own[name])


@verb
def look(script: Script, part: str) -> None:
    with script.reading(), torch.no_grad():
        for name, parameter in script.chosen(part):
            script.see(f"norm of {name}", parameter.norm())


@verb
def step(script: Script, number: int = 0) -> None:
    script.step(number)


@verb
def set_rate(script: Script, number: int, factor: float) -> None:
    for group in script.optimizer(number).param_groups:
        group["lr"] *= factor


@verb
def schedule(script: Script) -> None:
    script.schedule()
    script.see("rates", [group["lr"] for optimizer in script.optimizers for group in optimizer.param_groups])


# Files and dictionaries.


@verb
def save(script: Script, name: str, include_frozen: bool) -> None:
    script.save(name, include_frozen)


@verb
def load(script: Script, name: str, new: bool) -> None:
    script.load(name, new)


@verb
def keep_states(script: Script, number: int) -> None:
    number %= len(script.optimizers)
    state = script.optimizers[number].state_dict()
    script.kept[f"states {number}"] = {
        "state": {
            k: {n: v.clone() if isinstance(v, Tensor) else v for n, v in s.items()} for k, s in state["state"].items()
        },
        "param_groups": [dict(group) for group in state["param_groups"]],
    }


@verb
def restore_states(script: Script, number: int) -> None:
    number %= len(script.optimizers)
    kept = script.kept.get(f"states {number}")
    groups = script.optimizers[number].param_groups
    if kept is not None and len(kept["param_groups"]) == len(groups):
        # torch takes the tensors of a dictionary themselves, so that steps write into it; shardwise copies them.
        script.optimizers[number].load_state_dict(copy.deepcopy(kept))
