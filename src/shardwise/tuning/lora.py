"""PEFT's LoRA linears with fewer passes over the activations: y = x W' + s (x A') B' as one autograd function.

For n tokens, PEFT's plain LoRA on a frozen linear makes, besides the products themselves,

    forward     s * (..) and base + (..)            2 passes over (n, out), two temporaries
    backward    s * dy, and dx + dx of the adapter  1 pass over (n, out), 1 over (n, in), two temporaries

and rounds each to the compute dtype. Here the small product is added into the large one by the GEMM itself, with s as its
factor, in both directions:

    y  = x W' + b;    h = x A';         y += s h B'
    dx = dy W;        g = s dy B;       dx += g A;      dA = g' x;      dB = s dy' h

What is saved is what PEFT's own graph saves: x, h and the weights as they are, none of them copied, so that a weight that is
released in between is read again when it is back.

A linear takes this path in a forward where it is plain LoRA on a plain, frozen linear: one active adapter that is not merged,
without dropout, bias or a variant such as DoRA, all of one dtype. Any other forward is PEFT's own, module by module and call
by call; so merging, disabling and switching adapters work as they do there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .blocks import ReplacedForwards, forward_of


class FastLora(ReplacedForwards):
    """The plain LoRA linears of a PEFT model on their fast path, until `undo`. `count`: how many may take it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count = 0
        for module in lora_linears(model):
            self.replace(module, _dispatch(forward_of(module)))
            self.count += 1


def lora_linears(model: nn.Module) -> list[nn.Module]:
    """PEFT's LoRA layers over plain linears; none where the script has not imported PEFT."""
    layers: Any = sys.modules.get("peft.tuners.lora.layer")
    if layers is None:
        return []
    found: list[Any] = [module for module in model.modules() if type(module) is layers.Linear]
    # Where somebody has replaced a forward, theirs is what is wanted.
    return [m for m in found if type(m.base_layer) is nn.Linear and "forward" not in vars(m)]


def _dispatch(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (args or kwargs):
            weights = _weights(module, x)
            if weights is not None:
                return _LoraLinear.apply(x, *weights)  # type: ignore[no-untyped-call]
        return plain(module, x, *args, **kwargs)

    return forward


def _weights(module: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
    """(W, bias, A, B, s) of the one active adapter, or None where this forward is not plain LoRA in one dtype."""
    if module.disable_adapters or module.merged or module.fan_in_fan_out:
        return None
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.lora_A:
        return None
    name = active[0]
    base, a, b = module.base_layer, module.lora_A[name], module.lora_B[name]
    dropout, scaling = module.lora_dropout[name], module.scaling[name]
    if name in getattr(module, "lora_variant", ()) or module.use_dora.get(name) or not isinstance(scaling, float | int):
        return None
    if not (isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and dropout.p == 0)):
        return None
    if not (_is_bare(base) and _is_bare(a) and _is_bare(b)) or b.bias is not None:
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if not weight.dtype == a.weight.dtype == b.weight.dtype == x.dtype or (bias is not None and bias.dtype != x.dtype):
        return None
    # A compiler does better: it sees the passes and fuses them.
    if torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
        return None
    return weight, bias, a.weight, b.weight, scaling


def _is_bare(linear: Any) -> bool:
    """Whether calling it is its product and nothing else: a plain linear that nothing listens to."""
    return type(linear) is nn.Linear and not (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
    )


class _LoraLinear(torch.autograd.Function):
    """x: (..., in). weight: (out, in), frozen. a: (r, in). b: (out, r). Gives (..., out) in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        low = F.linear(x, a)
        y.view(-1, y.shape[-1]).addmm_(low.view(-1, low.shape[-1]), b.t(), alpha=scaling)
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        # As autograd would: each only where some gradient is made of it.
        ctx.save_for_backward(
            x if needs_a else None,
            weight if needs_x else None,
            a if needs_x else None,
            b if needs_x or needs_a else None,
            low if needs_b else None,
        )
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = da = db = None
        if needs_b:
            db = _scaled_product(rows.t(), low.view(-1, low.shape[-1]), ctx.scaling)
        if needs_x or needs_a:
            g = _scaled_product(rows, b, ctx.scaling)
            if needs_a:
                da = g.t() @ x.reshape(-1, x.shape[-1])
            if needs_x:
                dx = (rows @ weight).addmm_(g, a).view(*dy.shape[:-1], weight.shape[-1])
        return dx, None, None, da, db, None


def _scaled_product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left @ right in one kernel; with beta 0 what is in the memory is not read."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)
