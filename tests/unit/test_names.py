"""accelerate's names where scripts import them from: the table against the installed accelerate, and what each name does.

The comparison goes one way: a name of the installed accelerate that the table does not have fails; one that only newer versions
have does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import shardwise
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.names import table
from shardwise.names.modules import resolve
from shardwise.names.table import ALIASES, NAMES, ROWS

accelerate = pytest.importorskip("accelerate")


def offered(path: str) -> list[str]:
    """The public names of one of accelerate's modules: of packages all, of others those that they define."""
    module = importlib.import_module(f"accelerate.{path}" if path else "accelerate")
    found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    found = {name: value for name, value in found.items() if not isinstance(value, ModuleType)}
    if hasattr(module, "__path__"):
        return sorted(found)
    constants = path == "utils.constants"
    return sorted(
        name
        for name, value in found.items()
        if getattr(value, "__module__", None) == module.__name__ or (constants and name.isupper())
    )


@pytest.mark.parametrize("path", NAMES)
def test_the_table_has_each_name_that_accelerate_offers(path):
    if importlib.util.find_spec(f"accelerate.{path}" if path else "accelerate") is None:
        pytest.skip("the installed accelerate does not have this module")
    missing = set(offered(path)) - set(NAMES[path])
    assert not missing, f"put {sorted(missing)} of accelerate.{path} into names/table.py"


@pytest.mark.parametrize("name", ROWS)
def test_each_row_resolves(name):
    found = resolve(name)
    assert found is resolve(name)
    assert ROWS[name].verdict in ("same", "wider", "refused")
    assert (type(found).__name__ == "Refused") == (ROWS[name].verdict == "refused")


def test_each_row_is_in_a_module_and_each_name_of_a_module_has_a_row():
    used = {name for names in NAMES.values() for name in names}
    of_aliases = {name for name, row in ROWS.items() if row.home and row.home.partition(":")[0] in ALIASES.values()}
    assert used <= set(ROWS)
    assert set(ROWS) - of_aliases <= used
    assert set(table.WIDER) <= set(ROWS)


@pytest.mark.parametrize("path", ["logging", "tracking"])
def test_modules_with_a_path_of_their_own_have_what_those_of_accelerate_have(path):
    own = importlib.import_module(f"shardwise.{path}")
    missing = [name for name in offered(path) if not hasattr(own, name)]
    assert not missing


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_modules_load_only_what_a_name_needs_and_are_reached_by_attribute():
    assert "ok" in run(
        "import sys, shardwise\n"
        "from shardwise.utils import patch_environment, is_wandb_available\n"
        "from shardwise.utils.dataclasses import LoggerType\n"
        "from shardwise.utils import FullyShardedDataParallelPlugin\n"
        "assert 'wandb' in LoggerType\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'\n"
        "shardwise.utils.set_seed(0)\n"
        "assert shardwise.state.PartialState is shardwise.PartialState\n"
        "assert shardwise.utils.operations.gather is shardwise.gather\n"
        "assert shardwise.data_loader.skip_first_batches is shardwise.skip_first_batches\n"
        "print('ok')"
    )


def test_star_import_and_dir_give_the_names_and_the_package_names_its_modules():
    module = importlib.import_module("shardwise.utils.versions")
    space: dict[str, object] = {}
    exec("from shardwise.utils.versions import *", space)
    assert set(module.__all__) == set(space) - {"__builtins__"}
    assert set(NAMES["utils"]) <= set(dir(shardwise.utils))
    assert {"utils", "state", "data_loader", "logging", "optimizer"} <= set(dir(shardwise))
    assert set(NAMES[""]) <= set(shardwise.__all__)
    assert all(name in NAMES[""] for name in shardwise._TABLED)
    with pytest.raises(AttributeError, match="nothing_of_this"):
        shardwise.utils.nothing_of_this  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shardwise.commands")


def test_a_function_is_not_hidden_by_the_module_of_its_name():
    importlib.import_module("shardwise.utils.tqdm")
    from shardwise.utils import tqdm
    from shardwise.utils.tqdm import tqdm as same

    assert tqdm is same
    assert list(tqdm([1, 2], disable=True)) == [1, 2]


