"""Runs DeepSpeed's own unit tests on shardwise, on CPUs, and prints what passes. It is a program, no test: nothing collects it.

    git clone https://github.com/deepspeedai/DeepSpeed
    python tests/compat/conformance.py DeepSpeed/tests runtime/test_no_sync_ctxt.py runtime/zero/test_zero_context.py

The first argument is the directory `tests` of the checkout, the others are files below its `unit`. For each file it prints
passed, failed and skipped, then what the failures said. docs/design/deepspeed_conformance.md has the table.

Their tests start processes through multiprocessing's fork server, and each of those must find shardwise as `deepspeed`: a
`sitecustomize` in PYTHONPATH calls `stand_in` below. This file is also a plugin of that pytest. It changes what is
around the tests:

  - A module or name that shardwise does not answer is made up where a file imports it at its top, and is refused where it is
    used: else one private name at the top would hide every test of the file.
  - deepspeed.git_version_info says a torch and a CUDA that know bf16: the check for bf16 asks it, and knows no CPUs. `VALUES`
    has the few other names that only say how large or how new something is, or that there are no experts. Without hjson
    installed, json is hjson.
  - The accelerator counts as many devices as a test asks for, and DDP takes the device_ids that it takes on GPUs. gloo
    gathers a scalar, as NCCL does.
  - A test's processes are new ones, and end with it: when one fails, and when they hang, each with its stack in the log.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.machinery
import importlib.util
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

NAME = "shardwise_conformance"
_LIMIT_S = "SHARDWISE_CONFORMANCE_LIMIT_S"
_FP32 = "SHARDWISE_CONFORMANCE_FP32"
_AFTER_FAILURE_S = 10  # for the other ranks
_SITE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("{NAME}", {{path!r}})
sys.modules["{NAME}"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.stand_in()
"""
VALUES: dict[str, dict[str, Any]] = {
    "deepspeed.git_version_info": {
        "torch_info": {
            "version": "2.9",
            "cuda_version": "12.0",
            "nccl_version": "2.20",
            "hip_version": "0.0",
            "bf16_support": True,
        }
    },
    "deepspeed.runtime.swap_tensor": {"MIN_SWAPPABLE_BYTES": 1 << 20},
    "deepspeed.moe.utils": {"split_params_into_different_moe_groups_for_optimizer": lambda group: [group]},
    "deepspeed.utils.torch": {"required_torch_version": lambda min_version=None, max_version=None: max_version is None},
}


# In the processes of the tests.


def stand_in() -> None:
    """Make this process one in which DeepSpeed's tests find shardwise as `deepspeed`."""
    if any("resource_tracker" in argument for argument in sys.orig_argv):
        return
    from shardwise.compat import as_deepspeed, finder

    as_deepspeed()
    answered = finder.Face.__getattr__

    def answer(face: ModuleType, name: str) -> Any:
        try:
            return answered(face, name)
        except AttributeError:
            if name.startswith("__") or not _at_import(sys._getframe(1)):
                raise
            return MadeUp(f"{face.__name__}.{name}")

    finder.Face.__getattr__ = answer  # type: ignore[method-assign]
    sys.meta_path.insert(0, _MadeUpModules())  # type: ignore[arg-type]
    # Imported once, by the fork server, for all that it starts. torch imports its compiler at an optimizer's first use.
    import torch._dynamo

    gathers = torch.distributed.all_gather_into_tensor

    def all_gather_into_tensor(output: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return gathers(output, value.reshape(-1) if value.dim() == 0 else value, *args, **kwargs)

    torch.distributed.all_gather_into_tensor = all_gather_into_tensor

    from shardwise.compat.deepspeed import accelerator, entry  # noqa: F401

    accelerator.Accelerator.device_count = lambda self: 64  # type: ignore[method-assign]
    if os.environ.get(_FP32):
        accelerator.Accelerator.is_bf16_supported = lambda self: False  # type: ignore[method-assign]
        accelerator.Accelerator.is_fp16_supported = lambda self: False  # type: ignore[method-assign]
    made = torch.nn.parallel.DistributedDataParallel.__init__

    def without_devices(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "device_ids": None, "output_device": None})

    torch.nn.parallel.DistributedDataParallel.__init__ = without_devices  # type: ignore[method-assign]
    if importlib.util.find_spec("hjson") is None:
        sys.modules["hjson"] = json


def _at_import(frame: Any) -> bool:
    """Whether the code that asks is the body of a module or of a class."""
    while frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return not frame.f_code.co_flags & inspect.CO_OPTIMIZED


class MadeUp:
    """A name that shardwise does not answer, imported at the top of a file. Nothing is an instance of it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not _at_import(sys._getframe(1)):
            raise AttributeError(_refusal(self.__dict__.get("path", "")))
        return MadeUp(f"{self.path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(_refusal(self.path))

    def __instancecheck__(self, instance: Any) -> bool:
        return False

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()

    def __repr__(self) -> str:
        return f"<{self.path}, which is not answered>"


def _refusal(path: str) -> str:
    from shardwise.compat.faces import refusal

    return refusal(path)


class _MadeUpModules:
    """Finds the modules that shardwise does not answer, for imports at the top of a file."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        from shardwise.compat.faces import MODULES

        if not fullname.startswith("deepspeed.") or fullname in MODULES:
            return None
        wanted = any(f"{name}.".startswith(f"{fullname}.") for name in VALUES)
        if not (wanted or _at_import(sys._getframe(1))):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _MadeUpModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(VALUES.get(module.__name__, {}))


