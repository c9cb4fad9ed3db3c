"""`shardwise estimate --optimizer`: any class by name, what it keeps without memory, and one line for what cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from rig.optimizers import Loop
from shardwise.cli.main import run
from shardwise.errors import ConfigError, OptimizerError
from shardwise.estimate.bytes import CHOICES, Choice, Run, estimate
from shardwise.estimate.keeping import Stepper
from shardwise.estimate.named import KNOWN, named
from shardwise.estimate.steppers import steppers_of
from shardwise.plan.plan import Tier

LARGE = (128256, 4096)
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MODULE = """
import torch

class Halves(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p].setdefault("m", torch.zeros_like(p, dtype=torch.bfloat16)).add_(p.grad.bfloat16())
                    p.sub_(self.state[p]["m"].to(p.dtype), alpha=group["lr"])

def two_groups(params):
    return torch.optim.SGD([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}], lr=1e-2)

class Mean(Halves):  # of all parameters
    @torch.no_grad()
    def step(self):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        size = sum(p.grad.abs().sum() for p in held)
        for p in held:
            p.sub_(p.grad / (1e-3 + size), alpha=1e-2)

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.config.machine.physical_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "own_optimizers.py").write_text(MODULE)
    (tmp_path / "broken_optimizers.py").write_text("import no_such_package_at_all")
    return tmp_path