# Refused names.


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("FullyShardedDataParallelPlugin", "zero_stage"),
        ("load_checkpoint_and_dispatch", "device_map"),
        ("cpu_offload_with_hook", "device_map"),
        ("ParallelismConfig", "zero_stage"),
        ("MegatronLMPlugin", "zero_stage"),
        ("FP8RecipeKwargs", "bf16"),
    ],
)
def test_a_refused_name_can_be_imported_and_says_why_when_it_is_used(name, word):
    path = next(path for path, names in NAMES.items() if name in names)
    found = getattr(importlib.import_module(f"shardwise.{path}" if path else "shardwise"), name)
    for use in (found, lambda: found(1, stage=2), lambda: found.SOMETHING, lambda: list(found)):
        with pytest.raises(ShardwiseError, match=name) as caught:
            use()
        assert word in str(caught.value)
    with pytest.raises(ConfigError):
        type("Own", (found,), {})
    assert not isinstance(3, found)
    assert not isinstance(None, found | int)
    assert not hasattr(found, "something")


# What the small ones do.


def test_structures_are_rebuilt_as_their_own_types():
    from collections import namedtuple

    from shardwise import utils

    pair = namedtuple("pair", "one two")
    data = {"a": torch.arange(6.0).reshape(3, 2).half(), "b": [pair(torch.zeros(3), 5), "text"]}
    as_fp32 = utils.convert_to_fp32(data)
    assert as_fp32["a"].dtype == torch.float32
    assert isinstance(as_fp32["b"][0], pair)
    assert as_fp32["b"][1] == "text"
    assert utils.find_batch_size(data) == 3
    assert utils.ignorant_find_batch_size({}) is None
    assert utils.ignorant_find_batch_size(["text"]) is None
    with pytest.raises(TypeError, match="tensors"):
        utils.find_batch_size(["text"])
    structure = utils.get_data_structure(data)
    assert structure["a"] == utils.TensorInformation(torch.Size([3, 2]), torch.float16)
    assert utils.initialize_tensors(structure)["a"].shape == (3, 2)
    assert utils.slice_tensors(data, slice(0, 1))["a"].shape == (1, 2)
    assert utils.listify(torch.ones(2, dtype=torch.bfloat16)) == [1.0, 1.0]
    assert utils.find_device(data) == torch.device("cpu")
    assert utils.honor_type(pair(1, 2), iter((3, 4))) == pair(3, 4)
    assert utils.recursively_apply(lambda t, by: t * by, (torch.ones(1),), 3)[0].item() == 3
    with pytest.raises(TypeError, match="Unsupported types"):
        utils.recursively_apply(lambda t: t, ["text"], error_on_other_type=True)


def test_environment_helpers_put_back_what_was_there(monkeypatch):
    import os

    from shardwise import utils

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    before = dict(os.environ)
    with utils.patch_environment(accelerate_mixed_precision="bf16", other_of_names=1):
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
        assert os.environ["OTHER_OF_NAMES"] == "1"
    with utils.clear_environment():
        assert not os.environ
        os.environ["OTHER_OF_NAMES"] = "1"

    @utils.purge_accelerate_environment
    class Tests:
        def test_one(self) -> None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = "fp16"
            os.environ["ACCELERATE_OTHER"] = "1"

    Tests().test_one()
    assert dict(os.environ) == before
    assert utils.str_to_bool("Yes") == 1
    assert utils.str_to_bool("off", to_bool=True) is False
    assert utils.parse_flag_from_env("NOT_SET_BY_ANYBODY", True) is True
    assert utils.get_int_from_env(["NOT_SET_BY_ANYBODY"], 3) == 3
    with pytest.raises(ValueError, match="maybe"):
        utils.str_to_bool("maybe")


