"""Directories on drives in the settings: one path, or several, in every place where they are said."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from rig.tiny import tiny
from shardwise.cli import as_deepspeed, model_run
from shardwise.config.accelerate_variables import configuration
from shardwise.config.check import checked, from_environment
from shardwise.config.offloads import directories_of
from shardwise.config.resolve import resolve
from shardwise.config.schema import ENVIRONMENT_KEY, Config
from shardwise.config.yaml_file import parse_yaml, to_yaml
from shardwise.errors import ConfigError, StoreError
from shardwise.estimate.bytes import Choice, Disk, Machine, Run, estimate
from shardwise.plan.plan import Plan, Tier
from shardwise.run.deepspeed_plugin import DeepSpeedPlugin
from shardwise.zero.engine import directories

NAMES = ("offload_optimizer_nvme_path", "offload_param_nvme_path")
BOTH = {"zero_stage": 3, "offload_optimizer_device": "nvme", "offload_param_device": "nvme"}


def config_of(path, **more) -> Config:
    zero = BOTH | dict.fromkeys(NAMES, path) | more
    return checked({"distributed_type": "DEEPSPEED", "use_cpu": True, "deepspeed_config": zero})


@pytest.mark.parametrize(
    ("said", "paths"),
    [
        ("/a", ("/a",)),
        (["/a"], ("/a",)),
        (["/a", "/b"], ("/a", "/b")),
        ("/a, /b", ("/a", "/b")),
        (["/with,comma"], ("/with,comma",)),
        (["/with,comma", "/b"], ("/with,comma", "/b")),
    ],
)
def test_one_path_or_several_are_the_same_wherever_they_have_been_written(said, paths) -> None:
    config = config_of(said)
    found = [config]
    found.append(checked(parse_yaml(to_yaml(config), "run.yaml").values))
    found.append(from_environment({ENVIRONMENT_KEY: json.dumps(config.to_values())}))
    found.append(found[-1].model_validate(found[-1].to_values()))
    for one in found:
        assert [directories_of(getattr(one.zero, name)) for name in NAMES] == [paths, paths]
    assert isinstance(config.zero.offload_param_nvme_path, str) == (paths == ("/a",)), "one path is a text, as ever"
    plan = Plan.from_stage(3, offload_optimizer="nvme", offload_param="nvme")
    given = {"param": config.zero.offload_param_nvme_path, "optimizer": config.zero.offload_optimizer_nvme_path}
    assert directories(plan, given) == {(Tier.NVME, "param"): paths, (Tier.NVME, "optimizer"): paths}


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (["/a", "/a"], "/a is there twice; name each directory once"),
        ("/a,/b,/a/", "/a is there twice; name each directory once"),
        ([os.path.expanduser("~/x"), "~/x"], "is there twice"),
        (["/a", ""], "has an empty path in it"),
        ("/a,", "has an empty path in it"),
        ([], "is neither a path in quotes nor a list of such"),
        (["/a", 5], "is neither a path in quotes nor a list of such"),
        (5, "is neither a path in quotes nor a list of such"),
        ({"a": 1}, "is neither a path in quotes nor a list of such"),
    ],
)
def test_what_is_no_list_of_paths_is_told_in_one_sentence(said, text) -> None:
    with pytest.raises(ConfigError) as told:
        config_of(said)
    assert str(told.value).splitlines() == [line for line in str(told.value).splitlines() if text in line]
    assert len(str(told.value).splitlines()) == 2, "one for each setting"


@pytest.mark.parametrize("empty", [None, "", "none"])
def test_no_path_is_told_where_the_device_needs_one(empty) -> None:
    with pytest.raises(ConfigError, match="offload_param_nvme_path: is needed for the device nvme"):
        config_of(empty)
    plan = Plan.from_stage(3, offload_param="nvme")
    for given in ({}, {"param": ""}, {"param": []}):
        with pytest.raises(StoreError, match="offload_param_nvme_path is needed for the device nvme"):
            directories(plan, given)


def test_flags_have_several_with_commas() -> None:
    config = resolve({"zero_stage": "3", "offload_param_device": "nvme", NAMES[1]: "/a,/b"}).config
    assert config.zero.offload_param_nvme_path == ["/a", "/b"]


def test_a_deepspeed_file_has_one_path_whatever_is_in_it_or_a_list(tmp_path) -> None:
    for said, paths in (("/a,/b", ("/a,/b",)), ("/a", ("/a",)), (["/a", "/b"], ("/a", "/b"))):
        section = {"device": "nvme", "nvme_path": said}
        content = {"zero_optimization": {"stage": 3, "offload_param": section}}
        (tmp_path / "ds.json").write_text(json.dumps(content))
        found = resolve({"deepspeed_config_file": str(tmp_path / "ds.json")}).config
        assert directories_of(found.zero.offload_param_nvme_path) == paths


def test_a_variable_of_accelerate_has_one_path_whatever_is_in_it(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH", "/a,/b")
    assert directories_of(configuration()[0].zero.offload_param_nvme_path) == ("/a,/b",)


def test_a_script_of_deepspeed_is_told_one_path_or_why_not() -> None:
    for said, path in (("/a", "/a"), (["/with,comma"], "/with,comma")):
        found = as_deepspeed.variables(config_of(said))
        assert found["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH"] == path
    with pytest.raises(ConfigError, match=r"offload_optimizer_nvme_path: /a, /b are several paths, .*--as-deepspeed"):
        as_deepspeed.variables(config_of(["/a", "/b"]))


def test_a_plugin_has_what_is_in_force() -> None:
    config = config_of(["/a", "/b"])
    plugin = DeepSpeedPlugin.in_force(config)
    assert plugin.offload_param_nvme_path == ["/a", "/b"]
    assert plugin.deepspeed_config["zero_optimization"]["offload_param"]["nvme_path"] == ["/a", "/b"]
    assert plugin.merged_into(config, say=False).zero.offload_param_nvme_path == ["/a", "/b"]
    assert DeepSpeedPlugin(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path=["/a", "/b"]).merged_into(
        Config(), say=False
    ).zero.offload_param_nvme_path == ["/a", "/b"]


# Bytes and free space of each.


@pytest.fixture
def machine(monkeypatch):
    """/a and /b are drives of their own; all else lies on a third."""
    drives = {"/a": (1, 100), "/b": (2, 50)}

    def of(path):
        return next((found for name, found in drives.items() if str(path).startswith(name)), (3, 70))

    monkeypatch.setattr(model_run, "file_system", lambda path: of(path)[0])
    monkeypatch.setattr(model_run, "free_disk_bytes", lambda path: of(path)[1])


def disks(optimizer, param=None):
    zero = SimpleNamespace(offload_optimizer_nvme_path=optimizer, offload_param_nvme_path=param)
    return model_run._disks(SimpleNamespace(zero=zero))


def test_each_drive_has_its_part_of_each_role(machine) -> None:
    every = dict.fromkeys(("optimizer", "frozen", "parameter"), 1.0)
    halves = dict.fromkeys(every, 0.5)
    assert disks(None) == [Disk(".", 70, every)]
    assert disks("/a/x") == [Disk("/a/x", 100, every)]
    assert disks(["/a", "/b"], ["/a", "/b"]) == [Disk("/a", 100, halves), Disk("/b", 50, halves)]
    assert disks("/a", ["/b", "/c"]) == [
        Disk("/a", 100, {"optimizer": 1.0}),
        Disk("/b", 50, {"frozen": 0.5, "parameter": 0.5}),
        Disk("/c", 70, {"frozen": 0.5, "parameter": 0.5}),
    ]
    assert disks("/a/x", "/a/y") == [Disk("/a/x and /a/y", 100, every)], "one file system has the bytes of both"


def test_a_drive_that_is_too_small_is_named() -> None:
    with torch.device("meta"):
        model = tiny("llama", "full")
    run_ = Run(world_size=2, local_processes=2, cuda=False)
    found = estimate(model, Choice(3, "nvme", "nvme"), run_)
    total, states = found.taken("disk"), found.taken("disk", ["optimizer"])
    halves = dict.fromkeys(("optimizer", "frozen", "parameter"), 0.5)
    large, small = Disk("/a", total + 10, halves), Disk("/b", total - 10, halves)
    assert large.taken(found) == pytest.approx(total / 2, abs=3)
    (text,) = Machine(disks=[large, small]).shortages(found, run_)
    assert text.startswith("disk /b: ")
    assert Machine(disks=[large, Disk("/b", 2 * states, {"optimizer": 1.0})]).shortages(found, run_) == []
    (text,) = Machine(disks=[Disk("/a", 1, {"optimizer": 1.0, "frozen": 1.0})]).shortages(found, run_)
    assert text.startswith("disk: ")


def test_staging_is_of_each_directory() -> None:
    with torch.device("meta"):
        model = tiny("llama", "full")
    one, two = (
        estimate(model, Choice(3, "nvme", "nvme"), Run(cuda=False, directories=count)).nbytes[
            "offload staging", Tier.CPU
        ]
        for count in (1, 2)
    )
    assert two == 2 * one
