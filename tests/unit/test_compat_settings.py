"""A DeepSpeed configuration as settings: what acts, what is a hint, what is refused by name."""

from __future__ import annotations

import base64
import json

import pytest
import torch

from shardwise.compat.deepspeed import settings
from shardwise.config.check import checked
from shardwise.config.schema import Config
from shardwise.errors import ConfigError
from shardwise.run.deepspeed_sections import make_optimizer, make_scheduler


def read(values, world_size=2, base=None):
    return settings.read(values, world_size, base=base or Config())


def test_a_path_a_dictionary_and_base64_say_the_same(tmp_path):
    values = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "comment": 300 * "long "}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    text = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
    for source in (values, path, str(path), text):
        found = read(source)
        assert (found.stage, found.clipping, found.raw) == (2, 0.5, values)


def test_what_is_no_configuration_is_refused(tmp_path):
    for source, said in (("no/such/file.json", "no such file"), (3, "is a int"), (str(tmp_path), "is a directory")):
        with pytest.raises(ConfigError, match=said):
            read(source)


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ({}, (None, None, 1)),
        ({"train_batch_size": 16}, (16, 8, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, (8, 4, 1)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 2}, (16, 4, 2)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, (16, 2, 4)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (12, 2, 3)),
        ({"train_batch_size": "auto", "gradient_accumulation_steps": 4}, (None, None, 4)),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (12, 2, 3)),
    ],
)
def test_two_batch_sizes_give_the_third(said, sizes):
    assert read(said).batch == sizes


def test_who_shards_is_deepspeeds_mics_and_its_hpz():
    def group(stage=3, base=None, **section):
        zero = read({"zero_optimization": {"stage": stage, **section}}, base=base).config.zero
        return zero.shard_group if zero.optimizer_shard_group == "shard_group" else (zero.shard_group, "world")

    def notes(**section):
        return [n for n in read({"zero_optimization": section}).notes if "zero_hpz" in n]

    assert group(mics_shard_size=8, mics_hierarchical_params_gather=True) == 8
    assert group(zero_hpz_partition_size=8) == (8, "world")
    assert group(mics_shard_size=-1, zero_hpz_partition_size=1) == "world"
    assert group(stage=2, zero_hpz_partition_size=8) == "world"
    assert notes(stage=3, zero_hpz_partition_size=8) == []
    assert "no effect here: zero_optimization.zero_hpz_partition_size" in notes(stage=2, zero_hpz_partition_size=8)[0]
    launched = checked({"distributed_type": "DEEPSPEED", "deepspeed_config": {"shard_group": "machine"}})
    assert group(base=launched) == "machine"
    said = {"zero_stage": 3, "shard_group": "machine", "optimizer_shard_group": "world"}
    assert group(base=checked({"distributed_type": "DEEPSPEED", "deepspeed_config": said})) == ("machine", "world")
    assert group(base=launched, mics_shard_size=4) == 4


def test_batch_sizes_that_contradict_are_refused():
    said = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    with pytest.raises(ConfigError, match=r"micro_batch_per_gpu \* gradient_acc_step \* world_size: 10 != 2 \* 3 \* 2"):
        read(said)
    with pytest.raises(ConfigError, match="not a whole number"):
        read({"train_batch_size": 2.5})


def test_clipping_is_deepspeeds_1_where_nothing_is_said():
    assert (read({}).clipping, read({}).clips_unsaid) == (1.0, True)
    assert (read({"gradient_clipping": "auto"}).clipping, read({"gradient_clipping": "auto"}).clips_unsaid) == (
        1.0,
        True,
    )
    assert (read({"gradient_clipping": 0}).clipping, read({"gradient_clipping": 0}).clips_unsaid) == (0.0, False)
    assert read({"gradient_clipping": 0.3}).clipping == 0.3


def test_what_is_still_auto_says_nothing():
    auto = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale_window": 500, "hysteresis": 2},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto", "offload_param": {"device": "auto"},
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }  # fmt: skip
    found = read(auto)
    assert found.stage == 3
    assert found.precision.compute is None
    assert not found.gathers_on_save
    assert found.config.zero.offload_param_device == "none"
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr: is still 'auto'"):
        make_optimizer(auto["optimizer"], [torch.zeros(2, requires_grad=True)])


def test_a_key_with_dots_belongs_into_its_section():
    dotted = {
        "zero_optimization.reduce_bucket_size": 3,
        "zero_optimization.stage": 1,
        "zero_optimization": {"stage": 3},
    }
    assert read(dotted).stage == 3
    with pytest.raises(ConfigError, match=r"zero_optimization\.reduce_bucket: unknown key"):
        read({"zero_optimization.reduce_bucket": 3})