def test_questions_about_models_have_the_answers_of_accelerate():
    from accelerate import utils as theirs

    from shardwise import utils

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].weight = nn.Parameter(torch.zeros(3, 4))
    model.tied = nn.Linear(3, 4)
    model.tied.weight = model[0].weight
    assert utils.find_tied_parameters(model) == theirs.find_tied_parameters(model) == [["0.weight", "tied.weight"]]
    for options in ({}, {"dtype": torch.float16}, {"special_dtypes": {"0.weight": torch.int8}}, {"buffers_only": True}):
        assert dict(utils.compute_module_sizes(model, **options)) == dict(theirs.compute_module_sizes(model, **options))
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float8_e4m3fn):
        assert utils.dtype_byte_size(dtype) == theirs.dtype_byte_size(dtype)
    assert utils.dtype_byte_size(utils.CustomDtype.INT4) == 0.5
    for size in ("5GB", "300MiB", "2KB", "8Gb", 17):
        assert utils.convert_file_size_to_int(size) == theirs.convert_file_size_to_int(size)
    with pytest.raises(ValueError, match="valid format"):
        utils.convert_file_size_to_int("5 cows")
    assert [name for name, _ in utils.named_module_tensors(model, recurse=True)] == [
        name for name, _ in theirs.named_module_tensors(model, recurse=True)
    ]
    assert utils.extract_model_from_parallel(nn.DataParallel(model)) is model
    assert not utils.is_compiled_module(model)
    assert not utils.is_peft_model(model)
    for value in (0, 1023, 1024, 5_000_000, 2**60):
        assert utils.convert_bytes(value) == theirs.convert_bytes(value)
    assert utils.get_pretty_name(nn.Linear) == "Linear"
    assert utils.get_pretty_name(model) == "Sequential"
    assert utils.merge_dicts({"a": {"b": 1}}, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert utils.recursive_getattr(model, "tied.in_features") == 3


def test_what_is_installed_is_said_as_accelerate_says_it():
    """Of packages; devices and libraries that shardwise does not use are always absent here."""
    from accelerate.utils import imports as theirs

    from shardwise.utils import imports

    absent = {"is_pippy_available", "is_torch_xla_available", "is_xccl_available", "is_xpu_available"}
    for name in NAMES["utils.imports"]:
        if name.endswith("_available") and name not in absent and hasattr(theirs, name):
            assert bool(getattr(imports, name)()) == bool(getattr(theirs, name)()), name
    assert imports.is_torch_distributed_available()


def test_empty_weights_have_no_memory_and_nothing_stays_changed():
    register = nn.Module.register_parameter
    with shardwise.init_empty_weights():
        model = nn.BatchNorm1d(4)
    assert model.weight.is_meta
    assert not model.running_mean.is_meta
    with shardwise.init_empty_weights(include_buffers=True):
        assert nn.BatchNorm1d(4).running_mean.is_meta
    assert nn.Module.register_parameter is register
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_basic_config_is_a_file_of_our_own_schema(tmp_path):
    from shardwise.config.yaml_file import read_yaml
    from shardwise.utils import write_basic_config

    path = tmp_path / "folder" / "default.yaml"
    assert write_basic_config("bf16", path) == path
    assert read_yaml(path).values["mixed_precision"] == "bf16"
    assert write_basic_config("no", path) is False
    with pytest.raises(ConfigError, match="mixed_precision"):
        write_basic_config("fp8", tmp_path / "other.yaml")


def test_saved_objects_are_loaded_again_without_code(tmp_path):
    from shardwise import utils

    weight = torch.arange(4.0)
    utils.save({"a": weight, "b": weight}, tmp_path / "both.safetensors", safe_serialization=True)
    assert list(utils.load_state_dict(tmp_path / "both.safetensors")) == ["a"]
    utils.save({"a": weight}, tmp_path / "one.bin")
    assert torch.equal(utils.load(tmp_path / "one.bin")["a"], weight)
    assert torch.equal(utils.load_state_dict(tmp_path / "one.bin")["a"], weight)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_repeated_blocks_are_compiled_in_place():
    from shardwise import utils

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Tower(), torch.ones(2, 4)
    plain = model(x)
    assert not utils.has_compiled_regions(model)
    assert utils.compile_regions(model, backend="eager") is model
    assert utils.has_compiled_regions(model)
    assert torch.equal(model(x), plain)
    with pytest.raises(ConfigError, match="options"):
        utils.compile_regions(Tower(), options={})


def test_the_plugin_of_dynamo_acts_through_the_setting():
    from shardwise.config.schema import Config
    from shardwise.utils import DynamoBackend, TorchDynamoPlugin

    config = TorchDynamoPlugin(backend=DynamoBackend.EAGER, fullgraph=True).merged_into(Config())
    assert config.compiling is not None
    assert (config.compiling.dynamo_backend, config.compiling.dynamo_use_fullgraph) == ("eager", True)
    assert TorchDynamoPlugin(disable=True).merged_into(config).compiling is None
    assert TorchDynamoPlugin().merged_into(config) == config
    with pytest.raises(ConfigError, match="options"):
        TorchDynamoPlugin(options={"a": 1})
