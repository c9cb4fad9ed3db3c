"""`import deepspeed` in a process that asks for it, and in no other. Each test is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from shardwise.compat.faces import MODULES, VERSION


def run(code, *command, cwd=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *(command or ("-c", textwrap.dedent(code)))],
        capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_every_name_of_the_table_is_there_and_others_are_refused_in_words():
    run(
        """
        import importlib, importlib.metadata, importlib.util, sys
        assert importlib.util.find_spec("deepspeed") is None
        from shardwise.compat import as_deepspeed
        as_deepspeed()
        as_deepspeed()
        assert "torch" not in sys.modules
        assert importlib.util.find_spec("deepspeed") is not None
        from shardwise.compat.faces import MODULES, VERSION
        assert importlib.metadata.version("deepspeed") == VERSION
        assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
        assert importlib.metadata.packages_distributions()["deepspeed"] == ["deepspeed"]
        for module, row in MODULES.items():
            found = importlib.import_module(module)
            for name in row:
                assert getattr(found, name, None) is not None or name.endswith("group"), (module, name)
        import deepspeed
        assert deepspeed.__version__ == VERSION
        assert deepspeed.ops.adam.DeepSpeedCPUAdam and deepspeed.zero.Init and deepspeed.runtime.lr_schedules
        assert deepspeed.runtime.engine.DeepSpeedEngine is deepspeed.DeepSpeedEngine
        assert deepspeed.utils.logger.name == "shardwise"
        assert not hasattr(deepspeed, "no_such_name")
        try:
            deepspeed.initialise
        except AttributeError as error:
            assert "Did you mean deepspeed.initialize?" in str(error), error
        else:
            raise AssertionError
        try:
            import deepspeed.pipe
        except ModuleNotFoundError as error:
            assert "deepspeed.pipe is not answered: in this process shardwise stands for DeepSpeed" in str(error)
        else:
            raise AssertionError
        assert not isinstance(3, deepspeed.PipelineModule)
        try:
            deepspeed.PipelineModule()
        except NotImplementedError as error:
            assert "no pipelines" in str(error)
        else:
            raise AssertionError
        """
    )


def test_the_first_line_says_what_this_is():
    done = run("from shardwise.compat import as_deepspeed\nas_deepspeed()\nimport deepspeed\nimport deepspeed.comm")
    assert done.stderr.count(f"deepspeed {VERSION}: this is shardwise, not DeepSpeed.") == 1


@pytest.mark.parametrize("first", ["transformers", "torch"])
def test_a_library_that_comes_first_finds_it_too(first):
    run(
        f"""
        import {first}
        from shardwise.compat import as_deepspeed
        as_deepspeed()
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_available
        assert is_deepspeed_available()
        assert HfDeepSpeedConfig.__mro__[1].__module__ == "accelerate.utils.deepspeed"
        import accelerate
        from accelerate.utils import is_deepspeed_available
        assert is_deepspeed_available()
        assert accelerate.accelerator.DeepSpeedEngineWrapper
        """
    )


def test_a_model_is_built_without_memory_whoever_answers_that_stage_3_is_on(tmp_path):
    run(
        f"""
        import torch, transformers
        from shardwise.compat import as_deepspeed
        as_deepspeed()
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.integrations import deepspeed as asked
        small = LlamaConfig(vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
        LlamaForCausalLM(small).save_pretrained({str(tmp_path)!r})
        zero3 = asked.HfDeepSpeedConfig({{"zero_optimization": {{"stage": 3}}}})
        first = asked.is_deepspeed_zero3_enabled
        own = lambda: True
        for module in (asked, transformers.modeling_utils):
            module.is_deepspeed_zero3_enabled = own
            model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r})
            assert all(p.is_meta for p in model.parameters() if p.ndim == 2)
            assert LlamaForCausalLM._from_config(small).lm_head.weight.is_meta
            assert module.is_deepspeed_zero3_enabled is own and first()
        """
    )


@pytest.mark.parametrize("section", [False, True])
def test_a_trainer_trains_with_the_optimizer_and_the_schedule_that_it_is_given(tmp_path, section):
    described = '"optimizer": {"type": "AdamW", "params": {"lr": 0.5}},' if section else ""
    done = run(
        f"""
        from shardwise.compat import as_deepspeed
        as_deepspeed()
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        row = torch.arange(6)
        configuration = {{{described} "train_batch_size": 1, "zero_optimization": {{"stage": 2}}}}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir={str(tmp_path)!r}, max_steps=4, logging_steps=1, report_to=[], save_strategy="no",
                per_device_train_batch_size=1, disable_tqdm=True, learning_rate=0.5, deepspeed=configuration,
            ),
            train_dataset=[{{"input_ids": row, "labels": row}}] * 4,
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
        expected = [0.375, 0.25, 0.125, 0.0] if {section} else [0.25, 0.25, 0.125, 0.125]
        assert rates == expected, rates
        assert ("over Adam" if {section} else "over SGD") in repr(trainer.optimizer.optimizer)
        """
    )
    assert ("describes another" in done.stderr) == section


def test_who_has_looked_already_is_told():
    run(
        """
        import accelerate
        from shardwise.compat import as_deepspeed
        from shardwise.errors import ConfigError
        try:
            as_deepspeed()
        except ConfigError as error:
            assert "accelerate.accelerator has been imported already" in str(error)
        else:
            raise AssertionError
        """
    )


def test_a_real_deepspeed_is_not_reached_and_that_is_said(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise AssertionError('the real one')")
    info = tmp_path / "deepspeed-0.18.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.0\n")
    code = "import importlib.metadata\nfrom shardwise.compat import as_deepspeed\nas_deepspeed()\nimport deepspeed\n"
    code += "assert importlib.metadata.version('deepspeed') == deepspeed.__version__ != '0.18.0'"
    done = run(code, cwd=tmp_path)
    assert "DeepSpeed 0.18.0 is installed too. In this run shardwise is in force" in done.stderr


def test_the_module_runs_a_script_and_touches_no_process_that_it_starts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import importlib.util, subprocess, sys
            import deepspeed
            assert __name__ == "__main__" and sys.argv[1:] == ["a", "--b"], sys.argv
            assert sys.path[0] == __file__.rpartition("/")[0]
            code = "import importlib.util; print(importlib.util.find_spec('deepspeed'))"
            assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None"
            print("ran")
            """
        )
    )
    done = run("", "-m", "shardwise.compat", str(script), "a", "--b")
    assert done.stdout == "ran\n"


def test_names_are_sorted_by_modules():
    assert all(name.rpartition(".")[0] in MODULES for name in MODULES if "." in name)
