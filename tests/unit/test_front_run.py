"""An Accelerator keeps nothing beside its Run: what it knows is made there, and what a script reads or sets lies there."""

from __future__ import annotations

import ast
import inspect

import pytest
from test_imports import modules, tree_of

from shardwise import Accelerator, DataLoaderConfiguration, ProjectConfiguration
from shardwise.errors import ConfigError
from shardwise.front.accelerator import _IN_RUN
from shardwise.run.process import forget_run


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


def test_the_only_state_of_an_accelerator_is_its_view_of_the_ranks_and_its_run():
    accelerator = Accelerator(cpu=True)
    assert set(vars(accelerator)) == {"_ranks", "_run"}
    assert accelerator._run.ranks is accelerator._ranks


@pytest.mark.parametrize("name", sorted(_IN_RUN))
def test_what_a_script_reads_and_sets_is_the_runs(name):
    accelerator = Accelerator(cpu=True)
    assert name in vars(accelerator._run)
    assert name in dir(accelerator)
    assert getattr(accelerator, name) is getattr(accelerator._run, name)
    value = object()
    setattr(accelerator, name, value)
    assert getattr(accelerator._run, name) is value
    assert getattr(accelerator, name) is value
    assert set(vars(accelerator)) == {"_ranks", "_run"}


def test_what_is_set_acts():
    accelerator = Accelerator(cpu=True)
    accelerator.dataloader_config = DataLoaderConfiguration(split_batches=True)
    accelerator.project_configuration = ProjectConfiguration(project_dir="somewhere", iteration=3)
    assert (accelerator.split_batches, accelerator.project_dir, accelerator.save_iteration) == (True, "somewhere", 3)
    accelerator.even_batches = False
    assert accelerator.dataloader_config.even_batches is False
    accelerator.rng_types = ["xla"]
    accelerator.step_scheduler_with_optimizer = False
    assert (accelerator._run.rng_types, accelerator._run.step_scheduler_with_optimizer) == (["xla"], False)


class Own(Accelerator):
    @property
    def asked(self):
        return None.merged


def test_an_attribute_that_there_is_not_is_refused_and_a_script_may_add_its_own():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(AttributeError, match="'Accelerator' object has no attribute 'devise'"):
        accelerator.devise  # noqa: B018
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'merged'"):
        Own(cpu=True).asked  # noqa: B018
    accelerator.note = 3
    assert accelerator.note == 3
    assert not hasattr(Accelerator.__new__(Accelerator), "step")


def test_a_keyword_is_the_verbs_own_whatever_its_name_is(tmp_path):
    accelerator = Accelerator(cpu=True)
    for name in ("run", "self"):
        with pytest.raises(ConfigError, match=f"save_state: {name} is not one of its arguments"):
            accelerator.save_state(tmp_path, **{name: 1})


def test_a_verb_tells_its_signature_and_what_it_does():
    assert inspect.signature(Accelerator(cpu=True).load_state).parameters.keys() == {
        "input_dir",
        "load_kwargs",
        "kwargs",
    }
    assert Accelerator.save_state.__doc__.startswith("Save the run and give the directory.")
    assert Accelerator.save_state.__qualname__ == "Accelerator.save_state"


def test_a_subclass_may_overrule_a_verb():
    class Gathering(Accelerator):
        def gather(self, tensor):
            return ("own", super().gather(tensor))

    assert Gathering(cpu=True).gather(()) == ("own", ())


def test_a_verb_that_is_another_by_name_is_that_of_a_subclass():
    class Preparing(Accelerator):
        def prepare(self, *objects, **keywords):
            return ("own", *objects)

        def free_memory(self, *objects):
            return ["own"]

    accelerator = Preparing(cpu=True)
    assert [accelerator.prepare_model(1), accelerator.prepare_optimizer(2), accelerator.prepare_scheduler(3)] == [
        ("own", 1), ("own", 2), ("own", 3)
    ]  # fmt: skip
    assert accelerator.clear() == ["own"]


def classes(folder: str):
    for module in modules():
        if module.startswith(f"{folder}."):
            for node in ast.walk(tree_of(module)):
                if isinstance(node, ast.ClassDef):
                    yield module, node


@pytest.mark.parametrize("folder", ["front", "run"])
def test_no_class_declares_an_attribute_that_another_class_makes(folder):
    for module, node in classes(folder):
        if node.decorator_list or any(ast.unparse(base) in ("Protocol", "NamedTuple") for base in node.bases):
            continue
        declared = {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and item.value is None and isinstance(item.target, ast.Name)
        }
        made = {
            target.attr
            for target in ast.walk(node)
            if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
        }
        if node.name == "Accelerator":  # it passes these on
            made |= vars(Accelerator(cpu=True)._run).keys()
        assert declared <= made, f"{module}.{node.name} declares {declared - made}"


def test_no_class_of_the_front_end_leaves_a_method_to_another():
    for module, node in classes("front"):
        assert "NotImplementedError" not in ast.unparse(node), f"{module}.{node.name}"
