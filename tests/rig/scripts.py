"""The two ways in which a random program runs: plain torch in one process that plays all ranks, and shardwise on this rank.

A verb of `rig.verbs` is code as a script has it, and acts on either. What a script says differently under an Accelerator
(backward, accumulation, clipping, saving) is a method here.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import shardwise
from rig.engine import mine
from rig.settings import Setting, chosen
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.run.process import forget_run

# (the script, this rank's batch, backward of a loss)
Kind = Callable[["Script", Tensor, Callable[..., None]], None]


def _decay(step: int) -> float:
    return 1 / (1 + 0.1 * step)


class Script(ABC):
    """A script's objects, and what it has seen.

    added: groups that were added after the beginning, as (number of the optimizer, part, rate).
    seen: what the verbs have read since this was last emptied, to be compared.
    averages: of weights, by name. kept: what a verb keeps for a later one.
    """

    def __init__(self, setting: Setting, ranks: int, rank: int) -> None:
        self.setting = setting
        self.ranks = ranks
        self.rank = rank
        self.added: list[tuple[int, str, float]] = []
        self.seen: list[tuple[str, Any]] = []
        self.averages: dict[str, Tensor] = {}
        self.kept: dict[str, Any] = {}
        self.known: list[set[str]] = []
        self.build()

    def build(self) -> None:
        """New objects: model, optimizers and scheduler."""
        self.model: Any = self.setting.made()
        self.optimizers = self.setting.optimizers_over(self.model)
        self.scheduler: LRScheduler | None = None
        if self.setting.scheduler != "none":
            self.scheduler = LambdaLR(self.optimizers[0], _decay)
        names = {id(p): n for n, p in self.model.named_parameters()}
        self.known = [{names[id(p)] for g in o.param_groups for p in g["params"]} for o in self.optimizers]

    def chosen(self, part: str) -> list[tuple[str, nn.Parameter]]:
        return chosen(self.model, part)

    def see(self, what: str, value: Any) -> None:
        self.seen.append((what, value.detach().clone() if isinstance(value, Tensor) else value))

    def optimizer(self, number: int) -> torch.optim.Optimizer:
        return self.optimizers[number % len(self.optimizers)]

    def add_group(self, number: int, part: str, rate: float) -> None:
        number %= len(self.optimizers)
        free = [(n, p) for n, p in self.chosen(part) if all(n not in known for known in self.known)]
        if not free:
            return
        self.optimizers[number].add_param_group({"params": [p for _, p in free], "lr": rate})
        self.known[number] |= {n for n, _ in free}
        if (number, part, rate) not in self.added:
            self.added.append((number, part, rate))

    def states(self) -> list[dict[str, Any]]:
        """The optimizers' dictionaries."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    @property
    @abstractmethod
    def synced(self) -> bool:
        """Whether the last micro-batch ended a step, so that steps and the optimizer's zero_grad act."""

    @abstractmethod
    def backward(self, kind: Kind, number: int, *, quiet: bool) -> None:
        """The forward and backward of a micro-batch. quiet: inside of `no_sync`."""

    def forward(self, number: int) -> Tensor:
        """Of this rank's part of a batch, without gradients."""
        with torch.no_grad():
            return _output(self.model(mine(self.setting.batch(number), self.rank, self.ranks)))

    def generate(self, number: int) -> Tensor:
        """Tokens for this rank's part of a batch."""
        return _generated(self.model, mine(self.setting.batch(number), self.rank, self.ranks))

    @abstractmethod
    def step(self, number: int) -> None: ...

    @abstractmethod
    def zero_grad(self, number: int, set_to_none: bool) -> None: ...

    @abstractmethod
    def schedule(self) -> None: ...

    @abstractmethod
    def clip(self, parameters: list[nn.Parameter], how: str, largest: float) -> None:
        """By the Accelerator's functions. how: the order of a norm, or "value"."""

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None: ...

    @abstractmethod
    def part_of_gradient(self, parameter: nn.Parameter) -> Tensor | None: ...

    @abstractmethod
    def whole_of_parts(self, part: Tensor) -> Tensor:
        """What all ranks' parts are together, flat."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[None]:
        """Weights may be read inside."""

    @abstractmethod
    def writing(self, modify: bool) -> AbstractContextManager[None]:
        """Weights may be written inside. modify: only rank 0's values count."""

    @abstractmethod
    def save(self, name: str, include_frozen: bool) -> None: ...

    @abstractmethod
    def load(self, name: str, new: bool) -> None:
        """new: into objects that are built again."""

    def weights(self) -> dict[str, Tensor]:
        with self.reading():
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}


