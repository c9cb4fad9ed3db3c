"""Which role rests where: a ZeRO stage is data, not code.

A role is what a byte is for: a frozen weight, a trainable weight in the dtype that computes, a gradient, or what the
optimizer keeps (the fp32 master copy and its moments). A placement says whether each rank keeps a shard or the whole, and
on which tier it rests. The rest of the engine asks three predicates and never the stage:

    parameter.sharded                               gather before use, release after
    gradient.sharded                                reduce every micro-batch; else accumulate whole, reduce at the boundary
    optimizer.sharded and not parameter.sharded     publish updated weights by an all-gather; else by a local cast

                 stage 0      stage 1      stage 2      stage 3
    frozen       whole        whole        whole        shard
    parameter    whole        whole        whole        shard
    gradient     whole        whole        shard        shard
    optimizer    whole        shard        shard        shard

This file is pure data; it knows neither tensors nor processes. Source of the stages: ZeRO (arXiv 1910.02054).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config.offloads import DEVICES, Offloaded, Tier, refused_offload
from ..errors import PlanError

__all__ = ["WHOLE_ADAPTER_SHARE", "Placement", "Plan", "Tier"]


@dataclass(frozen=True)
class Placement:
    """sharded: each rank keeps 1/world_size of it, else all of it. tier: where that rests between uses."""

    sharded: bool
    tier: Tier = Tier.GPU

    def leaves(self, shards: int) -> bool:
        """Whether the whole of it comes and goes. shards: the ranks that divide it.

        A single rank's shard is the whole: only offloading makes its storage worth giving back.
        """
        return self.sharded and (shards > 1 or self.tier is not Tier.GPU)

    def __str__(self) -> str:
        return f"{'shard' if self.sharded else 'whole'} {self.tier}"


# A unit's trainable part stays whole on every rank when it is at most this share of the unit's frozen bytes: gathering
# adapters in every pass costs a collective per unit, keeping them costs 1/16 of what sharding the frozen part saves.
WHOLE_ADAPTER_SHARE = 1 / 16


@dataclass(frozen=True)
class Plan:
    """The placement of each role. Raises PlanError for a combination that ZeRO does not have.

    parts: into how many parts a shard of masters, states and gradients is cut, one for each copy of the model, where weights
    are sharded in a group and these over all ranks (hpZ); 1 where every copy has all of them.
    """

    frozen: Placement
    parameter: Placement
    gradient: Placement
    optimizer: Placement
    parts: int = 1

    def __post_init__(self) -> None:
        if self.parameter.sharded and not self.gradient.sharded:
            raise PlanError(
                "parameters are sharded but gradients are whole. Shard the gradients too (zero_stage 3), or "
                "keep parameters whole (zero_stage 1)."
            )
        if self.gradient.sharded and not self.optimizer.sharded:
            raise PlanError(
                "gradients are sharded but the optimizer is whole. Shard the optimizer too (zero_stage 2), "
                "or keep gradients whole (zero_stage 0)."
            )
        for role in ("frozen", "parameter", "gradient", "optimizer"):
            placement: Placement = getattr(self, role)
            if placement.tier is not Tier.GPU and not placement.sharded:
                raise PlanError(
                    f"{role} is whole but rests on {placement.tier}. Only shards can be offloaded: raise "
                    "zero_stage, or keep it on the gpu."
                )
            if placement.tier.on_disk and role == "gradient":
                raise PlanError(
                    f"gradients cannot rest on {placement.tier}: they are read as soon as they are there. Use cpu."
                )

    @classmethod
    def from_stage(cls, stage: int, *, offload_optimizer: str = "none", offload_param: str = "none") -> Plan:
        """The plan of a ZeRO stage.

        stage:             0 to 3, a column of the table above.
        offload_optimizer: one of DEVICES; gradients follow the optimizer to host memory. Stages 1 to 3.
        offload_param:     one of DEVICES; frozen and trainable weights. Stage 3 only.
        Raises PlanError for a stage outside 0 to 3, an unknown device, or an offload that the stage does not allow.
        """
        if stage not in (0, 1, 2, 3):
            raise PlanError(f"zero_stage is {stage}; it is one of 0, 1, 2, 3.")
        tiers = {}
        devices: dict[Offloaded, str] = {"optimizer": offload_optimizer, "param": offload_param}
        for role, device in devices.items():
            if device not in DEVICES:
                raise PlanError(f"offload_{role}_device is {device!r}; it is one of {', '.join(DEVICES)}.")
            problem = refused_offload(role, device, stage)
            if problem is not None:
                raise PlanError(f"offload_{role}_device: {problem}.")
            tiers[role] = DEVICES[device]
        weights = Placement(stage >= 3, tiers["param"])
        optimizer = Placement(stage >= 1, tiers["optimizer"])
        offloaded = stage >= 2 and optimizer.tier is not Tier.GPU
        gradient = Placement(stage >= 2, Tier.CPU if offloaded else Tier.GPU)
        return cls(frozen=weights, parameter=weights, gradient=gradient, optimizer=optimizer)

    @property
    def stage(self) -> int:
        """The ZeRO stage that shards these roles."""
        return sum(placement.sharded for placement in (self.parameter, self.gradient, self.optimizer))

    def with_whole_parameters(self) -> Plan:
        """The same plan with trainable weights whole on the gpu: for adapters, which are tiny beside what they adapt."""
        return replace(self, parameter=Placement(False, Tier.GPU))

    def __str__(self) -> str:
        return ", ".join(f"{role} {getattr(self, role)}" for role in ("frozen", "parameter", "gradient", "optimizer"))
