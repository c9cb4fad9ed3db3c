"""Optimizers as other libraries have them, each in its shortest form: some work element by element, most do not.

SHARDED      on shards they have torch's numbers
WHOLE        they take numbers over a whole parameter, or see its shape: they step whole ones, each on one rank
SEVERAL      they take numbers over several parameters: torch's where each rank steps all (stage 0)
NOWHERE      they keep what is neither made of numbers nor of tensors, or do not step what is in their groups
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer


class Loop(Optimizer):
    """One parameter after another: `one` steps it, `group` and `begin` come before."""

    own: ClassVar[dict[str, Any]] = {}

    def __init__(self, params: Any, lr: float = 1e-2, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, **self.own, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        for group in self.param_groups:
            self.group(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.one(p, p.grad, group, self.state[p])
        return loss

    def begin(self) -> None: ...

    def group(self, group: dict[str, Any]) -> None: ...

    def one(self, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None: ...

    def with_gradients(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def moment(state: dict[str, Any], name: str, p: Tensor, grad: Tensor, beta: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(p)
    return state[name].mul_(beta).add_(grad, alpha=1 - beta)


class Lion(Loop):
    def one(self, p, grad, group, state):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        before = state.get("exp_avg", torch.zeros_like(p)).clone()
        p.add_((before * 0.9 + grad * 0.1).sign(), alpha=-group["lr"] * 0.1)
        moment(state, "exp_avg", p, grad, 0.99)


class AdamWOneCounter(Loop):
    """Counts its steps in the group, once for all parameters."""

    own: ClassVar[dict[str, Any]] = {"step": 0}

    def group(self, group):
        group["step"] += 1

    def one(self, p, grad, group, state):
        p.mul_(1 - group["lr"] * group["weight_decay"])
        m, v = moment(state, "m", p, grad, 0.9), moment(state, "v", p, grad * grad, 0.999)
        count = group["step"]
        p.sub_(group["lr"] * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-4))


class AdamWOwnCounter(AdamWOneCounter):
    """Counts its steps on the object."""

    own: ClassVar[dict[str, Any]] = {}
    count = 0

    def begin(self):
        self.count += 1

    def group(self, group):
        group["step"] = self.count


class StateInConstructor(Loop):
    """Makes its states before the first step, as Adagrad does."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"sum": torch.full_like(p, 0.1), "step": torch.zeros(())}

    def one(self, p, grad, group, state):
        state["step"] += 1
        state["sum"].addcmul_(grad, grad)
        p.addcdiv_(grad, state["sum"].sqrt() + 1e-4, value=-group["lr"] / (1 + 0.1 * float(state["step"])))


class Sophia(Loop):
    """Its curvature comes by another method, between steps."""

    @torch.no_grad()
    def update_hessian(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment(self.state[p], "hessian", p, p.grad * p.grad, 0.9)

    def one(self, p, grad, group, state):
        m = moment(state, "exp_avg", p, grad, 0.9)
        h = state.setdefault("hessian", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (m / (h * 4 + 1e-3)).clamp_(-1, 1))


class ScheduleFree(Loop):
    """AdamW without a schedule: steps at y, evaluates at x; `train` and `eval` swap them."""

    own: ClassVar[dict[str, Any]] = {"k": 0, "weight_sum": 0.0, "train_mode": False, "beta": 0.9}

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self):
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], 1 - group["beta"])
                group["train_mode"] = True

    def begin(self):
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("Optimizer was not in train mode when step is called. Call train().")

    def group(self, group):
        group["k"] += 1
        weight = group["lr"] ** 2
        group["weight_sum"] += weight
        group["share"] = weight / group["weight_sum"] if group["weight_sum"] else 0.0

    def one(self, p, grad, group, state):
        z = state.setdefault("z", p.clone())
        v = moment(state, "exp_avg_sq", p, grad * grad, 0.99)
        direction = grad / ((v / (1 - 0.99 ** group["k"])).sqrt() + 1e-4) + group["weight_decay"] * p
        p.lerp_(z, group["share"])
        p.sub_(direction, alpha=group["lr"] * (1 - group["beta"] * (1 - group["share"])))
        z.sub_(direction, alpha=group["lr"])


class Lamb(Loop):
    """timm's rule: the ratio acts only in groups with weight decay."""

    def one(self, p, grad, group, state):
        update = moment(state, "m", p, grad, 0.9).clone()
        if group["weight_decay"]:
            update = update.add(p, alpha=group["weight_decay"])
            update = update * (p.norm() / (update.norm() + 1e-6))
        p.sub_(update, alpha=group["lr"])


