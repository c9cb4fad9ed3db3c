"""The engines that are compared: the same model, optimizer and step, sharded by DDP, FSDP2, DeepSpeed or shardwise.

An engine is written as a word with options, `NAME[:STAGE][+OPTION...]`, and builds a `Trainee`: a model that is called,
and an optimizer that steps. The step itself is one function for all of them, so that nothing but the engine differs.

    plain                    no communication: each rank trains alone; the bound that hiding all of it would reach
    ddp                      DistributedDataParallel; adapters in bf16, and full weights in fp32 under bf16 autocast
    ddp32                    adapters in fp32, PEFT's default, computed in fp32
    ddpamp                   adapters in fp32 under bf16 autocast, as `mixed_precision: bf16` of accelerate does
    fsdp2[+ends][+cpu]       fully_shard on every block and the root; +ends: the embedding and the head are groups too;
                             +cpu: CPUOffloadPolicy (parameters, gradients and the optimizer on the host)
    deepspeed:S[+opt][+param]
                             ZeRO stage S (1 to 3), where the package can be imported; see deepspeed_engine.py
    shardwise:S[+opt][+param][+nvme][+budget][+clip][+loss][+logits][+lora][+recompute][+graphs][+nccl][+serial][+prefetchN]
                             ZeRO stage S (0 to 3); +opt and +param put the optimizer and the parameters on the host,
                             with +nvme on the drive below $TMPDIR; +budget lets stay on the device what fits; +clip clips
                             to a global norm of 1; +loss computes the loss of a causal model in chunks, +logits does
                             so from logits that stay; +lora runs the LoRA linears on their fast path; +recompute recomputes
                             only as many blocks as the device's memory needs, in place of the case's checkpointing;
                             +graphs records compiled blocks as CUDA graphs; +nccl gathers weights by NCCL, not by copy
                             engines; +serial lets nothing overlap; +bf16states and +int8states let offloaded moments
                             travel and rest as codes

Every engine takes +compile, torch.compile of each block by inductor, or +aot, the same without its kernels: for a CPU. All but
fsdp2 take +muon: torch's Muon for the matrices of the blocks and AdamW for the rest, as two optimizers, or DeepSpeed's own.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cases import Case
from place import Place
from words import STATE_DTYPES, Word

_OPTIONS = ("opt", "param", "nvme", "budget", "clip", "loss", "logits", "lora", "recompute", "graphs", "nccl", "serial")
_KINDS: dict[str, tuple[str, ...]] = {
    "plain": ("muon",),
    "ddp": ("muon",),
    "ddp32": ("muon",),
    "ddpamp": ("muon",),
    "fsdp2": ("ends", "cpu"),
    "deepspeed": ("opt", "param", "muon"),
    "shardwise": (*_OPTIONS, *STATE_DTYPES, "muon"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Trainee:
    """A model ready to train.

    forward:  what is called with a batch; returns an object with a `loss`.
    autocast: run the forward under bf16 autocast.
    ledger:   shardwise's bytes at rest by (role, tier), else empty.
    keep:     objects that must live as long as the training does.
    others:   optimizers that step beside `optimizer`.
    backward: the engine's own, where loss.backward() is not enough. finish: its own step, which also drops gradients.
    """

    forward: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    device: torch.device
    autocast: bool = False
    ledger: Callable[[], dict[Any, int]] = dict
    keep: tuple[Any, ...] = ()
    backward: Callable[[Tensor], Any] | None = None
    finish: Callable[[], Any] | None = None
    others: Sequence[torch.optim.Optimizer] = ()

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One whole training step without clipping; gives this rank's loss, detached, without waiting for it."""
        amp = torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with amp:
            loss = self.forward(**batch).loss
        if self.backward is None:
            loss.backward()
        else:
            self.backward(loss)
        if self.finish is None:
            for optimizer in (self.optimizer, *self.others):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        else:
            self.finish()
        return loss.detach()