class Plain(Script):
    """Plain torch; all ranks' batches, one after another, as one process has them."""

    def build(self) -> None:
        super().build()
        self.ever_frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        self._synced = True
        self._count = 0

    @property
    def synced(self) -> bool:
        return self._synced

    def count(self, *, quiet: bool = False) -> None:
        """A micro-batch begins."""
        self._count += 1
        self._synced = self._count % self.setting.accumulate == 0 and not quiet

    def backward(self, kind: Kind, number: int, *, quiet: bool) -> None:
        self.count(quiet=quiet)
        times = self.setting.accumulate
        for rank in range(self.ranks):
            part = mine(self.setting.batch(number), rank, self.ranks)
            before = len(self.seen)
            kind(self, part, lambda loss, **kw: (loss / self.ranks / times).backward(**kw))
            if rank != self.rank:
                del self.seen[before:]

    def step(self, number: int) -> None:
        if not self._synced:
            return
        optimizer = self.optimizer(number)
        if self.setting.clipping is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.setting.clipping)
        optimizer.step()

    def zero_grad(self, number: int, set_to_none: bool) -> None:
        if self._synced or self.setting.accumulate == 1:  # behind `no_sync` it acts, as in accelerate
            self.optimizer(number).zero_grad(set_to_none=set_to_none)

    def schedule(self) -> None:
        if self.scheduler is None:
            return
        if self.setting.scheduler == "own":
            self.scheduler.step()
        elif self._synced:
            for _ in range(self.ranks):
                self.scheduler.step()

    def clip(self, parameters: list[nn.Parameter], how: str, largest: float) -> None:
        if not self._synced:
            return
        if how == "value":
            nn.utils.clip_grad_value_(parameters, largest)
        else:
            self.see("norm", nn.utils.clip_grad_norm_(parameters, largest, norm_type=float(how)))

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return parameter.grad

    def part_of_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else parameter.grad.view(-1)

    def whole_of_parts(self, part: Tensor) -> Tensor:
        return part

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def writing(self, modify: bool) -> Iterator[None]:
        rank, self.rank = self.rank, 0 if modify else self.rank
        try:
            yield
        finally:
            self.rank = rank

    def save(self, name: str, include_frozen: bool) -> None:
        # One that was not prepared is the script's own affair.
        own = self.scheduler is None or self.setting.scheduler == "own"
        scheduler = None if own else copy.deepcopy(self.scheduler.state_dict())
        weights = {n: v.detach().clone() for n, v in self.model.state_dict().items()}
        self.kept[f"saved {name}"] = (weights, copy.deepcopy(self.states()), scheduler, self._count, include_frozen)

    def is_base_of(self, name: str, new: bool) -> bool:
        """Whether weights that may have been frozen when a checkpoint was saved have its values, or are in it.

        new: those of a model that is built again.
        """
        weights, *_, include_frozen = self.kept[f"saved {name}"]
        own = (self.setting.made() if new else self.model).state_dict()
        return include_frozen or all(torch.equal(own[n], weights[n]) for n in self.ever_frozen)

    def has_groups_of(self, name: str) -> bool:
        """Whether optimizers have as many groups, of as many parameters, as when a checkpoint was saved."""
        _, states, *_ = self.kept[f"saved {name}"]
        return _sizes(states) == _sizes(self.states())

    def load(self, name: str, new: bool) -> None:
        if f"saved {name}" not in self.kept:
            return
        weights, states, scheduler, count, _ = self.kept[f"saved {name}"]
        if new:
            rebuild(self)
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        if scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(scheduler))
        self._count, self._synced = count, True
        self.model.zero_grad()


