"""Optimizers of torch and of other packages, each made for one small model, and what becomes of it under a plan.

`outcome` trains one beside plain torch on the global batch, saves the run, loads it into new objects and goes on. It gives how
the optimizer was stepped, or the words with which it was refused; numbers that are not plain torch's fail.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rig.engine import Block, inputs, mine
from shardwise import Accelerator, DeepSpeedPlugin, gathered
from shardwise.errors import OptimizerError
from shardwise.run.process import forget_run

# Stage, and where the optimizer's states rest.
PLANS = {"0": (0, "none"), "2": (2, "none"), "3": (3, "none"), "3-nvme": (3, "nvme")}
# What a CPU steps in place, and a GPU does not.
ON_A_GPU = {"3": PLANS["3"], "3-cpu": (3, "cpu")}
SAVE_AT, STEPS = 3, 6
CPU = torch.device("cpu")
SHARDS, WHOLE, BOTH = "in shards", "whole", "in shards and whole"


class Net(nn.Module):
    """Matrices of 4,096 elements, from which on states of 8 bits are; vectors; two units."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 64)
        self.block = Block(64, 64)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.first(x))))


@dataclass(frozen=True)
class Kind:
    """One optimizer. package: as an index has it. make: (the module of the package, a model) -> the optimizer.

    tolerance: of a weight after all steps, in parts of the longest way that one has gone.
    """

    name: str
    package: str
    module: str
    make: Callable[[Any, nn.Module], Any]
    bits: str = ""
    tolerance: float = 1e-4

    @property
    def key(self) -> str:
        return f"{self.package} {self.name}"

    @property
    def is_there(self) -> bool:
        return find_spec(self.module.partition(".")[0]) is not None

    def made(self, model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make(importlib.import_module(self.module), model)


def of(package: str, module: str, name: str, bits: str = "", tolerance: float = 1e-4, **settings: Any) -> Kind:
    """A class that is called with parameters and settings."""
    return Kind(name, package, module, partial(_called, name, settings), bits, tolerance)


def _called(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    return getattr(module, name)(model.parameters(), **settings)


def _matrices(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    return getattr(module, name)([p for p in model.parameters() if p.ndim == 2], **settings)


def _both(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    """Matrices by Muon, the rest by AdamW, in one optimizer."""
    held = list(model.parameters())
    groups = [
        {"params": [p for p in held if p.ndim == 2], "use_muon": True, **settings},
        {"params": [p for p in held if p.ndim < 2], "use_muon": False, **settings},
    ]
    return getattr(module, name)(groups)


def _low_rank(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    held = list(model.parameters())
    groups = [
        {"params": [p for p in held if p.ndim < 2]},
        {"params": [p for p in held if p.ndim == 2], **settings},
    ]
    return getattr(module, name)(groups, lr=1e-3)


def _model(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    return getattr(module, name)(model, **settings)


def _around(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    """Around a class of torch's."""
    return getattr(module, name)(model.parameters(), torch.optim.SGD, lr=1e-2, **settings)


def _lookahead(name: str, settings: dict[str, Any], module: Any, model: nn.Module) -> Any:
    return getattr(module, name)(torch.optim.SGD(model.parameters(), lr=1e-2), **settings)


def _special(package: str, module: str, make: Any, *names: str, **settings: Any) -> list[Kind]:
    return [Kind(name, package, module, partial(make, name, settings)) for name in names]


_TORCH = [
    *(of("torch", "torch.optim", name, lr=1e-3) for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
        "LBFGS", "SparseAdam",
    )),
    *_special("torch", "torch.optim", _matrices, "Muon", lr=1e-3),
]  # fmt: skip
_OTHERS = [
    of("transformers", "transformers.optimization", "Adafactor", lr=1e-3, relative_step=False),
    *(
        of("bitsandbytes", "bitsandbytes.optim", name, "8" if name.endswith("8bit") else "", lr=1e-3)
        for name in (
            "AdamW8bit",
            "Lion8bit",
            "AdEMAMix8bit",
            "LAMB8bit",
            "PagedAdamW",
            "PagedAdamW8bit",
            "PagedLion8bit",
        )
    ),
    of("torchao", "torchao.optim", "AdamW8bit", "8", lr=1e-3),
    of("torchao", "torchao.optim", "AdamW4bit", "4", lr=1e-3),
    of("torchao", "torchao.optim", "AdamWFp8", "8", lr=1e-3),
    of("schedulefree", "schedulefree", "AdamWScheduleFree", lr=1e-3),
    of("schedulefree", "schedulefree", "SGDScheduleFree", lr=1e-2),
    of("schedulefree", "schedulefree", "RAdamScheduleFree", lr=1e-3),
    of("prodigyopt", "prodigyopt", "Prodigy"),
    of("came-pytorch", "came_pytorch", "CAME", lr=1e-3),
    *_special("muon-optimizer", "muon", _matrices, "Muon", "SingleDeviceMuon", lr=1e-3),
    *_special("muon-optimizer", "muon", _both, "MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam", lr=1e-3),
]
_PLAIN = (
    "A2Grad AccSGD AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaHessian Adai Adalite AdaMax AdaMod AdaNorm AdaPNM "
    "AdaSmooth AdaTAM Adam AdamC AdamG AdamP AdamS AdamW AdamWSN Adan ADOPT AdEMAMix AggMo Aida Alice AliG Amos Ano APOLLO "
    "ApolloDQN ASGD AvaGrad BCOS CAME Conda DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion DAdaptSGD DASH DiffGrad DualAdam "
    "EmoFact EmoLynx EmoNavi EXAdam FAdam Fira FlashAdamW FOCUS Fromage FTRL GaLore Grams Gravity GrokFastAdamW Kate Kron Lamb "
    "LaProp LARS Lion LoRARite MADGRAD Magma MARS MSVAG NAdam Nero NovoGrad PAdam PID PNM Prodigy QHAdam QHM RACS RAdam Ranger "
    "ROSE SaRA ScalableShampoo ScheduleFreeAdamW ScheduleFreeRAdam SCION SCIONLight SGD SGDP SGDSaI "
    "SGDW Shampoo SignSGD SimplifiedAdEMAMix SM3 SOAP SophiaH SPAM SPlus SRMM StableAdamW StableSPAM SWATS TAM Tiger VSGD Yogi"
)
_PO = ("pytorch_optimizer", "pytorch_optimizer")
_RANK = {"rank": 4, "update_proj_gap": 2, "scale": 0.5, "projection_type": "std"}
_PYTORCH_OPTIMIZER = [
    *(of(*_PO, name) for name in _PLAIN.split()),
    of(*_PO, "AdaShift", keep_num=2),
    of(*_PO, "ScheduleFreeSGD", lr=1e-2),
    of(*_PO, "BSAM", num_data=12),
    of(*_PO, "Ranger21", num_iterations=20),
    *_special(*_PO, _both, "AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon"),
    *_special(*_PO, _matrices, "SpectralSphere"),
    *_special(*_PO, _model, "AdamMini", "LOMO", "AdaLOMO"),
    *_special(*_PO, _around, "SAM", "LookSAM"),
    *_special(*_PO, _lookahead, "Lookahead"),
    *(Kind(f"{name}, rank 4", *_PO, partial(_low_rank, name, _RANK)) for name in ("GaLore", "APOLLO", "Fira")),
]
KINDS = {kind.key: kind for kind in (*_TORCH, *_OTHERS, *_PYTORCH_OPTIMIZER)}


class _Run:
    """New objects in a new Accelerator."""

    def __init__(self, kind: Kind, plan: str, folder: str, device: torch.device) -> None:
        forget_run()
        self.stage, tier = (PLANS if device.type == "cpu" else ON_A_GPU)[plan]
        plugin = DeepSpeedPlugin(
            zero_stage=self.stage, offload_optimizer_device=tier, offload_optimizer_nvme_path=f"{folder}/drive"
        )
        self.accelerator = Accelerator(cpu=device.type == "cpu", deepspeed_plugin=plugin)
        self.device = device
        torch.manual_seed(5)
        model = Net()
        self.reference = copy.deepcopy(model).to(device)
        self.start = {name: p.detach().clone() for name, p in self.reference.named_parameters()}
        self.model, self.optimizer = self.accelerator.prepare(model, kind.made(model))

    def steps(self, first: int, last: int) -> None:
        ranks = self.accelerator._ranks
        for batch in inputs(last)[first:]:
            loss = (self.model(mine(batch, ranks.rank, ranks.world_size).to(self.device)) - 1).square().mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def how(self) -> str:
        from shardwise.step.optimizer import find_sharded_optimizer

        stepper = find_sharded_optimizer(self.optimizer)
        assert stepper is not None
        found = {stepper.groups.is_whole(number) for number in range(len(self.optimizer.param_groups))}
        return BOTH if len(found) == 2 else WHOLE if found == {True} else SHARDS

    def weights(self) -> dict[str, Tensor]:
        with gathered(self.model) if self.stage == 3 else nullcontext():
            return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def _mode(optimizer: Any, name: str) -> None:
    if callable(getattr(optimizer, name, None)):
        getattr(optimizer, name)()


def _plain(kind: Kind, reference: nn.Module, world_size: int) -> None:
    """What one process of plain torch makes of the model."""
    optimizer = kind.made(reference)
    _mode(optimizer, "train")
    for batch in inputs(STEPS):
        for rank in range(world_size):
            x = mine(batch, rank, world_size).to(next(reference.parameters()).device)
            ((reference(x) - 1).square().mean() / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()


def outcome(ranks: Any, key: str, plan: str, folder: str, resumes: bool = True, device: torch.device = CPU) -> str:
    """How optimizer `key` of KINDS is stepped under `plan` of PLANS, or why it is refused. resumes: save and load, too.

    device: this rank's; for a GPU `plan` is one of ON_A_GPU.
    """
    kind = KINDS[key]
    # torchao compiles its step.
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        try:
            run = _Run(kind, plan, folder, device)
        except OptimizerError as error:
            return str(error)
        _mode(run.optimizer, "train")
        run.steps(0, SAVE_AT)
        if resumes:
            run.accelerator.save_state(f"{folder}/state")
        run.steps(SAVE_AT, STEPS)
        found, how = run.weights(), run.how()
        run.accelerator.free_memory()
        _plain(kind, run.reference, ranks.world_size)
        _compare(kind, found, run.start, run.reference)
        if resumes:
            again = _Run(kind, plan, folder, device)
            again.accelerator.load_state(f"{folder}/state")
            again.steps(SAVE_AT, STEPS)
            for name, value in again.weights().items():
                assert torch.equal(value, found[name]), f"{name} after a load: {(value - found[name]).abs().max()}"
            again.accelerator.free_memory()
    return how


def _compare(kind: Kind, found: dict[str, Tensor], start: dict[str, Tensor], reference: nn.Module) -> None:
    wanted = {name: p.detach() for name, p in reference.named_parameters()}
    moved = max(float((wanted[name] - start[name]).abs().max()) for name in wanted)
    off = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    assert moved > 0, "nothing moved"
    assert off <= kind.tolerance * moved + 1e-6, (off, moved)
