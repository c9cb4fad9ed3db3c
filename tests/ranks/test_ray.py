"""Ray's recipe of docs/machines.md, on a local cluster of two workers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

TOGETHER = [0.7, 0.7]  # 1 - 2 * 0.1 * mean(1, 2)


def _train(config: dict[str, Any]) -> None:
    import torch
    from ray import train
    from torch import nn

    from shardwise import Accelerator, DeepSpeedPlugin

    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(zero_stage=3))
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        accelerator.backward(model(torch.full((1, 2), 1.0 + accelerator.process_index)).sum())
        optimizer.step()
        optimizer.zero_grad()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        found = [round(w, 5) for w in weights["weight"].flatten().tolist()]
        Path(config["file"]).write_text(json.dumps([accelerator.num_processes, found]))
    train.report({"done": 1})


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_workers_of_ray_train_together(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'ray[train]'")
    pytest.importorskip("ray.train.torch", reason="ray is installed without what ray.train needs")
    from ray import cloudpickle
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    try:
        scaling = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
        gloo = TorchConfig(backend="gloo")
        TorchTrainer(
            _train,
            train_loop_config={"file": str(tmp_path / "found.json")},
            torch_config=gloo,
            scaling_config=scaling,
            run_config=RunConfig(storage_path=str(tmp_path)),
        ).fit()
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
    assert json.loads((tmp_path / "found.json").read_text()) == [2, TOGETHER]