class LambClips(Loop):
    """Only LAMB's `max_grad_norm`: one norm over everything."""

    def begin(self):
        self.norm = torch.stack([torch.zeros(()), *(p.grad.norm() for p in self.with_gradients())]).norm()

    def one(self, p, grad, group, state):
        p.sub_(grad / self.norm.clamp(min=0.1), alpha=group["lr"])


class Lars(Loop):
    def one(self, p, grad, group, state):
        grad = grad + group["weight_decay"] * p
        if p.ndim > 1 or group["weight_decay"]:
            grad = grad * (0.02 * p.norm() / (grad.norm() + 1e-6))
        p.sub_(moment(state, "momentum", p, grad, 0.9), alpha=group["lr"] * 100)


class Prodigy(Loop):
    """One distance, and a rate from it, for all parameters."""

    own: ClassVar[dict[str, Any]] = {"d": 1e-2, "numerator": 0.0, "denominator": 0.0}

    def begin(self):
        first = self.param_groups[0]
        for p in self.with_gradients():
            start = self.state[p].setdefault("start", p.clone())
            first["numerator"] += float((p.grad * (start - p)).sum())
            first["denominator"] += float(p.grad.abs().sum())
        d = max(first["d"], first["numerator"] / (first["denominator"] + 1e-8))
        for group in self.param_groups:
            group["d"] = d

    def one(self, p, grad, group, state):
        p.sub_(grad, alpha=group["lr"] * (1 + group["d"]))


class DAdaptSGD(Loop):
    """The same with its numbers on the object, over squared norms."""

    d = 1.0

    def begin(self):
        self.d += float(sum(((p.grad**2).sum() for p in self.with_gradients()), torch.zeros(())))

    def one(self, p, grad, group, state):
        p.sub_(grad, alpha=group["lr"] / self.d)


class StableAdamW(Loop):
    """Divides its rate by the root mean square of each update where that is large."""

    def one(self, p, grad, group, state):
        v = moment(state, "v", p, grad * grad, 0.99)
        rms = (grad.square() / v.clamp(min=1e-8)).mean().sqrt()
        p.sub_(grad / (v.sqrt() + 1e-4), alpha=group["lr"] * 0.1 / max(1.0, float(rms)))


class AdamMini(Loop):
    """One second moment for all of a parameter."""

    def one(self, p, grad, group, state):
        v = state["v"] = state.get("v", torch.zeros(())) * 0.99 + grad.square().mean() * 0.01
        p.sub_(moment(state, "m", p, grad, 0.9) / (v.sqrt() + 1e-4), alpha=group["lr"] * 0.1)


class AdamMiniRows(Loop):
    """One second moment for each row."""

    def one(self, p, grad, group, state):
        mean = grad.square().mean(-1, keepdim=True) if p.ndim > 1 else grad.square()
        v = state["v"] = state.get("v", torch.zeros_like(mean)) * 0.99 + mean * 0.01
        p.sub_(grad / (v.sqrt() + 1e-4), alpha=group["lr"] * 0.1)


class AdafactorLike(Loop):
    """Row and column sums of matrices."""

    def one(self, p, grad, group, state):
        if p.ndim < 2:
            p.sub_(grad, alpha=group["lr"])
            return
        rows = state["row"] = state.get("row", 0.0) + grad.square().mean(-1)
        columns = state["column"] = state.get("column", 0.0) + grad.square().mean(-2)
        scale = (rows[..., None] * columns[..., None, :] / rows.mean(-1)[..., None, None]).sqrt()
        p.sub_(grad / (scale + 1e-3), alpha=group["lr"])


class Galore(Loop):
    """Moments of a projection of each matrix."""

    def one(self, p, grad, group, state):
        if p.ndim != 2:
            p.sub_(grad, alpha=group["lr"])
            return
        if "projection" not in state:
            state["projection"] = torch.linalg.svd(grad.float(), full_matrices=False)[0][:, :2]
        low = state["projection"].T @ grad
        state["m"] = state.get("m", torch.zeros_like(low)) * 0.9 + low * 0.1
        p.sub_(state["projection"] @ state["m"], alpha=group["lr"])


class RowNorm(Loop):
    def one(self, p, grad, group, state):
        p.sub_(grad / (grad.norm(dim=-1, keepdim=True) + 1e-3) if p.ndim else grad, alpha=group["lr"])


class Blockwise(Loop):
    """Moments of large parameters in 8 bits, with a scale for each block of 256."""

    def one(self, p, grad, group, state):
        if p.numel() < 512:
            p.sub_(moment(state, "m", p, grad, 0.9), alpha=group["lr"])
            return
        flat = torch.nn.functional.pad(grad.reshape(-1), (0, -grad.numel() % 256)).view(-1, 256)
        if "codes" in state:
            flat = flat * 0.1 + state["codes"] * (state["scales"] / 127)[:, None] * 0.9
        state["scales"] = flat.abs().amax(1).clamp(min=1e-12)
        state["codes"] = (flat / state["scales"][:, None] * 127).round().to(torch.int8)
        now = state["codes"] * (state["scales"] / 127)[:, None]
        p.sub_(now.view(-1)[: p.numel()].view(p.shape), alpha=group["lr"])