class Engine(Word):
    """One word of `--engines`, and what it builds."""

    @classmethod
    def parse(cls, text: str) -> Engine:
        """Raises ValueError for a word that names no engine."""
        return cls.taken_apart(text, _KINDS)

    @property
    def numbers(self) -> tuple[str | None, frozenset[str]]:
        """What engines must have in common to have the same losses, but for rounding."""
        return self.backend, self.options & {"muon", *STATE_DTYPES}

    def build(self, case: Case, place: Place, reduce_dtype: str) -> Trainee:
        """Build the model of `case` on this rank and shard it.

        reduce_dtype: "fp32" or "bf16", the dtype in which FSDP2 and shardwise average gradients; DDP averages them in
        the dtype of the weights that it trains.
        """
        if self.kind == "fsdp2":
            return self._fsdp2(case, place, reduce_dtype)
        if self.kind == "shardwise":
            return self._shardwise(case, place, reduce_dtype)
        if self.kind == "deepspeed":
            return self._deepspeed(case, place)
        return self._whole(case, place)

    def _whole(self, case: Case, place: Place) -> Trainee:
        full = case.lora_rank is None
        if full and self.kind == "ddp32":
            raise ValueError(f"{case.name} trains every weight: it has no adapters for ddp32; use ddp")
        in_fp32 = full or self.kind in ("ddp32", "ddpamp")
        model = case.build(place.device, torch.float32 if in_fp32 else torch.bfloat16)
        compile_blocks(model, case, self.backend)
        optimizer, *others = self._optimizers(model, case)
        autocast = full or self.kind == "ddpamp"
        if self.kind == "plain":
            return Trainee(model, optimizer, place.device, autocast, others=others)
        from torch.nn.parallel import DistributedDataParallel

        # The rotary table never changes: sending it at every step would slow DDP for nothing. torch 2.13 renamed this.
        known = inspect.signature(DistributedDataParallel.__init__).parameters
        no_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        wrapped = DistributedDataParallel(
            model, device_ids=[place.device] if place.cuda else None, gradient_as_bucket_view=True, **no_buffers
        )
        return Trainee(wrapped, optimizer, place.device, autocast, others=others)

    def _fsdp2(self, case: Case, place: Place, reduce_dtype: str) -> Trainee:
        model = case.build(place.device)
        compile_blocks(model, case, self.backend)
        fully_sharded(model, case, place, self.options, reduce_dtype=DTYPES[reduce_dtype])
        return Trainee(model, _adamw(model, case), place.device)

    def _shardwise(self, case: Case, place: Place, reduce_dtype: str) -> Trainee:
        from shardwise.config.compiling import CompileConfig
        from shardwise.config.sections import EngineConfig
        from shardwise.plan.plan import Plan
        from shardwise.plan.precision import LossScaler, Precision
        from shardwise.step.optimizer import ShardedOptimizer
        from shardwise.tuning.compiling import CompiledBlocks, CompiledLoss
        from shardwise.tuning.lora import FastLora
        from shardwise.tuning.losses import LeanLoss, LogitsLoss
        from shardwise.tuning.recomputing import RecomputedBlocks, blocks_to_recompute
        from shardwise.zero.sharded import ShardedModel

        assert self.stage is not None
        places = {
            f"offload_{role}": "nvme" if "nvme" in self.options else "cpu"
            for role, option in (("optimizer", "opt"), ("param", "param"))
            if option in self.options
        }
        plan = Plan.from_stage(self.stage, **places)
        precision = Precision.named("bf16", reduce_dtype=reduce_dtype)
        recompute = "recompute" in self.options
        model = (replace(case, checkpointing=False) if recompute else case).build(place.device)
        # Before the model is sharded, as `prepare` does all of it.
        lean: tuple[LeanLoss | LogitsLoss, ...] = (LeanLoss(model),) if "loss" in self.options else ()
        lean = (LogitsLoss(model),) if "logits" in self.options else lean
        lora = (FastLora(model),) if "lora" in self.options and not self.backend else ()
        recomputed = blocks_to_recompute(model, "auto") if recompute else []
        blocks = blocks_of(model, case) if self.backend else []
        optimizer, *others = self._optimizers(model, case)
        states = [STATE_DTYPES[option] for option in self.options if option in STATE_DTYPES]
        sharded = ShardedModel(
            model,
            plan=plan,
            ranks=place.ranks,
            precision=precision,
            options=EngineConfig(
                prefetch_units=self.prefetch,
                gpu_memory_budget="auto" if "budget" in self.options else None,
                gather_with="nccl" if "nccl" in self.options else "auto",
                optimizer_state_dtype=states[0] if states else "fp32",
            ),
            nvme_paths=dict.fromkeys(("param", "optimizer"), tempfile.gettempdir()),
            serial="serial" in self.options,
        )
        clipping = 1.0 if "clip" in self.options else None
        scaler = LossScaler.for_precision(precision)
        steppers = [
            ShardedOptimizer(each, [sharded], scaler=scaler, gradient_clipping=clipping)
            for each in (optimizer, *others)
        ]
        mode = "reduce-overhead" if "graphs" in self.options else "default"
        settings = CompileConfig(dynamo_backend=self.backend, dynamo_mode=mode) if self.backend else None
        compiled = CompiledBlocks(blocks, settings, sharded)
        compiled_loss = CompiledLoss(model, settings if not lean else None)
        # A CPU has no peak to measure: there every block is kept.
        budget = "auto" if place.cuda else 1 << 40
        changed = (RecomputedBlocks(recomputed, sharded, budget),) if recompute else ()
        keep = (sharded, *steppers, compiled, compiled_loss, *lean, *lora, *changed)
        return Trainee(model, optimizer, place.device, ledger=sharded.ledger, keep=keep, others=others)

    def _deepspeed(self, case: Case, place: Place) -> Trainee:
        from deepspeed_engine import initialize

        assert self.stage is not None
        model = case.build(place.device)
        if self.stage < 3:
            compile_blocks(model, case, self.backend)
        optimizer = None if "muon" in self.options else _adamw(model, case)
        whole = self.backend if self.stage == 3 else None
        offloaded = self.options & {"opt", "param"}
        rate = case.learning_rate
        engine = initialize(model, optimizer, self.stage, offloaded, rows=case.rows, compile_backend=whole, rate=rate)
        return Trainee(
            engine,
            optimizer or engine.optimizer,
            place.device,
            keep=(engine,),
            backward=engine.backward,
            finish=engine.step,
        )

    def _optimizers(self, model: nn.Module, case: Case) -> list[torch.optim.Optimizer]:
        """AdamW for all, or what Muon is for apart from the rest."""
        if "muon" not in self.options:
            return [_adamw(model, case)]
        inside = {p for block in blocks_of(model, case) for p in block.parameters() if p.requires_grad and p.ndim == 2}
        matrices = [p for p in model.parameters() if p in inside]
        muon = torch.optim.Muon(matrices, lr=case.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        others = [p for p in model.parameters() if p.requires_grad and p not in inside]
        return [muon, torch.optim.AdamW(others, lr=case.learning_rate, weight_decay=0.0, fused=True)]


def compile_blocks(model: nn.Module, case: Case, backend: str | None) -> None:
    """Compile every block in place, as torch's own guides do before they shard a model. backend: None compiles nothing."""
    for block in blocks_of(model, case) if backend else ():
        block.compile(backend=backend)


def fully_sharded(
    model: nn.Module,
    case: Case,
    place: Place,
    options: Collection[str],
    *,
    reduce_dtype: torch.dtype,
    compute_dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Shard `model` in place by FSDP2, every block and the root: fp32 shards of what is trained.

    options:       of "ends" and "cpu". reduce_dtype: in which gradients are averaged.
    compute_dtype: in which weights are gathered; None for that of the shards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    settings: dict[str, Any] = {
        "mesh": init_device_mesh(place.device.type, (place.world_size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype),
        "offload_policy": CPUOffloadPolicy(pin_memory=place.cuda) if "cpu" in options else OffloadPolicy(),
    }
    for module in blocks_of(model, case):
        fully_shard(module, **settings)
    if "ends" in options:
        if case.family == "bart" or case.shape["tie_word_embeddings"]:
            raise ValueError(f"{case.name} ties the embedding to the head: they cannot be two groups of FSDP2")
        fully_shard(model.get_input_embeddings(), **settings)
        fully_shard(model.get_output_embeddings(), **settings)
    fully_shard(model, **settings)


def blocks_of(model: nn.Module, case: Case) -> list[nn.Module]:
    """The repeated blocks of `model`, in order. Raises ValueError if there is none."""
    found = [module for module in model.modules() if type(module).__name__ in case.blocks]
    if not found:
        raise ValueError(f"{case.name}: no module is a {' or '.join(case.blocks)}")
    return found


def _adamw(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=case.learning_rate, weight_decay=0.0, fused=True)


def mean_over_ranks(losses: list[Tensor], place: Place) -> list[float]:
    """The mean of each loss over the ranks, on every rank; waits for the device."""
    stacked = torch.stack(losses).double()
    if dist.is_initialized():
        dist.all_reduce(stacked)
    return (stacked / place.world_size).tolist()
