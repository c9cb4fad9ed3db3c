"""Runs accelerate's own tests on shardwise, with one word changed, and prints what passes. A program: nothing collects it.

    git clone https://github.com/huggingface/accelerate
    python tests/compat/accelerate_suite.py accelerate                          every file of FILES and SCRIPTS
    python tests/compat/accelerate_suite.py accelerate test_accelerator.py scripts/test_sync.py --log /tmp/log

Level A of docs/design/accelerate_suite.md: a copy of the checkout's `tests` and `test_utils` in a temporary directory. There
the name `accelerate` is `shardwise`, in imports, attributes and texts that are a module's path. Nothing else is changed.
`test_utils` is their rig and no interface, so the copy of it answers as `shardwise.test_utils`.

A file is run by pytest in a process of its own, which ends after `--limit` seconds with its threads' stacks in the log. A file
of `scripts` is what their tests start on several processes and count as one test: here each function that its `main` calls is
one. The statements of `main` are executed one by one, a failure is noted, and the next goes on. A function passes where it
passed on both ranks; one whose condition is not met there (GPUs) is skipped.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

FILES = (
    "test_accelerator.py",
    "test_cli.py",
    "test_cpu.py",
    "test_data_loader.py",
    "test_grad_sync.py",
    "test_kwargs_handlers.py",
    "test_logging.py",
    "test_memory_utils.py",
    "test_metrics.py",
    "test_optimizer.py",
    "test_scheduler.py",
    "test_state_checkpointing.py",
    "test_tracking.py",
    "test_utils.py",
)
# Not among these: test_compile, test_dataclasses (other ways to divide a model), test_imports (how long accelerate takes to
# import) and test_launch; devices, fsdp, deepspeed, tp, big_modeling, hooks, quantization and examples.
SCRIPTS = (
    "scripts/test_script.py",
    "scripts/test_ops.py",
    "scripts/test_sync.py",
    "scripts/test_distributed_data_loop.py",
    "scripts/external_deps/test_metrics.py",
)
_RIG = "SHARDWISE_ACCELERATE_RIG"
_WORLD = 2
_NOT_CALLED, _ENDED = "main did not call it", "main"
_RESULTS = "SHARDWISE_ACCELERATE_RESULTS"
_SITE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("shardwise_accelerate_suite", {path!r})
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.answer_for_the_rig()
"""
_MODULE_PATH = re.compile(r"(?P<before>[a-z]*[\"']{1,3})accelerate(?P<after>(\.\w+)*[\"']{1,3})$")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("checkout", type=Path, help="a checkout of accelerate's repository")
    parser.add_argument("files", nargs="*", help="files below `tests`, or scripts/... below `test_utils`")
    parser.add_argument("-k", default=None, help="pytest's -k, for files")
    parser.add_argument("--limit", type=int, default=900, help="seconds for a file or script")
    parser.add_argument("--log", type=Path, default=None, help="a directory for what each file printed")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        renamed(options.checkout / "tests", root / "tests")
        renamed(options.checkout / "src" / "accelerate" / "test_utils", root / "test_utils")
        (root / "site").mkdir()
        (root / "site" / "sitecustomize.py").write_text(_SITE.format(path=str(Path(__file__).resolve())))
        totals = [0, 0, 0]
        failures: list[str] = []
        for name in options.files or [*FILES, *SCRIPTS]:
            run = _run_script if name.startswith("scripts/") else _run_file
            passed, failed, skipped = run(root, name, options)
            print(f"{name:<44}{passed:>5} passed{len(failed):>5} failed{skipped:>5} skipped", flush=True)
            failures += [f"{name}::{test}: {text}" for test, text in failed]
            totals = [a + b for a, b in zip(totals, (passed, len(failed), skipped), strict=True)]
        ran = totals[0] + totals[1]
        share = 100 * totals[0] / max(ran, 1)
        print(f"{totals[0]} passed, {totals[1]} failed, {totals[2]} skipped: {share:.1f}% of those that ran")
        print("\n".join(failures))
    return 0


def renamed(source: Path, target: Path) -> None:
    """Copy a tree of theirs, `accelerate` being `shardwise` in names and in texts that are nothing but a module's path."""
    for path in source.rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(_renamed(path.read_text()).encode() if path.suffix == ".py" else path.read_bytes())


def _renamed(text: str) -> str:
    lines = text.splitlines(keepends=True)
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(text).readline))):
        word = token.string
        if token.type == tokenize.NAME and word == "accelerate":
            word = "shardwise"
        elif token.type == tokenize.STRING and (found := _MODULE_PATH.match(word)):
            word = f"{found['before']}shardwise{found['after']}"
        if word != token.string:  # no token that is renamed spans lines
            (row, start), (_, end) = token.start, token.end
            lines[row - 1] = lines[row - 1][:start] + word + lines[row - 1][end:]
    return "".join(lines)