class History(Loop):
    """The last gradients of each parameter."""

    def one(self, p, grad, group, state):
        state["last"] = torch.stack([grad, *state.get("last", ())])[:3]
        p.sub_(state["last"].mean(0), alpha=group["lr"])


class Listed(Loop):
    """The same in a list."""

    def one(self, p, grad, group, state):
        state["last"] = [grad.clone(), *state.get("last", ())][:3]
        p.sub_(sum(state["last"]) / len(state["last"]), alpha=group["lr"])


class Shadow:
    """An object that an optimizer keeps."""

    def __init__(self, p: Tensor) -> None:
        self.rows = p.detach().clone().t() if p.ndim == 2 else p.detach().clone()
        self.dtype = p.dtype
        self.seen = 0


class Halves(Tensor):
    """A tensor of p's shape that is kept as two."""

    @staticmethod
    def __new__(cls, high: Tensor, low: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype, device=high.device)

    def __init__(self, high: Tensor, low: Tensor) -> None:
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["high"], inner["low"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            return cls(func(args[0].high, **(kwargs or {})), func(args[0].low, **(kwargs or {})))
        raise NotImplementedError(str(func))


class Assorted(Loop):
    """Momenta in a deque, an object, and a tensor that wraps others; a count for the group."""

    own: ClassVar[dict[str, Any]] = {"count": 0}

    def group(self, group):
        if group["params"]:  # nothing where it has nothing to step
            group["count"] += 1

    def one(self, p, grad, group, state):
        if not state:
            state |= {"last": deque(), "shadow": Shadow(p), "sum": Halves(torch.zeros_like(p), torch.zeros_like(p))}
        state["last"].append(grad.clone())
        if len(state["last"]) > 2:
            state["last"].popleft()
        shadow, halves = state["shadow"], state["sum"]
        shadow.seen += 1
        shadow.rows.mul_(0.9)
        halves.high.add_(grad.round(decimals=1))
        halves.low.add_(grad - grad.round(decimals=1))
        rows = shadow.rows.t() if p.ndim == 2 else shadow.rows
        p.sub_(
            sum(state["last"]) + halves.high + halves.low + rows * 0.1,
            alpha=group["lr"] / (group["count"] + shadow.seen),
        )


class Iterates(Loop):
    """A state that cannot be moved or saved."""

    def one(self, p, grad, group, state):
        state["last"] = iter((grad.clone(),))
        p.sub_(grad, alpha=group["lr"])


class Reassigns(Loop):
    """Gives parameters other memory instead of changing them."""

    def one(self, p, grad, group, state):
        p.data = p.data - group["lr"] * grad


class PastItsGroups(Loop):
    """Steps a list of parameters that it made when it was built."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.all = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.all:
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-2)


class Noisy(Loop):
    """Langevin noise on each step."""

    def one(self, p, grad, group, state):
        p.sub_(grad + 0.01 * torch.randn_like(p), alpha=group["lr"])


class Sam(Loop):
    """Needs its closure, twice."""

    @torch.no_grad()
    def step(self, closure):
        norm = torch.stack([p.grad.norm() for p in self.with_gradients()]).norm()
        for p in self.with_gradients():
            self.state[p]["way"] = p.grad * (0.05 / norm)
            p.add_(self.state[p]["way"])
        with torch.enable_grad():
            closure()
        for p in self.with_gradients():
            p.sub_(self.state[p]["way"]).sub_(p.grad, alpha=1e-2)


class Lookahead(Optimizer):
    """Steps another optimizer, and looks back every few steps."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


SHARDED = {
    cls.__name__: cls
    for cls in (Lion, AdamWOneCounter, AdamWOwnCounter, StateInConstructor, Sophia, ScheduleFree)
}  # fmt: skip
WHOLE = {
    cls.__name__: cls
    for cls in (
        Lamb,
        Lars,
        StableAdamW,
        AdamMini,
        AdamMiniRows,
        AdafactorLike,
        Galore,
        RowNorm,
        Blockwise,
        History,
        Listed,
        Assorted,
    )
}
SEVERAL = {cls.__name__: cls for cls in (LambClips, Prodigy, DAdaptSGD)}
NOWHERE = {cls.__name__: cls for cls in (Iterates, Reassigns, PastItsGroups, Sam)}
