"""How a model goes to the engine and comes back: sharded by the settings of a run, with all that is done to it beside that.

    connect            methods of the libraries that it comes from
    FastLora           LoRA layers that compute in fewer passes
    CompiledBlocks     its blocks under torch.compile
    RecomputedBlocks   activations that its backward makes again
    LeanLoss           logits that are never whole
    Fp32Outputs, MastersInStateDicts   fp32 for the script's eyes, where 16 bits compute

Whoever prepares models calls this: an Accelerator, and what answers for other libraries. The objects stay the user's own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..building.deferred_tensors import deferred_if_it_fails, sources_of
from ..building.loading import build_without_memory
from ..config.foreign import note_prepared
from ..config.offloads import Directories, directories_of
from ..config.schema import Config, ZeroConfig
from ..plan.plan import Plan
from ..plan.precision import Precision
from ..plan.units import FoundUnits
from ..ranks.ranks import Ranks
from ..tuning.blocks import ReplacedForwards
from ..tuning.compiling import CompiledBlocks, CompiledLoss, blocks_to_compile
from ..tuning.lora import FastLora
from ..tuning.losses import LeanLoss, LogitsLoss, check_loss
from ..tuning.outputs import Fp32Outputs
from ..tuning.recomputing import RecomputedBlocks, blocks_to_recompute
from ..weights.integrations import connect
from ..zero.engine import Kind
from ..zero.masters import MastersInStateDicts
from ..zero.sharded import ShardedModel

logger = logging.getLogger("shardwise")

Change = ReplacedForwards | LeanLoss | LogitsLoss | CompiledLoss | Fp32Outputs | MastersInStateDicts


class PreparedModel:
    """A model in the engine, and the parameters that it had when it went in.

    changes: what was done to the model beside sharding it. quiet: how many no_sync blocks are open; triggered: how many
    trigger_sync_in_backward.
    """

    def __init__(
        self, model: nn.Module, sharded: ShardedModel, changes: Sequence[Change], parameters: list[nn.Parameter]
    ) -> None:
        self.model = model
        self.sharded = sharded
        self.changes = list(changes)
        self.parameters = parameters
        self.ids = {id(parameter) for parameter in parameters}
        self.quiet = self.triggered = 0

    def give_own_outputs(self) -> None:
        """Leave outputs in the dtype in which the model computes, from now on."""
        for change in [change for change in self.changes if isinstance(change, Fp32Outputs)]:
            change.undo()
            self.changes.remove(change)

    def release(self) -> None:
        """Undo all of it: see `ShardedModel.release`. Collective."""
        for change in reversed(self.changes):
            change.undo()
        self.sharded.release()


@dataclass(frozen=True)
class CheckedModel:
    """A model that the settings of a run can act on, and what was found of it while nothing was changed.

    units: where its weights belong. compiled, recomputed: the blocks that are to be compiled, and to be recomputed.
    """

    model: nn.Module
    units: FoundUnits
    compiled: list[nn.Module]
    recomputed: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module, config: Config) -> CheckedModel:
        """Look through a model that is not sharded yet, once.

        Raises PrepareError where the settings ask for something that cannot be done to this model.
        """
        engine = config.engine
        units = FoundUnits.of(model, engine.units)
        compiled = blocks_to_compile(model, units) if config.compiling is not None else []
        recomputed: list[nn.Module] = []
        if engine.activation_checkpointing != "none":
            recomputed = blocks_to_recompute(model, engine.activation_checkpointing, units)
        if engine.loss_chunk_tokens is not None:
            check_loss(model)
        return cls(model, units, compiled, recomputed)


def into_engine(
    checked: CheckedModel,
    config: Config,
    plan: Plan,
    precision: Precision,
    ranks: Ranks,
    *,
    trains: bool = True,
    in_fp32: bool = False,
) -> PreparedModel:
    """Shard the model by the settings of the run, which it was checked for. Collective.

    trains: False for a model that no optimizer steps; see ShardedModel.
    in_fp32: where it computes in 16 bits, its outputs and the masters in its state dicts are in fp32.
    Raises PrepareError on every rank.
    """
    model, engine, zero = checked.model, config.engine, config.zero
    if zero.zero_stage:  # else nothing is divided
        ranks = ranks.divided(zero.shard_group, all_own=zero.optimizer_shard_group == "world")
    parameters = list(model.parameters())
    dtypes = {id(parameter): parameter.dtype for parameter in parameters}
    if engine.activation_checkpointing != "none" and not checked.recomputed and ranks.rank == 0:
        logger.warning(
            "activation_checkpointing: this %s recomputes its blocks by itself, which is left as it is.",
            type(model).__name__,
        )
    if zero.shard_group != "world" and zero.zero_stage == 0 and ranks.rank == 0:
        logger.warning("shard_group: has no effect at zero_stage 0: nothing is sharded.")
    if zero.optimizer_shard_group != "shard_group" and ranks.owners is ranks.shards and ranks.rank == 0:
        logger.warning("optimizer_shard_group: has no effect: one group of ranks holds all of the model.")
    sources = ranks.together(lambda: sources_of(model))
    build_without_memory(False)
    if zero.zero3_init_flag and zero.zero_stage == 3 and not sources and ranks.rank == 0:
        logger.warning(
            "zero3_init_flag had no effect on this %s: it was built whole. Import transformers before Accelerator(), and "
            "call from_pretrained or from_config after it; or build the model inside `with accelerator.init():`.",
            type(model).__name__,
        )
    with deferred_if_it_fails(model):
        sharded = ShardedModel(
            model,
            plan=plan,
            ranks=ranks,
            precision=precision,
            options=engine,
            found=checked.units,
            nvme_paths=_nvme_paths(zero),
            sources=sources,
            trains=trains,
        )
    connect(model)
    changes = _changes(checked, config, sharded)
    if in_fp32 and precision.compute is not None:
        changes += [Fp32Outputs(model), MastersInStateDicts(sharded, dtypes)]
    note_prepared(type(model).__name__)
    return PreparedModel(model, sharded, changes, parameters)


def _nvme_paths(zero: ZeroConfig) -> dict[Kind, Directories]:
    return {
        "param": directories_of(zero.offload_param_nvme_path),
        "optimizer": directories_of(zero.offload_optimizer_nvme_path),
    }


def _changes(checked: CheckedModel, config: Config, sharded: ShardedModel) -> list[Change]:
    """Do to the model what the settings ask for beside sharding it."""
    model, blocks, recomputed, engine = checked.model, checked.compiled, checked.recomputed, config.engine
    changes: list[Change] = []
    # Not under a compiler, which sees and fuses the passes, and would make a graph of each replaced layer.
    if engine.fast_lora is True and config.compiling is None:
        fast = FastLora(model)
        if not fast.count and sharded.ranks.rank == 0:
            logger.warning("fast_lora: has no effect; %s has no LoRA layer over a linear.", type(model).__name__)
        changes.append(fast)
    always = bool(recomputed) and engine.activation_checkpointing == "all"
    changes.append(CompiledBlocks(blocks, config.compiling, sharded, recompute=always))
    if recomputed and not (blocks and always):
        budget = engine.gpu_memory_budget or "auto" if engine.activation_checkpointing == "auto" else None
        changes.append(RecomputedBlocks(recomputed, sharded, budget))
    if engine.loss_chunk_tokens is not None:
        in_chunks = LogitsLoss if engine.loss_keeps_logits else LeanLoss
        changes.append(in_chunks(model, engine.loss_chunk_tokens))
    else:
        changes.append(CompiledLoss(model, config.compiling))
    return changes