def test_precision_and_loss_scale():
    assert read({"bf16": {"enabled": True}}).precision.compute is torch.bfloat16
    both = {"bf16": {"enabled": True}, "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 7}}
    assert read(both).precision.compute is torch.bfloat16
    found = read({"fp16": {"enabled": True, "initial_scale_power": 4, "min_loss_scale": 2}})
    scaler = found.scaler()
    assert (scaler.value, scaler.growth_interval, scaler.min_scale, scaler.dynamic) == (16.0, 1000, 2.0, True)
    static = read({"fp16": {"enabled": True, "loss_scale": 8}}).scaler()
    assert (static.value, static.dynamic) == (8.0, False)
    with pytest.raises(ConfigError, match="cannot both"):
        read({"bf16": {"enabled": True}, "fp16": {"enabled": True}})


def test_devices_that_deepspeed_does_not_look_at_are_a_note():
    found = read(
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}
    )
    assert (found.config.zero.offload_param_device, found.config.zero.offload_optimizer_device) == ("none", "cpu")
    assert any("offload_param: no effect at stage 2" in note for note in found.notes)


def test_stage_and_devices_make_the_plan():
    found = read(
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    )
    assert found.plan.parameter.sharded
    assert found.config.zero.offload_param_device == "cpu"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"amp": {"enabled": True}}, "amp: NVIDIA apex"),
        ({"compression_training": {"x": 1}}, "compression_training: is not supported"),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 4.5}},
            r"mics_shard_size: 4\.5 is not world, machine or a",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 4, "zero_hpz_partition_size": 8}},
            "zero_hpz_partition_size: mics_shard_size says who shards too",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients: quantized"),
        ({"zero_optimization": {"stge": 3}}, "did you mean stage"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage"),
        ({"shardwise": {"gpu_memory": "1GB"}}, r"shardwise\.gpu_memory: unknown key"),
        ({"shardwise": 3}, "shardwise: is not an object"),
        ({"shardwise": {"gpu_memory_budget": "much"}}, "gpu_memory_budget"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(values, said):
    with pytest.raises(ConfigError, match=said):
        read(values)


def test_shardwises_own_section_lies_over_the_launchers_settings():
    base = checked({"shardwise_config": {"fast_lora": False, "prefetch_units": 2}, "use_cpu": True})
    own = {"gpu_memory_budget": "2GB", "activation_checkpointing": "auto", "fast_lora": True, "loss_chunk_tokens": 64}
    found = read({"zero_optimization": {"stage": 3}, "shardwise": {**own, "compile": "eager"}}, base=base).config
    assert (found.engine.fast_lora, found.engine.prefetch_units, found.use_cpu) == (True, 2, True)
    assert (found.engine.gpu_memory_budget, found.engine.loss_chunk_tokens) == (2 * 10**9, 64)
    assert found.engine.activation_checkpointing == "auto"
    assert found.compiling is not None
    assert found.compiling.dynamo_backend == "eager"


def test_optimizer_sections():
    weights = [torch.ones(3, requires_grad=True)]
    made = make_optimizer({"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.2, "betas": [0.8, 0.9]}}, weights)
    group = made.param_groups[0]
    assert type(made) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["decoupled_weight_decay"]) == (0.1, (0.8, 0.9), True)
    coupled = make_optimizer({"type": "Adam", "params": {"adam_w_mode": False}}, weights)
    assert coupled.param_groups[0]["decoupled_weight_decay"] is False
    assert type(make_optimizer({"type": "AdamW", "params": {"torch_adam": True}}, weights)) is torch.optim.AdamW
    assert type(make_optimizer({"type": "SGD", "params": {"lr": 1, "momentum": 0.9}}, weights)) is torch.optim.SGD
    assert type(make_optimizer({"type": "Adagrad"}, weights)) is torch.optim.Adagrad
    for section, said in (
        ({"type": "Lamb"}, "Lamb cannot work on shards"),
        ({"type": "OneBitAdam"}, "OneBitAdam cannot work on shards"),
        ({"type": "Nonesuch"}, "Nonesuch is unknown"),
        ({"type": "AdamW", "params": {"max_grad_norm": 1}}, "write gradient_clipping"),
        ({"type": "AdamW", "params": {"learning_rate": 1}}, "learning_rate is not one of its arguments"),
        ({"type": "AdamW", "params": {"bias_correction": False}}, "bias_correction is False"),
        ({"params": {}}, r"optimizer\.type"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_optimizer(section, weights)


def test_lion_takes_the_published_step():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = make_optimizer(
        {"type": "Lion", "params": {"lr": 0.1, "betas": [0.9, 0.99], "weight_decay": 0.5}}, [weight]
    )
    value, momentum = weight.detach().clone(), torch.zeros(3)
    for gradient in (torch.tensor([0.3, -0.1, 0.0]), torch.tensor([-5.0, 0.2, 0.1])):
        weight.grad = gradient.clone()
        optimizer.step()
        value = value - 0.1 * (torch.sign(0.9 * momentum + 0.1 * gradient) + 0.5 * value)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(weight.detach(), value)


def test_scheduler_sections():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    made = make_scheduler({"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 10}}, optimizer)
    assert type(made).__name__ == "WarmupLR"
    torchs = make_scheduler({"type": "StepLR", "params": {"step_size": 2}}, optimizer)
    assert isinstance(torchs, torch.optim.lr_scheduler.StepLR)
    for section, said in (
        ({"type": "Nonesuch"}, "Nonesuch is unknown"),
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 0}}, "at least 1"),
        ({"type": "WarmupDecayLR", "params": {}}, "total_num_steps"),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}, "still 'auto'"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_scheduler(section, optimizer)
