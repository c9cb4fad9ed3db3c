"""Ranks started from within a process. Each case runs in a process of its own that has joined nothing, as a notebook's."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from rig.fresh import fresh_ranks


def alone(function, *args, timeout_s=120.0):
    [outcome] = fresh_ranks(function, [{}], *args, timeout_s=timeout_s)
    assert outcome.error is None, outcome.error
    assert outcome.code == 0
    return outcome.value


def _train(folder, steps):
    from shardwise import Accelerator

    accelerator = Accelerator()
    torch.manual_seed(accelerator.process_index)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(steps):
        accelerator.backward(model(torch.ones(2, 4) * accelerator.process_index).sum())
        optimizer.step()
        optimizer.zero_grad()
    said = (accelerator.num_processes, accelerator.device.type, accelerator.mixed_precision)
    Path(folder, f"rank{accelerator.process_index}").write_text(repr((said, accelerator.get_state_dict(model))))


def _state_of_process():
    return dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def _launched_twice(folder):
    from shardwise import debug_launcher, notebook_launcher

    torch.randn(512, 512) @ torch.randn(512, 512)  # the threads of torch are there, and not in what is forked
    before = _state_of_process()
    for _ in range(2):
        notebook_launcher(_train, (folder, 2), num_processes=2, mixed_precision="bf16")
    found = [Path(folder, f"rank{rank}").read_text() for rank in range(2)]
    debug_launcher(_train, (folder, 1), num_processes=2)
    assert _state_of_process() == before
    return found, Path(folder, "rank1").read_text()


def test_a_notebook_trains_on_two_processes_and_then_again(tmp_path):
    (first, second), later = alone(_launched_twice, str(tmp_path))
    assert first.startswith("((2, 'cpu', 'bf16'), {'weight'")
    assert second == "((2, 'cpu', 'bf16'), {})"
    assert later == "((2, 'cpu', 'no'), {})"


def _in_place(folder):
    from shardwise import notebook_launcher

    before = _state_of_process()
    notebook_launcher(_train, (folder, 1), num_processes=1, mixed_precision="bf16")
    assert _state_of_process() == before
    return Path(folder, "rank0").read_text()


def test_one_process_runs_in_place_with_its_precision(tmp_path):
    assert alone(_in_place, str(tmp_path)).startswith("((1, 'cpu', 'bf16'), {'weight'")


def _fails_on_one(folder):
    from shardwise import Accelerator

    accelerator = Accelerator()
    Path(folder, f"pid{accelerator.process_index}").write_text(str(os.getpid()))
    accelerator.wait_for_everyone()
    if accelerator.process_index == 1:
        raise KeyError("what is missing")
    accelerator.wait_for_everyone()


def _dies(folder):
    _pids_only(folder)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _pids_only(folder):
    Path(folder, f"pid{os.environ['RANK']}").write_text(str(os.getpid()))


def _waits(folder):
    _pids_only(folder)
    time.sleep(60)


def _message_of(function, folder):
    from shardwise import debug_launcher
    from shardwise.errors import LaunchError

    try:
        debug_launcher(function, (folder,))
    except LaunchError as error:
        return str(error), _alive(folder)
    return None


def _alive(folder):
    return [path.name for path in Path(folder).glob("pid*") if Path("/proc", path.read_text()).exists()]


def test_what_a_worker_raises_is_raised_with_its_traceback(tmp_path):
    text, alive = alone(_message_of, _fails_on_one, str(tmp_path))
    assert text.startswith("debug_launcher: rank 1 failed:\nTraceback")
    assert 'raise KeyError("what is missing")' in text
    assert "launchers.py" not in text
    assert alive == []


def _saves_in_the_background(folder, fails):
    from shardwise import Accelerator
    from shardwise.files import disk

    def slow(operation, path):
        if operation == "write" and path.suffix == ".safetensors":
            time.sleep(0.3)
            if fails:
                raise OSError(28, "the disk is full")

    accelerator = Accelerator()
    model = torch.nn.Linear(2, 2)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    slowed = disk.watched(slow)
    if accelerator.process_index == 1:
        slowed.__enter__()
        Path.slowed = slowed  # it outlives the function, as the save does
    accelerator.save_state(Path(folder, "state"), async_=True)


def _launched(folder, fails):
    from shardwise import debug_launcher
    from shardwise.errors import LaunchError

    try:
        debug_launcher(_saves_in_the_background, (folder, fails))
    except LaunchError as error:
        return str(error)
    return ""


def test_a_save_that_goes_on_behind_the_function_is_finished_and_fails_the_call(tmp_path):
    assert alone(_launched, str(tmp_path), False) == ""
    assert (tmp_path / "state" / "manifest.json").exists()
    text = alone(_launched, str(tmp_path), True)
    assert "CheckpointError: the last save in the background failed: " in text
    assert "the disk is full" in text


def test_a_worker_that_is_killed_ends_the_others(tmp_path):
    text, alive = alone(_message_of, _dies, str(tmp_path))
    assert text.startswith("debug_launcher: rank 1 was ended by SIGKILL")
    assert alive == []


def _interrupted(folder):
    from shardwise import debug_launcher

    def interrupt():
        while len(list(Path(folder).glob("pid*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = _state_of_process()
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        debug_launcher(_waits, (folder,))
    except KeyboardInterrupt:
        assert _state_of_process() == before
        return _alive(folder)
    return None


def test_an_interrupt_ends_the_workers(tmp_path):
    assert alone(_interrupted, str(tmp_path)) == []


def _refusals():
    from shardwise import Accelerator, debug_launcher, notebook_launcher
    from shardwise.errors import ConfigError, LaunchError

    with pytest.raises(ConfigError, match="node_rank is 2"):
        notebook_launcher(print, node_rank=2, num_nodes=2, num_processes=1)
    with pytest.raises(ConfigError, match="num_processes is 0"):
        debug_launcher(print, num_processes=0)
    with pytest.raises(ConfigError, match="mixed_precision"):
        notebook_launcher(print, num_processes=2, mixed_precision="bf17")
    with pytest.raises(ConfigError, match="use_port is 0"):
        notebook_launcher(print, num_processes=2, num_nodes=2, use_port=0)
    accelerator = Accelerator(cpu=True)
    with pytest.raises(LaunchError, match="this process has an Accelerator"):
        debug_launcher(print)
    accelerator.end_training()
    torch.cuda.is_initialized = lambda: True
    with pytest.raises(LaunchError, match=r"CUDA is initialised in this process.*Restart the kernel"):
        debug_launcher(print)


def test_what_cannot_be_forked_is_refused_before_any_worker():
    alone(_refusals)


@pytest.mark.parametrize(("gpus", "count", "refused"), [(2, 3, True), (2, 2, False), (None, 3, False), (0, 3, False)])
def test_more_processes_than_gpus_are_refused(gpus, count, refused):
    from shardwise.errors import ConfigError
    from shardwise.run.launchers import _check_counts

    if refused:
        with pytest.raises(ConfigError, match=r"this process sees 2 GPU\(s\)"):
            _check_counts(count, 0, 1, gpus)
    else:
        _check_counts(count, 0, 1, gpus)


def _cells_of(notebook, folder):
    """Run a notebook's cells one after another, in its own directory, as a kernel does. What the last one gives, as text."""
    import ast
    import json
    import shutil

    for name in ("data", "base_model"):
        shutil.copytree(notebook.parent / name, folder / "examples" / name)
    os.chdir(folder / "examples")
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = {"__name__": "__main__"}
    given = None
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
            given = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names) if last else None
    return given


def test_the_quickstart_runs_from_its_first_cell_to_its_last(tmp_path):
    notebook = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
    answer = alone(_cells_of, notebook, tmp_path)
    assert answer.strip() in ("complaint", "no complaint")
    assert (tmp_path / "runs" / "quickstart" / "adapter_model.safetensors").is_file()


def test_the_quickstart_is_kept_without_what_it_printed():
    import json

    notebook = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
    read = json.loads(notebook.read_text(encoding="utf-8"))
    assert (read["nbformat"], len({cell["id"] for cell in read["cells"]})) == (4, len(read["cells"]))
    assert all(cell["outputs"] == [] for cell in read["cells"] if cell["cell_type"] == "code")
