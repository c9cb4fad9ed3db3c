"""What a random program runs in: a stage, tiers, ranks, a small model, and how it is optimised; all of it drawn from a seed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rig.adapters import config_of, stir, tiny_base
from rig.engine import Block

# stage, where optimizer states rest, where weights rest, ranks: in this order, so that few seeds meet all of them.
PLACES: tuple[tuple[int, str, str, int], ...] = (
    (3, "none", "none", 2),
    (0, "none", "none", 2),
    (2, "none", "none", 2),
    (3, "cpu", "cpu", 2),
    (1, "none", "none", 3),
    (3, "none", "none", 3),
    (2, "cpu", "none", 2),
    (3, "nvme", "nvme", 2),
    (0, "none", "none", 1),
    (3, "none", "none", 1),
    (1, "cpu", "none", 2),
    (3, "cpu", "none", 2),
    (3, "cpu", "cpu", 1),
    (2, "nvme", "none", 3),
    (3, "none", "none", 2),
    (0, "none", "none", 3),
    (3, "nvme", "cpu", 3),
)
SAMPLES = 12
VOCABULARY = 32
TOWER_PARTS = (
    *("", "first", "blocks.0", "blocks.1", "blocks.2", "head", "blocks.1.up", "blocks", "weight", "bias"),
    *("scale", "blocks.2.down.bias", "blocks.0.up.weight", "spare", "first.bias"),
)
LORA_PARTS = (
    *("", "lora_", "lora_A", "lora_B", "default", "other", "layers.1", "layers.0.self_attn.q_proj", "lm_head", "norm"),
    *("embed_tokens", "layers.1.self_attn.v_proj.lora_A.default", "mlp.down_proj"),
)

ModelName = Literal["tower", "recomputed", "reentrant", "lora"]


@dataclass(frozen=True)
class Setting:
    """frozen: parts that are frozen when the model is prepared. knows: whether the optimizer is made over them as well.

    parts: of which optimizer each parameter is, by the text that its name contains; the first optimizer has the rest.
    accumulate: by `accelerator.accumulate`, so many micro-batches to a step; 1 leaves that to the script.
    looks: whether weights are compared after every step, by gathering them; else at the end only.
    """

    stage: int = 3
    optimizer_tier: str = "none"
    weight_tier: str = "none"
    ranks: int = 2
    model: ModelName = "tower"
    optimizers: tuple[str, ...] = ("sgd",)
    second_part: str = "blocks.1"
    frozen: tuple[str, ...] = ()
    knows: bool = True
    clipping: float | None = None
    accumulate: int = 1
    scheduler: Literal["none", "prepared", "own"] = "none"
    double: bool = False
    looks: bool = True

    @classmethod
    def drawn(cls, seed: int) -> Setting:
        source = random.Random(f"setting {seed}")
        stage, optimizer_tier, weight_tier, ranks = PLACES[seed % len(PLACES)]
        model: ModelName = "lora" if seed % 4 == 3 else source.choice(["tower", "tower", "recomputed", "reentrant"])
        kinds = ["sgd", "adamw"]
        parts = LORA_PARTS if model == "lora" else TOWER_PARTS
        few = [part for part in parts if part not in ("", "weight", "blocks", "lora_")]
        return cls(
            stage,
            optimizer_tier,
            weight_tier,
            ranks,
            model,
            optimizers=(source.choice(kinds), source.choice(kinds))
            if source.random() < 0.15
            else (source.choice(kinds),),
            second_part="lora_B" if model == "lora" else source.choice(["blocks.1", "head", "bias"]),
            frozen=tuple(source.sample(few, source.choice([0, 1, 2]))) if model != "lora" else (),
            knows=source.random() < 0.6,
            clipping=source.choice([None, None, None, 0.05]),
            accumulate=source.choice([1, 1, 1, 2, 3]),
            scheduler=source.choice(["none", "none", "prepared", "own"]),
            double=source.random() < 0.3 and model != "lora",  # Llama computes norms in fp32, whatever its dtype
            looks=source.random() < 0.7,
        )

    @property
    def parts(self) -> Sequence[str]:
        """Texts by which verbs choose parameters."""
        return LORA_PARTS if self.model == "lora" else TOWER_PARTS

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32

    @property
    def tolerance(self) -> float:
        """Of a weight, relative to max(1, |weight|). Sums in another order are off by rounding, which 12 steps carry on."""
        return 1e-12 if self.double else 2e-6

    def made(self) -> nn.Module:
        """A fresh model with the same weights everywhere, frozen as at the beginning."""
        model: nn.Module
        if self.model == "lora":
            model = two_adapters()
        else:
            torch.manual_seed(5)
            model = Stack(self.model)
        model = model.to(self.dtype).train()
        for part in self.frozen:
            for _, parameter in chosen(model, part):
                parameter.requires_grad_(False)
        return model

    def optimizers_over(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad or (self.knows and self._may_train(n))]
        if len(self.optimizers) == 1:
            return [optimizer_of(self.optimizers[0], [p for _, p in named])]
        first = [p for n, p in named if self.second_part not in n]
        second = [p for n, p in named if self.second_part in n]
        return [optimizer_of(kind, own) for kind, own in zip(self.optimizers, (first, second), strict=True) if own]

    def _may_train(self, name: str) -> bool:
        return self.model != "lora" or "lora_" in name

    def plugin(self, folder: str) -> dict[str, Any]:
        """The arguments of a DeepSpeedPlugin. folder: where a drive's files lie."""
        given: dict[str, Any] = {"zero_stage": self.stage, "gradient_clipping": self.clipping}
        if self.stage:
            given["offload_optimizer_device"] = self.optimizer_tier
        if self.stage == 3:
            given["offload_param_device"] = self.weight_tier
        for role, tier in (("optimizer", self.optimizer_tier), ("param", self.weight_tier)):
            if tier == "nvme":
                given[f"offload_{role}_nvme_path"] = folder
        return given

    def batch(self, number: int) -> Tensor:
        """A global batch of SAMPLES."""
        source = torch.Generator().manual_seed(100 + number)
        if self.model == "lora":
            return torch.randint(3, VOCABULARY, (SAMPLES, 5), generator=source)
        return torch.randn(SAMPLES, 5, generator=source, dtype=torch.float64).to(self.dtype)


class Stack(nn.Module):
    """Three blocks, a parameter without dimensions, one layer that is never used; blocks are recomputed if so named."""

    def __init__(self, name: ModelName) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 3)
        self.spare = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.name == "tower" or not torch.is_grad_enabled() or not x.requires_grad:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.name == "reentrant")
        return self.head(x) * self.scale


def two_adapters() -> Any:
    """A small LlamaForCausalLM with the adapters "default", which is active, and "other"."""
    from peft import get_peft_model

    torch.manual_seed(23)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_base(), config_of("LORA"), adapter_name="default")
        model.add_adapter("other", config_of("LORA"))
    stir(model)
    return model


def optimizer_of(kind: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    # Its eps is above rounding noise, see tests/parity/training.py.
    return torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4)


def chosen(model: nn.Module, part: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters whose names contain a text."""
    return [(name, parameter) for name, parameter in model.named_parameters() if part in name]