def told(capsys: Any, *arguments: str) -> tuple[int, Any, str]:
    code = run(["estimate", "config.json", "--use_cpu", "--num_processes", "2", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


# What is kept.


def keeps(make: Any, shape: tuple[int, ...] | None, like: tuple[int, ...] = LARGE) -> tuple[dict[str, str], int]:
    """(states with a number for each element, bytes beside them) of a parameter without memory."""
    found = Stepper(make, [nn.Parameter(torch.empty(like, device="meta"))], "it").keeps(0, shape, torch.float32)
    return {name: str(dtype).removeprefix("torch.") for name, dtype in found.elementwise.items()}, found.beside


def test_half_a_billion_elements_are_stepped_without_memory():
    both = {"exp_avg": "float32", "exp_avg_sq": "float32"}
    assert keeps(torch.optim.AdamW, LARGE) == keeps(torch.optim.AdamW, None) == (both, 4)
    assert keeps(torch.optim.SGD, None) == ({}, 0)
    assert keeps(lambda p: torch.optim.SGD(p, momentum=0.9), None) == ({"momentum_buffer": "float32"}, 0)
    assert keeps(torch.optim.Adafactor, LARGE) == ({}, 4 * (sum(LARGE) + 1))
    assert keeps(torch.optim.Adagrad, None) == ({"sum": "float32"}, 4)


def test_codes_and_scales_of_a_library_are_counted():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    numel = LARGE[0] * LARGE[1]
    for name in ("AdamW8bit", "PagedAdamW8bit"):
        found = keeps(lambda p, name=name: getattr(bitsandbytes.optim, name)(p), LARGE)
        assert found == ({"state1": "uint8", "state2": "uint8"}, 2 * (4 * numel // 256 + 4 * 256))


class LastOnes(Loop):
    """Has the last five gradients, and looks at what tensors say."""

    def one(self, p, grad, group, state):
        state["last"] = [*state.get("last", []), grad.clone()][-5:]
        if grad.norm() > 0 and bool(torch.isfinite(grad).all()):
            p.sub_(grad, alpha=group["lr"] / grad.abs().max().item())


class Iterates(Loop):
    """A loop that ends when numbers say so, behind which nothing is kept."""

    def one(self, p, grad, group, state):
        state["rows"] = grad.sum(1)
        error = grad.abs().max()
        while error > 1e-3:
            error = error / 2
        p.sub_(grad, alpha=group["lr"])


class LooksAtNumbers(Loop):
    """What it keeps depends on values: as many rows as there are positive ones."""

    def one(self, p, grad, group, state):
        state["rows"] = torch.zeros(int((grad > 0).sum().item()))
        p.sub_(grad, alpha=group["lr"])


def test_what_grows_with_steps_is_counted_when_it_is_full():
    assert keeps(LastOnes, (1000, 1000)) == ({}, 5 * 4 * 10**6)


def test_a_loop_that_waits_for_a_number_ends():
    assert keeps(Iterates, (1000, 1000)) == ({}, 4000)


def test_what_depends_on_numbers_is_refused():
    with pytest.raises(OptimizerError, match="cannot be said: of tensors without memory it keeps other states"):
        keeps(LooksAtNumbers, (1000, 1000))
    assert keeps(LooksAtNumbers, (10, 10))[1] > 0  # of few elements numbers are at hand


def test_random_numbers_of_the_process_stay_as_they_are():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    keeps(torch.optim.AdamW, LARGE)
    assert torch.equal(torch.rand(3), expected)


# Which are meant.


def test_names_are_known_in_any_case_and_others_by_their_module():
    assert named("lamb")[0].attribute == "Lamb"
    assert [one.name for one in named("Muon")] == ["Muon", "AdamW"]
    assert [one.name for one in named("SOAP + Lion")] == ["SOAP", "Lion"]
    assert [one.name for one in named("pytorch_optimizer:Muon")] == ["Muon"]
    (found,) = named("torch.optim:SGD", "momentum=0.9,nesterov=True,lr=1e-2")
    assert found.settings == {"momentum": 0.9, "nesterov": True, "lr": 1e-2}
    assert "AdamW" in KNOWN


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("Adamm", None, "--optimizer: 'Adamm' is not one of Adadelta, Adafactor"),
        ("Adamm", None, "did you mean Adam?"),
        ("", None, "is not one of"),
        ("a+b+c", None, "names 3 optimizers"),
        ("torch.optim:", None, "is not module:Class"),
        ("my-script:Class", None, "is not module:Class"),
        ("SGD", "0.9", "is not name=value"),
        ("SGD", "momentum", "is not name=value"),
        ("SGD", "momentum=__import__('os')", "is not name=value"),
        ("SGD", "momentum=(", "is not name=value"),
    ],
)
def test_a_name_that_is_none_is_told_before_torch(name, settings, text):
    with pytest.raises(ConfigError) as told_:
        named(name, settings)
    assert text in str(told_.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--optimizer", "Adamm"], "did you mean Adam?"),
        (["--optimizer", "no_such_module:Class"], "is of no_such_module, which is not installed"),
        (["--optimizer", "own_optimizers:Nothing"], "own_optimizers has no Nothing"),
        (["--optimizer", "own_optimizers:number"], "neither a class nor a function"),
        (["--optimizer", "broken_optimizers:Class"], "cannot be imported: No module named 'no_such_package_at_all'"),
        (["--optimizer", "builtins:list"], "gives a list, which is no optimizer"),
        (["--optimizer", "SGD", "--optimizer_args", "momentun=1"], "cannot be made of parameters (TypeError"),
        (["--optimizer", "torch.optim:LBFGS"], "LBFGS cannot work on shards"),
        (["--optimizer", "own_optimizers:Mean", "--zero_stage", "3"], "Mean cannot work on shards"),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, arguments, text):
    code, out, err = told(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert len(err.splitlines()) == 1


def test_a_class_and_a_function_of_the_users_are_estimated(capsys, folder):
    weights = sum(p.numel() for p in _model(folder).parameters())

    def states(*arguments: str) -> int:
        code, out, _ = told(capsys, "--json", *arguments)
        assert code == 0
        return json.loads(out)["plan"]["bytes"].get("optimizer/gpu", 0) - 4 * weights

    assert states("--optimizer", "own_optimizers:Halves") == 2 * weights
    assert states("--optimizer", "SGD") == 0
    assert states("--optimizer", "SGD", "--optimizer_args", "momentum=0.9") == 4 * weights
    assert states("--optimizer", "own_optimizers:two_groups") == 4 * 320 * 64  # the embedding, which is the first


def _model(folder: Any) -> nn.Module:
    from shardwise.estimate.meta_model import build_meta_model

    return build_meta_model(str(folder / "config.json"))


# What is said.


def test_plans_that_an_optimizer_does_not_have_say_why(capsys, folder):
    code, out, _ = told(capsys, "--optimizer", "own_optimizers:Mean", "--zero_stage", "0")
    assert code == 0
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert lines["stage 0"].rstrip().endswith("yes")
    assert lines["stage 2"].endswith("no: refused [1]")
    assert sum(line.startswith("  [1] Mean cannot work on shards") for line in out.splitlines()) == 1
    code, out, _ = told(capsys, "--optimizer", "own_optimizers:Mean", "--zero_stage", "0", "--json")
    plans = {plan["zero_stage"]: plan for plan in json.loads(out)["plans"]}
    assert plans[0]["refused"] is None
    assert plans[3]["refused"].startswith("Mean cannot work on shards")
    assert plans[3]["bytes"] == {}


def test_whole_parameters_say_how_they_are_spread(capsys, folder):
    code, out, _ = told(capsys, "--optimizer", "Muon", "--zero_stage", "2")
    assert code == 0
    assert "; Muon (14 matrices, whole, one rank each) and AdamW (7 others); " in out
    assert "bytes of one rank, the one with most states" in out
    assert "whole parameters: states of the fullest rank 1." in out
    code, out, _ = told(capsys, "--optimizer", "Muon", "--zero_stage", "2", "--json")
    plan = json.loads(out)["plan"]
    assert plan["optimizers"] == [
        {"name": "Muon", "stepped": "whole, one rank each"},
        {"name": "AdamW", "stepped": "in shards"},
    ]
    assert 1 <= plan["operations_max_over_mean"] < 1.1
    assert 0 <= plan["padding"] < 0.02
    assert plan["bytes"]["whole steps/gpu"] > 0


def test_coded_states_are_asked_for_by_a_flag_or_a_file(capsys, folder):
    offload = [
        "--zero_stage",
        "2",
        "--offload_optimizer_device",
        "nvme",
        "--offload_optimizer_nvme_path",
        ".",
        "--json",
    ]
    (folder / "run.yaml").write_text("shardwise_config:\n  optimizer_state_dtype: int8\n")
    by_flag, by_file, exact = (
        json.loads(told(capsys, *offload, *more)[1])["plan"]["bytes"]["optimizer/nvme"]
        for more in (["--optimizer_state_dtype", "int8"], ["--config_file", "run.yaml"], [])
    )
    assert by_flag == by_file < 0.6 * exact
    assert told(capsys, "--optimizer_state_dtype", "int4")[0] == 2


def test_adapters_are_matrices_for_muon_and_without_any_it_is_refused(folder):
    from shardwise.estimate.meta_model import Adapters, build_meta_model

    model = build_meta_model(str(folder / "config.json"), adapters=Adapters(4))
    (only,) = steppers_of(model, named("Muon"))
    assert only.said == "28 matrices"
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    with pytest.raises(ConfigError, match="Muon has nothing to step"):
        steppers_of(model, named("Muon"))
    model.requires_grad_(False)
    assert steppers_of(model, named("Muon")) == []
    assert not any(estimate(model, Choice(3), Run(world_size=2)).states)


def test_every_plan_of_an_8b_model_with_muon_takes_seconds(folder):
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    (folder / "large.json").write_text(
        json.dumps({**SHAPE, **large, "num_attention_heads": 32, "num_key_value_heads": 8})
    )
    from shardwise.estimate.meta_model import build_meta_model

    model = build_meta_model(str(folder / "large.json"))
    steppers = steppers_of(model, named("Muon"))
    every = [estimate(model, choice, Run(world_size=8, steppers=steppers)) for choice in CHOICES]
    whole, sharded = (every[number].nbytes["optimizer", Tier.GPU] for number in (0, 1))
    assert sharded < 1.05 * whole / 8
    assert all(found.imbalance < 1.05 for found in every if found.choice.optimizer == "none")