class _MadeUpModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not _at_import(sys._getframe(1)):
            raise AttributeError(_refusal(f"{self.__name__}.{name}"))
        return MadeUp(f"{self.__name__}.{name}")


# The plugin of pytest.


def pytest_collection_modifyitems() -> None:
    common = sys.modules.get("unit.common")
    if common is not None:
        common.DistributedExec._launch_daemonic_procs = _launch


def _launch(test: Any, num_procs: int, init_method: str) -> None:
    """Run a test in processes of its own, in place of theirs, which waits for ever after an error of one rank."""
    import pytest
    import torch.multiprocessing as mp

    limit_s = float(os.environ[_LIMIT_S])
    begun = time.monotonic()
    pool = mp.Pool(num_procs)
    try:
        port = sys.modules["unit.common"].get_master_port()
        waited = [
            pool.apply_async(ranked, (test, limit_s, rank, num_procs, port, init_method)) for rank in range(num_procs)
        ]
        failed_at: float | None = None
        while not all(result.ready() for result in waited):
            now = time.monotonic()
            if failed_at is None and any(result.ready() and not result.successful() for result in waited):
                failed_at = now
            if failed_at is not None and now > failed_at + _AFTER_FAILURE_S:
                break
            if now > begun + limit_s:
                raise AssertionError(f"hangs: not done after {limit_s:.0f} s; the log has the stacks")
            time.sleep(0.05)
        skipped = [result.get() for result in waited if result.ready()]
    finally:
        pool.terminate()
        pool.join()
    if any(skipped):
        pytest.skip(next(text for text in skipped if text))


def ranked(test: Any, limit_s: float, *args: Any) -> Any:
    """One rank of a test."""
    faulthandler.dump_traceback_later(max(limit_s - 3, 1), exit=False)
    try:
        return test._dist_run(*args)
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        # Of pytest: a worker of a pool would end by it, and nobody would hear of it.
        raise AssertionError(str(error)) from error
    finally:
        faulthandler.cancel_dump_traceback_later()


# The program.


def main() -> None:
    parser = argparse.ArgumentParser(description="DeepSpeed's unit tests on shardwise")
    parser.add_argument("tests", type=Path, help="the directory `tests` of a checkout of DeepSpeed")
    parser.add_argument("files", nargs="+", help="files below its unit/, or FILE::TEST")
    parser.add_argument("-k", default="", help="pytest's -k")
    parser.add_argument(
        "--fp32", action="store_true", help="the accelerator knows no 16 bits: tests that choose take fp32"
    )
    parser.add_argument("--limit", type=float, default=60, help="seconds for one test")
    parser.add_argument("--file-limit", type=float, default=1200, help="seconds for one file")
    parser.add_argument("--log", type=Path, help="a directory for what pytest prints")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends with this
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch) / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE.format(path=str(Path(__file__).resolve())))
        for file in given.files:
            _show(file, _run(given, file, Path(scratch), site))


def _run(given: argparse.Namespace, file: str, scratch: Path, site: Path) -> list[tuple[str, str, str]] | None:
    """(test, outcome, first line of its message) of each test of a file; None if it did not come to its end."""
    report = scratch / "report.xml"
    report.unlink(missing_ok=True)
    log = (given.log or scratch).resolve() / f"{re.sub('[^a-z0-9_]+', '.', file.removesuffix('.py'))}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environ = dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", DS_DISABLE_REUSE_DIST_ENV="1")
    environ |= {_FP32: "1"} if given.fp32 else {}
    environ |= {
        _LIMIT_S: str(given.limit),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        NAME,
        "-p",
        "no:cacheprovider",
        "-s",
        "-c",
        "pytest.ini",
        "--tb=short",
    ]
    command += [
        f"--junitxml={report}",
        f"--basetemp={scratch / 'pytest'}",
        f"unit/{file}",
        *(["-k", given.k] if given.k else []),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=given.tests, env=environ, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(given.file_limit)
        except subprocess.TimeoutExpired:
            print(f"{file}: not done after {given.file_limit:.0f} s", flush=True)
        finally:
            # The fork server and what hangs in it belong to the same session.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    return _read(report) if report.exists() else None


def _read(report: Path) -> list[tuple[str, str, str]]:
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcome, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = " ".join(child.get("message", "").split())
        found.append((f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", outcome, message))
    return found


def _show(file: str, cases: list[tuple[str, str, str]] | None) -> None:
    if cases is None:
        print(f"{file}: no report; see its log", flush=True)
        return
    counts = Counter(outcome for _, outcome, _ in cases)
    print(f"| {file} | {counts['passed']} | {counts['failed']} | {counts['skipped']} |")
    said: dict[tuple[str, str], list[str]] = {}
    for name, outcome, message in cases:
        if outcome != "passed":
            said.setdefault((outcome, message[:300]), []).append(name)
    for (outcome, message), names in said.items():
        print(f"    {len(names)} {outcome}: {message}\n        {' '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
