"""How random programs go forward and backward. A kind takes (script, this rank's batch, backward of a loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rig.scripts import Kind, Script

KINDS: dict[str, Kind] = {}


def kind(function: Kind) -> Kind:
    KINDS[function.__name__] = function
    return function


@dataclass
class Outcome:
    loss: Tensor


def loss_of(script: Script, x: Tensor) -> Tensor:
    if script.setting.model == "lora":
        return script.model(input_ids=x, labels=x).loss
    return script.model(x).square().mean()


@kind
def plain(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    loss = loss_of(script, x)
    script.see("loss", loss)
    backward(loss)


@kind
def retained(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    loss = loss_of(script, x)
    backward(loss, retain_graph=True)
    backward(loss * 0.5)


@kind
def skipped(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """A batch that the script looks at, and drops."""
    loss_of(script, x)


@kind
def two_forwards(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    half = len(x) // 2
    backward(loss_of(script, x[:half]) + 0.5 * loss_of(script, x[half:]))


@kind
def two_losses(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """Two losses of one output, each with a backward."""
    if script.setting.model == "lora":
        out = script.model(input_ids=x).logits
    else:
        out = script.model(x)
    backward(out.square().mean(), retain_graph=True)
    backward(out.abs().mean())


@kind
def in_an_object(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    outcome = Outcome(loss_of(script, x))
    backward(outcome.loss)


@kind
def caught(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """What a hook of the script caught of a block is part of the loss."""
    found: list[Tensor] = []
    name = "blocks.1" if script.setting.model != "lora" else "base_model.model.model.layers.0.mlp"
    handle = script.model.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out))
    try:
        loss = loss_of(script, x)
    finally:
        handle.remove()
    backward(loss + 0.1 * found[0].square().mean())


@kind
def caught_alone(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """The loss is what a hook caught inside of a block; what the model returned is not used."""
    found: list[Tensor] = []
    name = "blocks.1.up" if script.setting.model != "lora" else "base_model.model.model.layers.0.mlp.up_proj"
    handle = script.model.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(out))
    try:
        loss_of(script, x)
    finally:
        handle.remove()
    backward(found[0].square().mean())


@kind
def penalised(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """A penalty on the gradient of the input: a backward of a backward."""
    if script.setting.model != "tower":
        return plain(script, x, backward)
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(script.model(x).square().sum(), x, create_graph=True)
    return backward((gradient.norm(dim=1) - 1).square().mean() + loss_of(script, x.detach()))


@kind
def regularised(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """A penalty on weights that are read in `gathered`, whose backward comes behind it."""
    loss = loss_of(script, x)
    with script.reading():
        penalty = sum(p.square().sum() for _, p in script.chosen("") if p.requires_grad)
    backward(loss + 0.01 * penalty)


@kind
def input_gradients(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """Gradients of the input alone, as for saliency; then a training backward."""
    if script.setting.model == "lora" or not any(p.requires_grad for p in script.model.parameters()):
        return plain(script, x, backward)
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(script, x), x)
    script.see("gradient of the input", gradient)
    return backward(loss_of(script, x.detach()))


class Stopped(BaseException):
    """As Ctrl-C: no code that means errors catches it."""


def _stop(*_: Any) -> None:
    raise Stopped


@kind
def interrupted(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """Ctrl-C in the forward; the cell is run again."""
    name = "blocks.1.up" if script.setting.model != "lora" else "base_model.model.model.layers.0.mlp.up_proj"
    handle = script.model.get_submodule(name).register_forward_pre_hook(_stop)
    try:
        loss_of(script, x)
    except Stopped:
        pass
    finally:
        handle.remove()
    plain(script, x, backward)


@kind
def interrupted_backward(script: Script, x: Tensor, backward: Callable[..., None]) -> None:
    """Ctrl-C in the backward; the script goes on with what that had brought."""
    part = "blocks.1.up.weight" if script.setting.model != "lora" else "layers.0.self_attn.q_proj.lora_B"
    trained = [p for _, p in script.chosen(part) if p.requires_grad]
    loss = loss_of(script, x)
    handles = [parameter.register_hook(_stop) for parameter in trained]
    try:
        backward(loss)
    except Stopped:
        pass
    finally:
        for handle in handles:
            handle.remove()
