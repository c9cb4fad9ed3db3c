"""The Accelerators that `user.py` compares: which front end is imported, and with which plan one is made.

    ddp                      accelerate, torch's DistributedDataParallel
    fsdp2[+cpu]              accelerate, FullyShardedDataParallelPlugin(fsdp_version=2); +cpu offloads to the host
    deepspeed:S[+opt][+param]
                             accelerate, DeepSpeedPlugin of stage S (1 to 3), the optimizer and the parameters on the host
    shardwise:S[+opt][+param][+nvme][+budget][+bf16states|+int8states][+recompute][+graphs][+lora][+loss|+logits][+nccl][+prefetchN]
                             shardwise, stage S (0 to 3). +opt and +param rest on the host, with +nvme on a drive; +budget
                             leaves on the device what fits; +bf16states and +int8states: how moments rest on the host;
                             +recompute: only as many blocks as memory needs, in place of the case's checkpointing; +graphs:
                             compiled blocks as CUDA graphs; +lora, +loss, +logits, +nccl as in engines.py
    fsdp2-torch[+cpu]        no front end: torch's fully_shard and torch's clipping, behind the same verbs

All take +compile, torch.compile of each block, or +aot for a CPU. All compute in bf16 from fp32 masters, or in fp32 where
the precision is "no", and average gradients in fp32.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import Case
from words import STATE_DTYPES, Word

if TYPE_CHECKING:
    import torch

CLIP = 1.0
KINDS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "fsdp2": ("cpu",),
    "fsdp2-torch": ("cpu",),
    "deepspeed": ("opt", "param"),
    "shardwise": ("opt", "param", "nvme", "budget", *STATE_DTYPES, "recompute", "graphs", "lora", "loss", "logits", "nccl"),
}  # fmt: skip
# An option that means nothing without one of these, or not beside them.
_NEEDS = {"nvme": ("opt", "param"), **dict.fromkeys(STATE_DTYPES, ("opt",)), "graphs": ("compile",)}
# From which stage on something lies in shards that can rest on the host; below it a setting would change nothing.
_FROM_STAGE = {"opt": 1, "param": 3}
_EITHER = (tuple(STATE_DTYPES), ("loss", "logits"), ("compile", "aot"), ("graphs", "recompute"))


@dataclass(frozen=True)
class Settings:
    """What holds for all plans of a run.

    precision:  "bf16" or "no". accumulate: batches of a step. use_cpu: gloo and the CPU.
    folder:     where checkpoints go, the same for all ranks. nvme: a directory on the drive, for +nvme.
    """

    precision: str
    accumulate: int
    use_cpu: bool
    folder: Path
    nvme: Path


def parse(text: str) -> Word:
    """Raises ValueError for a word that is no plan."""
    word = Word.taken_apart(text, KINDS)
    for option, others in _NEEDS.items():
        if option in word.options and not word.options & set(others):
            raise ValueError(f"{text!r}: +{option} means nothing without +{' or +'.join(others)}")
    for option, stage in _FROM_STAGE.items():
        if option in word.options and (word.stage or 0) < stage:
            raise ValueError(f"{text!r}: +{option} means nothing below stage {stage}")
    for pair in _EITHER:
        if set(pair) <= word.options:
            raise ValueError(f"{text!r}: take +{' or +'.join(pair)}")
    return word


def cannot_run(word: Word, settings: Settings, *, saves: bool) -> str | None:
    """Why a plan cannot run here, in words; None if nothing is known against it."""
    from importlib.util import find_spec

    if word.kind == "fsdp2-torch":
        if settings.accumulate > 1 or saves:
            return "torch's loop of this benchmark neither accumulates nor saves"
        return None
    if word.kind == "shardwise":
        return None
    if find_spec("accelerate") is None:
        return "accelerate is not installed"
    if word.kind == "fsdp2" and settings.use_cpu:
        return "accelerate takes no FSDP on a CPU, and would train by DDP"
    if word.kind == "deepspeed" and find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None


def configuration(word: Word, settings: Settings) -> dict[str, Any]:
    """What the YAML file of a shardwise plan says, for `shardwise launch --config_file`."""
    zero: dict[str, Any] = {"zero_stage": word.stage, "gradient_accumulation_steps": settings.accumulate}
    zero["gradient_clipping"] = 0.0  # the script clips
    for option, role in (("opt", "optimizer"), ("param", "param")):
        if option in word.options:
            zero[f"offload_{role}_device"] = "nvme" if "nvme" in word.options else "cpu"
            if "nvme" in word.options:
                zero[f"offload_{role}_nvme_path"] = str(settings.nvme)
    engine: dict[str, Any] = {"prefetch_units": word.prefetch}
    switched = {
        "budget": {"gpu_memory_budget": "auto"},
        **{option: {"optimizer_state_dtype": dtype} for option, dtype in STATE_DTYPES.items()},
        "recompute": {"activation_checkpointing": "auto"},
        "lora": {"fast_lora": True},
        "loss": {"loss_chunk_tokens": 1024},
        "logits": {"loss_chunk_tokens": 1024, "loss_keeps_logits": True},
        "nccl": {"gather_with": "nccl"},
    }
    for option in word.options & set(switched):
        engine |= switched[option]
    said: dict[str, Any] = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": settings.precision,
        "use_cpu": settings.use_cpu,
        "deepspeed_config": zero,
        "shardwise_config": engine,
    }
    if word.backend:
        mode = "reduce-overhead" if "graphs" in word.options else "default"
        said["dynamo_config"] = {"dynamo_backend": word.backend, "dynamo_mode": mode}
    return said


def front_end(word: Word) -> Callable[[Word, Case, Settings], Any]:
    """Import the library of a plan; gives what makes its Accelerator. Raises ImportError where it is not installed."""
    if word.kind == "shardwise":
        from shardwise import Accelerator  # the package loads its parts when they are asked for

        return _of_shardwise
    if word.kind == "fsdp2-torch":
        return TorchLoop
    from accelerate import Accelerator  # noqa: F401

    return _of_accelerate


def _of_shardwise(word: Word, case: Case, settings: Settings) -> Any:
    from shardwise import Accelerator
    from shardwise.plugins import ProjectConfiguration

    if "SHARDWISE_CONFIG" not in os.environ:
        raise RuntimeError(
            f"{word.text}: its settings are a YAML file's. Start it by shardwise launch, as user.py does."
        )
    project = ProjectConfiguration(str(settings.folder), automatic_checkpoint_naming=True, total_limit=1)
    return Accelerator(project_config=project)


def _of_accelerate(word: Word, case: Case, settings: Settings) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, ProjectConfiguration, TorchDynamoPlugin

    from deepspeed_engine import configuration as deepspeed_file

    project = ProjectConfiguration(str(settings.folder), automatic_checkpoint_naming=True, total_limit=1)
    more: dict[str, Any] = {"project_config": project, "cpu": settings.use_cpu, "mixed_precision": settings.precision}
    more["gradient_accumulation_steps"] = settings.accumulate
    if word.backend:
        more["dynamo_plugin"] = TorchDynamoPlugin(backend=word.backend, use_regional_compilation=True)
    if word.kind == "ddp":
        # Buffers that never change are not sent at every step, and gradients are not copied: the fastest DDP there is.
        more["kwargs_handlers"] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    elif word.kind == "fsdp2":
        more["fsdp_plugin"] = _fsdp2_plugin(word, case, settings)
    else:
        assert word.stage is not None
        said = deepspeed_file(
            word.stage,
            word.options & {"opt", "param"},
            case.rows,
            clipping=CLIP,
            bf16=settings.precision == "bf16",
            accumulate=settings.accumulate,
        )
        more["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=said)
    accelerator = Accelerator(**more)
    kind = accelerator.distributed_type.value
    if word.kind != "ddp" and kind not in ("FSDP", "DEEPSPEED"):
        raise RuntimeError(f"{word.text}: accelerate trains by {kind} here, and that is not what was asked for.")
    return accelerator


def _fsdp2_plugin(word: Word, case: Case, settings: Settings) -> Any:
    import torch
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = settings.precision == "bf16"
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(case.blocks),
        reshard_after_forward=True,
        cpu_offload="cpu" in word.options,
        cpu_ram_efficient_loading=False,  # every rank has the weights
        # accelerate's own would average gradients in bf16, and nobody else's here do.
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else torch.float32, reduce_dtype=torch.float32
        ),
    )


class TorchLoop:
    """torch's fully_shard, AdamW and clipping behind the verbs of an Accelerator, for one model and one loader.

    Accumulating and saving are not here. Its group has gloo beside NCCL: the norm of gradients on the host needs it.
    """

    sync_gradients = True

    def __init__(self, word: Word, case: Case, settings: Settings) -> None:
        from place import Place

        self.word, self.case, self.settings = word, case, settings
        self.place = Place.join(use_cpu=settings.use_cpu, host_collectives="cpu" in word.options)
        self.device = self.place.device
        self.process_index, self.num_processes = self.place.rank, self.place.world_size

    def prepare(self, model: Any, optimizer: Any, loader: Any, scheduler: Any) -> tuple[Any, Any, Any, Any]:
        """`model` is sharded in place, `optimizer` trains the shards; the loader gives this rank's batches, on its device."""
        import torch

        from engines import compile_blocks, fully_sharded

        names = {parameter: name for name, parameter in model.named_parameters()}
        compile_blocks(model, self.case, self.word.backend)
        half = torch.bfloat16 if self.settings.precision == "bf16" else None
        fully_sharded(
            model, self.case, self.place, self.word.options, reduce_dtype=torch.float32, compute_dtype=half
        )  # fmt: skip
        sharded = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
        own = list(loader.batch_sampler)[self.process_index :: self.num_processes]
        return model, optimizer, _Moved(torch.utils.data.DataLoader(loader.dataset, batch_sampler=own), self), scheduler

    def accumulate(self, model: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        import torch

        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def end_training(self) -> None:
        self.place.leave()


@dataclass
class _Moved:
    """A loader whose batches are on the device of its loop."""

    loader: Any
    loop: TorchLoop

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.loader:
            yield {name: value.to(self.loop.device, non_blocking=True) for name, value in batch.items()}
