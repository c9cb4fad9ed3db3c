"""The fast path of LoRA linears under the engine: released weights, recomputation, offload, and the setting."""

from __future__ import annotations

import pytest
import torch

from rig.engine import adamw, prepare
from rig.heard import heard
from rig.tiny import batches, checkpointed, share, tiny
from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.config.check import merged
from shardwise.run.process import forget_run
from shardwise.tuning import lora as lora_module
from shardwise.tuning.lora import FastLora
from shardwise.tuning.recomputing import RecomputedBlocks, blocks_to_recompute

STEPS = 4


def _train(ranks, name, plan, precision, recompute, fast):
    torch.manual_seed(0)
    model = tiny(name, "lora")
    if recompute == "transformers":
        model = checkpointed(model, reentrant=False)
    blocks = blocks_to_recompute(model, "all") if recompute == "all" else []
    sharded, _, optimizer = prepare(ranks, model, plan, optimizer=adamw, precision=precision)
    lora = FastLora(model) if fast else None
    recomputed = RecomputedBlocks(blocks, sharded, None)
    losses, taken = [], []
    monkeypatch = pytest.MonkeyPatch()
    apply = lora_module._LoraLinear.apply
    monkeypatch.setattr(lora_module._LoraLinear, "apply", lambda *args: taken.append(1) or apply(*args))
    for batch in batches(name, STEPS, 2 * ranks.world_size):
        loss = model(**share(batch, ranks.rank, ranks.world_size)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with sharded.gathered():
        weights = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    monkeypatch.undo()
    recomputed.undo()
    if lora is not None:
        assert len(taken) == STEPS * lora.count * (1 if recompute == "none" else 2)
        assert lora.count == 2 * len([name for name, _ in model.named_modules() if name.endswith("attn")])
        lora.undo()
    return losses, weights


def _both(ranks, name, plan, precision, recompute):
    losses, weights = _train(ranks, name, plan, precision, recompute, fast=True)
    expected, wanted = _train(ranks, name, plan, precision, recompute, fast=False)
    apart = max((a - b).abs().max().item() for a, b in zip(weights, wanted, strict=True))
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)), apart


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "plan", "precision", "recompute"),
    [
        ("llama", "3", "no", "none"),
        ("llama", "3-all", "no", "all"),
        ("llama", "2", "no", "transformers"),
        ("bart", "3", "no", "all"),
        ("llama", "3", "bf16", "all"),
    ],
)
def test_training_is_that_of_pefts_own_forward(world, name, plan, precision, recompute):
    for loss, weight in world(2).run(_both, name, plan, precision, recompute):
        assert loss <= (1e-6 if precision == "no" else 2e-3)
        assert weight <= (1e-6 if precision == "no" else 1e-2)


def _through_the_accelerator(ranks, tuning, wanted):
    forget_run()
    with heard() as said:
        accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3, mixed_precision="no"))
        accelerator._run.config = merged(accelerator._run.config, fast_lora=wanted)
        model = tiny("llama", tuning)
        accelerator.prepare(model, adamw([p for p in model.parameters() if p.requires_grad]))
        replaced = sum("forward" in vars(module) for module in model.modules())
        accelerator.free_memory()
    left = sum("forward" in vars(module) for module in model.modules())
    return replaced, left, [text for text in said if "fast_lora" in text]


def test_the_setting_is_off_unless_asked_for(world):
    for wanted, replaced in ((None, 0), ("auto", 0), (False, 0), (True, 6)):
        assert world(1).run(_through_the_accelerator, "lora", wanted) == [(replaced, 0, [])]
    [(replaced, _, said)] = world(1).run(_through_the_accelerator, "full", True)
    assert replaced == 0
    assert len(said) == 1
