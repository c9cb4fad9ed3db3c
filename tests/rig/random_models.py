"""Random module trees for zero_stage 3: what modules return, which way a forward takes, what hooks and transforms do to it.

A model is made of tokens, plain tuples in one flat list, any of which may be left out:

    ("dense", 7, True)       a piece: a module of its own, which maps (batch, WIDTH) to itself
    ("packed", "dict")       what is said of the piece before it: its output comes in a dict
    ("checkpoint", False)    and it is recomputed in the backward
    ("root", "dataclass")    what is said of the model, wherever it stands
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from rig.packing import PACKED, opened

WIDTH = 5
Token = tuple[Any, ...]
Run = Callable[[Tensor], Tensor]


@dataclass
class Where:
    """One forward: its step and rank, and losses that pieces leave beside their output."""

    step: int
    rank: int
    aside: list[Tensor] = field(default_factory=list)


# The cores of pieces. All map (batch, WIDTH) to the same shape, of x's dtype.


class Dense(nn.Module):
    def __init__(self, inner: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, inner, bias)
        self.down = nn.Linear(inner, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Scalars(nn.Module):
    """Parameters of 0 dimensions, of one element and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.shift = nn.Parameter(torch.full((1,), 0.1))
        self.matrix = nn.Parameter(torch.full((1, 1), 1.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift * self.matrix.reshape(())


class Empty(nn.Module):
    """A parameter without elements beside one with."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.nothing.sum()


class OtherDtype(nn.Module):
    """Computes in a dtype of its own; a complex or 16-bit weight is frozen."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        matrix = torch.randn(WIDTH, WIDTH, dtype=torch.float32 if dtype != torch.complex64 else dtype) * 0.3
        self.weight = nn.Parameter(matrix.to(dtype), requires_grad=dtype == torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = x.to(self.weight.dtype) @ self.weight
        return x + torch.tanh((out.real if out.is_complex() else out).to(x.dtype))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 3, 3, padding=1)
        self.mix = nn.Parameter(torch.randn(3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("bcw,c->bw", torch.tanh(self.conv(x.unsqueeze(1))), self.mix)


class Lookup(nn.Module):
    """An embedding, some rows of which get no gradient, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)
        self.register_buffer("edges", torch.linspace(-1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.bucketize(x.detach()[:, 0].contiguous(), self.edges.to(x.dtype))  # type: ignore[operator]
        return x + 0.3 * self.table(rows)


class Nested(nn.Module):
    """Modules in a module: blocks of their own if `units` names them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Dense(3, True) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.norm(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, 2, batch_first=True)
        self.out = nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.out(self.cell(x.unsqueeze(2))[0][:, -1]))


CORES: dict[str, Callable[..., nn.Module]] = {
    "dense": Dense,
    "scalars": Scalars,
    "empty": Empty,
    "double": partial(OtherDtype, torch.float64),
    "half": partial(OtherDtype, torch.bfloat16),
    "complex": partial(OtherDtype, torch.complex64),
    "convolution": Convolution,
    "lookup": Lookup,
    "nested": Nested,
    "recurrent": Recurrent,
    "norm": partial(nn.LayerNorm, WIDTH),
}


# What is done around a piece's core. Each takes (the rest, the piece, the forward, its own arguments) and x.


def _skip(run: Run, piece: Piece, where: Where, phase: int, x: Tensor) -> Tensor:
    return x if where.step % 3 == phase else run(x)


def _loop(run: Run, piece: Piece, where: Where, by_rank: bool, x: Tensor) -> Tensor:
    for _ in range((where.step + (where.rank if by_rank else 0)) % 3):
        x = run(x)
    return x


def _branch(run: Run, piece: Piece, where: Where, x: Tensor) -> Tensor:
    return run(x) if x.detach().sum() > 0 else x * 0.5


def _no_grad(run: Run, piece: Piece, where: Where, until: int, x: Tensor) -> Tensor:
    if where.step >= until:
        return run(x)
    with torch.no_grad():
        y = run(x)
    return x + 0.1 * y


def _detach(run: Run, piece: Piece, where: Where, until: int, x: Tensor) -> Tensor:
    if where.step >= until:
        return run(x)
    return run(x.detach()) + x


def _detach_out(run: Run, piece: Piece, where: Where, until: int, x: Tensor) -> Tensor:
    y = run(x)
    return x + 0.1 * (y.detach() if where.step < until else y)


def _checkpoint(run: Run, piece: Piece, where: Where, reentrant: bool, x: Tensor) -> Tensor:
    if not x.requires_grad or not torch.is_grad_enabled():
        return run(x)
    return checkpoint(run, x, use_reentrant=reentrant)  # type: ignore[no-any-return]


def _in_place(run: Run, piece: Piece, where: Where, how: str, x: Tensor) -> Tensor:
    y = run(x)
    if how == "mul":
        y = y * 1
        y.view(-1)[::2].mul_(0.9)
    elif how == "rows":
        y[: len(y) // 2].add_(0.1)
    else:
        y.view(-1)[0] = 0.5
    return y


def _forces(run: Run, piece: Piece, where: Where, create: bool, x: Tensor) -> Tensor:
    """The forward takes a gradient by itself."""
    with torch.enable_grad():
        inside = x.detach().clone().requires_grad_(True) if not create else x.requires_grad_() if x.is_leaf else x
        (force,) = torch.autograd.grad(run(inside).sin().sum(), inside, create_graph=create)
    return x + 0.1 * torch.tanh(force)


def _transformed(run: Run, piece: Piece, where: Where, kind: str, x: Tensor) -> Tensor:
    """A transform of torch.func over the core."""
    if kind == "vmap":
        return x + vmap(lambda row: run(row.unsqueeze(0)).squeeze(0))(x)
    if kind == "grad":
        return x + 0.1 * torch.tanh(grad(lambda value: run(value).sin().sum())(x))
    if kind == "jvp":
        return x + 0.1 * torch.tanh(jvp(run, (x,), (torch.ones_like(x),))[1])
    return functional_call(piece.core, dict(piece.core.named_parameters()), (x,))  # type: ignore[no-any-return]


def _outside(run: Run, piece: Piece, where: Where, x: Tensor) -> Tensor:
    """The piece reads its core's weights itself."""
    return run(x) + 0.01 * sum(p.real.float().square().sum() for p in piece.core.parameters()).to(x.dtype)  # type: ignore[union-attr]


def _aside(run: Run, piece: Piece, where: Where, x: Tensor) -> Tensor:
    y = run(x)
    where.aside.append(y.square().mean())
    return y


def _twice(run: Run, piece: Piece, where: Where, x: Tensor) -> Tensor:
    return 0.5 * run(x) + 0.5 * run(x * 0.5)


WRAPS: dict[str, Callable[..., Tensor]] = {
    "skip": _skip,
    "loop": _loop,
    "branch": _branch,
    "no_grad": _no_grad,
    "detach": _detach,
    "detach_out": _detach_out,
    "checkpoint": _checkpoint,
    "in_place": _in_place,
    "forces": _forces,
    "transformed": _transformed,
    "outside": _outside,
    "aside": _aside,
    "twice": _twice,
}


# Hooks of the script.


def _hook(core: nn.Module, kind: str) -> None:
    if kind == "forward":
        core.register_forward_hook(lambda module, args, out: out * 0.9)
    elif kind == "pre":
        core.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
    elif kind == "backward":
        core.register_full_backward_hook(lambda module, ins, outs: tuple(g * 0.5 if g is not None else g for g in ins))
    elif kind == "backward_pre":
        core.register_full_backward_pre_hook(lambda module, outs: tuple(g * 0.5 if g is not None else g for g in outs))
    elif kind == "tensor":
        core.register_forward_hook(_hook_of_tensor)
    else:
        for parameter in core.parameters():
            if parameter.requires_grad:
                parameter.register_hook(_halved)


def _halved(gradient: Tensor) -> Tensor:
    return gradient * 0.5


def _hook_of_tensor(module: nn.Module, args: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(_halved)


class Piece(nn.Module):
    """A core, and what is done around it."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.wraps: list[Token] = []
        self.how: str | None = None

    def forward(self, x: Tensor, where: Where) -> Any:
        run: Run = self.core
        for name, *args in self.wraps:
            run = partial(WRAPS[name], run, self, where, *args)
        out = run(x)
        return out if self.how is None else PACKED[self.how](out)


class Assembled(nn.Module):
    """The pieces, one after another, some several times. order: their numbers."""

    def __init__(self, pieces: Sequence[Piece], order: Sequence[int], root: str | None) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.order = list(order)
        self.root = root
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, where: Where) -> Any:
        x = self.first(x)
        for number in self.order:
            piece: Any = self.pieces[number]
            out = piece(x, where)
            x = out if piece.how is None else opened(piece.how, out)
        return x if self.root is None else PACKED[self.root](x)


def built(tokens: Sequence[Token]) -> Assembled:
    """The model of a list of tokens."""
    torch.manual_seed(7)
    pieces: list[Piece] = []
    order: list[int] = []
    root = None
    for name, *args in tokens:
        if name in CORES:
            pieces.append(Piece(CORES[name](*args)))
            order.append(len(pieces) - 1)
        elif name == "root":
            root = args[0]
        elif not pieces:
            continue
        elif name == "again":
            order.append(args[0] % len(pieces))
        elif name == "tied":
            _tie(pieces[-1].core, pieces[args[0] % len(pieces)].core)
        elif name == "packed":
            pieces[-1].how = args[0]
        elif name == "frozen":
            pieces[-1].requires_grad_(False)
        elif name == "hook":
            _hook(pieces[-1].core, args[0])
        elif name in WRAPS:
            pieces[-1].wraps.append((name, *args))
    return Assembled(pieces, order, root)


def _tie(one: nn.Module, other: nn.Module) -> None:
    """Weights of one shape become one."""
    theirs = {tuple(p.shape): p for p in other.parameters() if p.dtype == torch.float32}
    for module in one.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dtype == torch.float32 and tuple(parameter.shape) in theirs:
                setattr(module, name, theirs[tuple(parameter.shape)])
