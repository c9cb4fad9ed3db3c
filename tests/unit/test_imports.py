"""The directions in which the tree depends on itself, read from its source and never by importing it.

    errors, version
    files       bytes on a disk, and documents within limits
    config      settings; no torch
    plan        arithmetic: what will be where, how large and in which order
    ranks       the other processes: groups, agreements, collectives, lanes
    offload     where shards rest
    zero        weights and gradients in shards, gathered and reduced
    step        the optimizer's step, on shards
    building    models without memory    tuning   what is done to a model beside sharding
    run         what a process is in a run
    data        loaders
    weights     whole weights into files
    checkpoint  a run into files and back
    estimate    bytes before the run    foreign  other libraries' checkpoints    front   the Accelerator
    names       accelerate's names where scripts import them
    cli         the commands; torch only inside functions
    compat      what answers for DeepSpeed

A file may import from its own folder and from those above it in this drawing. Each dangerous thing has one home.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "shardwise"

# A folder may import from those above it here, and within itself; its own __init__.py is on its level.
LEVELS = (
    "errors",
    "version",
    "files",
    "config",
    "plan",
    "ranks",
    "offload",
    "zero",
    "step",
    "building",
    "tuning",
    "run",
    "data",
    "watching",
    "weights",
    "checkpoint",
    "estimate",
    "foreign",
    "front",
    "names",
    "cli",
    "compat",
    "__main__",
)
# The package itself may re-export what it holds.
PACKAGES = ("",)


@dataclass(frozen=True)
class Import:
    """`name` as an absolute dotted name; lazy: inside a function, or only for type checkers."""

    name: str
    line: int
    lazy: bool


def modules() -> list[str]:
    """Every module of src by its dotted name under `shardwise`; a package by its own name."""
    names = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def path_of(module: str) -> Path:
    path = SOURCE.joinpath(*module.split(".")) if module else SOURCE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    return tuple(_imports(module, tree_of(module), lazy=False))


def _imports(module: str, node: ast.AST, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = ["shardwise", *module.split(".")] if module else ["shardwise"]
                if path_of(module).name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - (child.level - 1)]
                base = ".".join([*package, base] if base else package)
            for alias in child.names:
                yield Import(f"{base}.{alias.name}", child.lineno, lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(child)
            yield from _imports(module, child, lazy or inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def level_of(module: str) -> int | None:
    return next((level for level, name in enumerate(LEVELS) if is_under(module, name)), None)


def own_module(name: str) -> str | None:
    """Which module of src an imported name lies in; None if it is not of shardwise."""
    if name != "shardwise" and not name.startswith("shardwise."):
        return None
    parts = name.split(".")[1:]
    while parts and not path_of(".".join(parts)).exists():
        parts.pop()
    return ".".join(parts)


def names_used(module: str) -> Iterator[tuple[str, int]]:
    """Every dotted expression that the module's code writes out, such as `torch.cuda.Stream`, with its line."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner: ast.expr = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield ".".join([inner.id, *reversed(parts)]), node.lineno