def _environment(root: Path, **words: str) -> dict[str, str]:
    here = os.environ.get("PYTHONPATH")
    paths = [str(root / "site"), str(root / "tests"), *([here] if here else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        _RIG: str(root / "test_utils"),
        "HF_HUB_OFFLINE": "1",
        **words,
    }


def _execute(command: list[str], root: Path, name: str, options: argparse.Namespace, **words: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=_environment(root, **words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.limit,
            check=False,
        )
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = f"{(error.stdout or b'').decode(errors='replace')}\n{name} did not end within {options.limit} s"
    if options.log:
        options.log.mkdir(parents=True, exist_ok=True)
        (options.log / name.replace("/", "_")).with_suffix(".txt").write_text(said)
    return said


def _run_file(root: Path, name: str, options: argparse.Namespace) -> tuple[int, list[tuple[str, str]], int]:
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    command = [
        options.python,
        "-m",
        "pytest",
        f"tests/{name}",
        "-q",
        "--junitxml",
        str(report),
        "-p",
        "no:cacheprovider",
    ]
    command += ["-o", f"faulthandler_timeout={max(options.limit - 10, 1)}", *(["-k", options.k] if options.k else [])]
    said = _execute(command, root, name, options)
    if not report.exists():
        return 0, [("the file", said.strip().splitlines()[-1] if said.strip() else "ended without a word")], 0
    passed, failed, skipped = 0, [], 0
    for test in ElementTree.parse(report).iter("testcase"):
        wrong = [child for child in test if child.tag in {"failure", "error"}]
        if wrong:
            failed.append((str(test.get("name")), _last(wrong[0].get("message") or "")))
        elif test.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def _run_script(root: Path, name: str, options: argparse.Namespace) -> tuple[int, list[tuple[str, str]], int]:
    results = root / "results"
    results.mkdir(exist_ok=True)
    for old in results.iterdir():
        old.unlink()
    driver = root / "driver.py"
    module = "shardwise.test_utils." + name.removesuffix(".py").replace("/", ".")
    driver.write_text(f"import shardwise_accelerate_suite as suite\nsuite.play({module!r})\n")
    command = [
        options.python,
        "-c",
        "from shardwise.cli.main import main; main()",
        "launch",
        "--use_cpu",
        "--num_processes",
        str(_WORLD),
        str(driver),
    ]
    said = _execute(command, root, name, options, **{_RESULTS: str(results)})
    ranks = [json.loads(path.read_text()) for path in sorted(results.iterdir())]
    verdicts: dict[str, str] = {}
    for outcome in ranks:
        for function, text in outcome.items():
            verdicts[function] = verdicts.get(function) or text
    ended = verdicts.pop(_ENDED, "not reached")
    if not verdicts or len(ranks) < _WORLD:
        return 0, [("the file", said.strip().splitlines()[-1] if said.strip() else "ended without a word")], 0
    skipped = [function for function, text in verdicts.items() if text == _NOT_CALLED and not ended]
    failed = [(function, text) for function, text in verdicts.items() if text and function not in skipped]
    return len(verdicts) - len(failed) - len(skipped), failed, len(skipped)


def _last(text: str) -> str:
    return " ".join(text.split())[:200]


def answer_for_the_rig() -> None:
    """Their test_utils answer as `shardwise.test_utils` in this process and those it starts."""
    sys.meta_path.insert(0, _Rig())  # type: ignore[arg-type]


class _Rig:
    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "shardwise.test_utils":
            return None
        place = Path(os.environ[_RIG])
        return importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )


class _Returned(Exception):  # noqa: N818 - no error
    pass


class _Returns(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.stmt:
        return ast.copy_location(ast.parse("raise _Returned").body[0], node)


def play(name: str) -> None:
    """Execute `main` of a script of theirs; what each function that it calls does is noted, and an error of one is no end."""
    module = importlib.import_module(name)
    source = inspect.getsource(module.main)
    called = set(re.findall(r"\b(\w+)\(", source)) - {"main"}
    functions = {
        word: value
        for word, value in vars(module).items()
        if word in called and inspect.isfunction(value) and value.__module__ == name
    }
    outcomes = dict.fromkeys([*functions, _ENDED], _NOT_CALLED)
    place = Path(os.environ[_RESULTS]) / f"rank{os.environ.get('RANK', '0')}.json"

    def note(word: str, text: str) -> None:
        outcomes[word] = text
        place.write_text(json.dumps(outcomes))

    def noted(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            earlier = outcomes[word]
            note(word, "did not end")
            try:
                result = function(*args, **kwargs)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # of pytest's own, too, which are no Exceptions
                traceback.print_exc()
                note(word, f"{type(error).__name__}: {_last(str(error))}")
                return None
            note(word, "" if earlier == _NOT_CALLED else earlier)
            return result

        return call

    place.write_text(json.dumps(outcomes))
    vars(module).update({word: noted(word, function) for word, function in functions.items()}, _Returned=_Returned)
    definition = _Returns().visit(ast.parse(source)).body[0]
    for statement in definition.body:
        code = compile(ast.fix_missing_locations(ast.Module([statement], [])), f"main of {name}", "exec")
        try:
            exec(code, vars(module))
        except _Returned:
            break
        except Exception:  # outside of the functions; what depends on it fails for itself
            traceback.print_exc()
    note(_ENDED, "")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