class Prepared(Script):
    """The same script under an Accelerator, on this rank. folder: for checkpoints, the same on every rank."""

    def __init__(self, setting: Setting, ranks: Any, folder: str) -> None:
        self._ranks = ranks
        self._folder = folder
        super().__init__(setting, ranks.world_size, ranks.rank)

    def build(self) -> None:
        forget_run()
        super().build()
        setting = self.setting
        self.accelerator = Accelerator(
            cpu=True,
            deepspeed_plugin=DeepSpeedPlugin(**setting.plugin(f"{self._folder}/drive")),
            gradient_accumulation_steps=setting.accumulate,
        )
        schedulers = [self.scheduler] if setting.scheduler == "prepared" else []
        self.accelerator.prepare(self.model, *self.optimizers, *schedulers)
        self._quiet = False

    @property
    def synced(self) -> bool:
        return self.accelerator.sync_gradients and not self._quiet

    def backward(self, kind: Kind, number: int, *, quiet: bool) -> None:
        accelerator = self.accelerator
        context: AbstractContextManager[Any] = contextlib.nullcontext()
        self._quiet = quiet and self.setting.accumulate == 1
        if self.setting.accumulate > 1:
            context = accelerator.accumulate(self.model)
        elif quiet:
            context = accelerator.no_sync(self.model)
        with context:
            kind(self, mine(self.setting.batch(number), self.rank, self.ranks), accelerator.backward)

    def step(self, number: int) -> None:
        self.optimizer(number).step()

    def zero_grad(self, number: int, set_to_none: bool) -> None:
        self.optimizer(number).zero_grad(set_to_none=set_to_none)

    def schedule(self) -> None:
        if self.scheduler is not None:
            self.scheduler.step()

    def clip(self, parameters: list[nn.Parameter], how: str, largest: float) -> None:
        if how == "value":
            self.accelerator.clip_grad_value_(parameters, largest)
        else:
            norm = self.accelerator.clip_grad_norm_(parameters, largest, norm_type=float(how))
            if norm is not None:
                self.see("norm", norm)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return shardwise.gradient(parameter)

    def part_of_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return shardwise.gradient(parameter, part=True)

    def whole_of_parts(self, part: Tensor) -> Tensor:
        parted = self.setting.stage >= 1 and self.synced
        return torch.cat(self._ranks.gather_objects(part.clone())) if parted else part

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with shardwise.gathered(self.model):
            yield

    @contextlib.contextmanager
    def writing(self, modify: bool) -> Iterator[None]:
        needed = modify or self.setting.stage == 3
        with shardwise.gathered(self.model, modify=modify) if needed else contextlib.nullcontext():
            yield

    def save(self, name: str, include_frozen: bool) -> None:
        self.accelerator.save_state(f"{self._folder}/{name}", include_frozen=include_frozen)
        self.kept[f"saved {name}"] = None

    def load(self, name: str, new: bool) -> None:
        if f"saved {name}" not in self.kept:
            return
        if new:
            rebuild(self)
        self.accelerator.load_state(f"{self._folder}/{name}")


def _sizes(states: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [[len(group["params"]) for group in state["param_groups"]] for state in states]


def rebuild(script: Script) -> None:
    """New objects as a script makes them that starts again: the same groups, and what is trained now is trained."""
    trained = {name: p.requires_grad for name, p in script.model.named_parameters()}
    adapter = script.model.active_adapter if script.setting.model == "lora" else None
    script.build()
    if adapter is not None:
        script.model.set_adapter(adapter)
    for group in script.added:
        script.add_group(*group)
    for name, parameter in script.model.named_parameters():
        parameter.requires_grad_(trained[name])


def _output(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def _generated(model: Any, tokens: Tensor) -> Tensor:
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