def is_under(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_level(module):
    assert module in PACKAGES or level_of(module) is not None, f"put {module} into LEVELS"


@pytest.mark.parametrize("module", modules())
def test_no_module_imports_from_a_level_below_it_in_the_drawing(module):
    level = level_of(module)
    if level is None:
        return
    for found in imports_of(module):
        target = own_module(found.name)
        if target is None or target in PACKAGES:
            continue
        other = level_of(target)
        where = f"{path_of(module)}:{found.line} imports {found.name}"
        assert other is not None, f"{where}, which has no level"
        assert other <= level, f"{where}, which is of a later level"


ELASTIC = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")


# deepspeed.comm is torch.distributed under another name.
HOMES_OF_GROUPS = (
    *(f"ranks.{file}" for file in ("joining", "ranks", "group", "control", "doubling", "symmetric", "leaving")),
    "compat.deepspeed.comm",
)


def test_only_what_joins_and_leaves_and_ranks_import_torch_distributed():
    for module in modules():
        allowed = module in HOMES_OF_GROUPS
        for found in imports_of(module):
            # Launchers start processes through torch's elastic agent, which lives in torch.distributed too.
            if is_under(module, "cli", "run.launchers") and is_under(found.name, *ELASTIC):
                continue
            bad = is_under(found.name, "torch.distributed") and not allowed
            assert not bad, f"{path_of(module)}:{found.line} imports {found.name}"
        for name, line in names_used(module):
            assert allowed or not is_under(name, "torch.distributed"), f"{path_of(module)}:{line} uses {name}"


def test_only_lanes_makes_and_switches_cuda_streams():
    makers = ("Stream", "ExternalStream", "Event", "stream", "set_stream")
    for module in modules():
        if module == "ranks.lanes":
            continue
        # An event in an annotation is a value passed on; what counts is who makes one.
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {f"torch.cuda.{maker}" for maker in makers}, (
                    f"{path_of(module)}:{node.lineno} calls {called}: that is for ranks/lanes.py"
                )
        for found in imports_of(module):
            assert found.name not in {f"torch.cuda.{maker}" for maker in makers}, f"{module}: {found}"


def test_only_hooks_registers_hooks_on_modules_and_tensors():
    hooks = (
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_post_accumulate_grad_hook",
        "queue_callback",
    )
    for module in modules():
        for name, line in names_used(module):
            if name.split(".")[-1] in hooks:
                # The callback's counts tokens: the Trainer shows its batches to nobody.
                assert module in ("zero.hooks", "zero.listening", "watching.callback"), (
                    f"{path_of(module)}:{line} uses {name}"
                )


def test_only_config_reads_the_environment():
    """Besides it the launcher and its worker, which make the environment of the processes that they start."""
    for module in modules():
        if is_under(module, "config", "cli.launch", "cli.worker", "cli.agent", "compat.__main__"):
            continue
        for name, line in names_used(module):
            assert not is_under(name, "os.environ", "os.getenv"), f"{path_of(module)}:{line} reads the environment"
        for found in imports_of(module):
            assert found.name not in ("os.environ", "os.getenv"), f"{path_of(module)}:{found.line}"


def test_no_module_imports_the_peers():
    peers = ("deepspeed", "accelerate", "fairscale", "torch.distributed.fsdp", "torch.distributed._composable")
    for module in modules():
        for found in imports_of(module):
            assert not is_under(found.name, *peers), f"{path_of(module)}:{found.line} imports {found.name}"


HEAVY = ("torch", "transformers", "peft", "datasets", "numpy")


@pytest.mark.parametrize("module", [name for name in modules() if is_under(name, "config", "cli", "errors", "")])
def test_the_commands_import_nothing_heavy_at_module_level(module):
    """Following imports within shardwise: what `shardwise --help` loads."""
    seen: set[str] = set()
    waiting = [module, ""]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for found in imports_of(current):
            if found.lazy:
                continue
            assert not is_under(found.name, *HEAVY), (
                f"{path_of(current)}:{found.line} imports {found.name} at module level; {module} loads it"
            )
            target = own_module(found.name)
            if target is not None:
                waiting.append(target)


def test_the_engine_does_not_know_the_front_end_or_hugging_face():
    for module in modules():
        if is_under(module, "files", "plan", "ranks", "offload", "zero", "step"):
            for found in imports_of(module):
                assert not is_under(found.name, "transformers", "peft", "datasets", "yaml", "pydantic"), (
                    f"{path_of(module)}:{found.line} imports {found.name}"
                )


# Of torch, transformers and accelerate; none of them is an attribute of a class of shardwise.
OF_OTHERS = {"_cdata", "_hf_deepspeed_config_weak_ref", "_prepare_backend", "_step_supports_amp_scaling"}


def test_what_answers_for_deepspeed_uses_nothing_private():
    for module in (name for name in modules() if is_under(name, "compat")):
        for node in ast.walk(tree_of(module)):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            own = ast.unparse(node.value) in ("self", "super()")
            assert own or node.attr in OF_OTHERS, f"{path_of(module)}:{node.lineno} uses {ast.unparse(node)}"
