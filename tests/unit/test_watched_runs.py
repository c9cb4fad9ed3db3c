"""A run's record: every moment in one part, a line for each logged step, files that survive what happens to runs."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from shardwise import Accelerator, WatchCallback
from shardwise.errors import ConfigError, DataError, PrepareError
from shardwise.ranks.activity import Doing, activity
from shardwise.run.process import forget_run
from shardwise.watching import clock as clocks
from shardwise.watching import lines as making
from shardwise.watching.bar import Bar, count, duration, text_of
from shardwise.watching.clock import Clock
from shardwise.watching.lines import PARTS, Lines, Noted, Run
from shardwise.watching.memory import Memory
from shardwise.watching.record import METRICS, Record
from shardwise.watching.watch import Wishes, ids_in, rows_of
from shardwise.watching.work import Work, peak_of, work_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()
    activity.listener = None


class Hand:
    """A clock that is set by hand: `pass_` lets seconds go by."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def hand(monkeypatch):
    return Hand(monkeypatch)


def lines_of(told, *, total=None, per_epoch=None, work=None, peak=None, ranks=1):
    run = Run(ranks, total, per_epoch, work or Work(0, 0, 0), peak)
    return Lines(run, Clock(CPU, "data"), 0, Memory(CPU, dict), None, None, told.append)


def step(lines, hand, number, *, data=1.0, compute=2.0, stepping=3.0, other=4.0, noted=None):
    lines.asks()
    hand.pass_(data)
    lines.given()
    hand.pass_(compute)
    lines.begins(Doing.STEP)
    hand.pass_(stepping)
    lines.stepped()
    lines.due(number, lambda: noted or Noted(loss=0.5, tokens=600, samples=6))
    hand.pass_(other)


def test_the_parts_of_a_line_sum_to_its_wall_time(hand):
    told = []
    lines = lines_of(told, total=10, per_epoch=4)
    step(lines, hand, 1)
    lines.calls("save_state")
    hand.pass_(7.0)
    lines.calls("finish_saving")  # one verb in another is part of it
    lines.begins(Doing.EVALUATION)
    hand.pass_(1.0)
    lines.returns()
    lines.returns()
    hand.pass_(0.5)
    step(lines, hand, 2)
    lines.begins(Doing.EVALUATION)
    hand.pass_(20.0)
    lines.begins(Doing.NONE)
    hand.pass_(1.0)  # between two batches of an evaluation
    lines.asks()
    lines.rest()
    hand.pass_(9.0)
    lines.close(2)
    first, second = told
    assert first["time_s"] == dict(zip(PARTS, (1.0, 2.0, 3.0, 8.0, 0.0, 4.5), strict=True))
    assert second["time_s"] == dict(zip(PARTS, (1.0, 2.0, 3.0, 0.0, 21.0, 13.0), strict=True))
    for line in told:
        assert math.isclose(sum(line["time_s"].values()), line["wall_s"])
    assert first["tokens_per_s"] == pytest.approx(600 / 10.5)  # no saves in it
    assert second["tokens_per_s"] == pytest.approx(600 / 10)  # no evaluation, nothing between loops
    assert [line["epoch"] for line in told] == [0.25, 0.5]
    assert second["elapsed_s"] == pytest.approx(sum(line["wall_s"] for line in told))


def test_what_lies_behind_the_last_step_is_in_a_line_of_no_steps(hand):
    told = []
    lines = lines_of(told)
    step(lines, hand, 1)
    lines.asks()
    lines.given()
    hand.pass_(5.0)  # the script broke off in the middle of a step
    lines.close(1)
    assert [(line["step"], line["steps"], line["loss"]) for line in told] == [(1, 1, 0.5), (1, 0, None)]
    assert sum(line["wall_s"] for line in told) == pytest.approx(15.0)


def test_the_time_left_is_that_of_the_steps_left_and_forgets_the_first_one(hand):
    told = []
    lines = lines_of(told, total=5)
    step(lines, hand, 1, compute=100.0)
    for number in (2, 3, 4, 5):
        step(lines, hand, number)
    lines.close(5)
    assert [line["left_s"] for line in told] == pytest.approx([4 * 108, 30, 20, 10, 0], abs=1e-6)


def test_the_time_left_of_a_line_of_several_steps_is_that_of_each(hand):
    told = []
    lines = lines_of(told, total=12)
    for number in (3, 6):
        step(lines, hand, number)  # 10 seconds for three steps
    lines.close(6)
    assert [line["left_s"] for line in told] == pytest.approx([30, 20])
    told.clear()
    lines_of(told, total=12).close(0)  # nothing was done: nobody knows
    assert [line["left_s"] for line in told] == [None]


def test_an_interval_of_many_spans_keeps_few_marks():
    clock = Clock(CPU, "a")
    for _ in range(200):
        clock.enter("b")
        clock.enter("a")
    interval = clock.cut()
    assert len(interval._unread) <= 33
    assert set(interval.read()) == {"a", "b"}


class Event:
    """Stands for an event of a GPU that has passed at a time, and may be asked only then."""

    made = 0

    def __init__(self, stream):
        Event.made += 1
        self.at, self.stream = stream.now, stream

    def query(self):
        return self.stream.done >= self.at

    def synchronize(self):
        self.stream.waited += 1
        self.stream.done = max(self.stream.done, self.at)

    def elapsed_time(self, later):
        assert later.query()
        return 1000 * (later.at - self.at)


def test_on_a_gpu_nothing_waits_for_the_device_until_the_run_ends(monkeypatch):
    stream = SimpleNamespace(now=0.0, done=0.0, waited=0)
    monkeypatch.setattr(clocks, "compute_stream", lambda device: stream)
    monkeypatch.setattr(clocks, "timed_mark", Event)
    monkeypatch.setattr(making, "_WRITTEN_EVERY_S", 0.0)
    told = []
    lines = lines_of(told)
    for number in (1, 2, 3):
        lines.asks()
        stream.now += 1.0
        lines.given()
        stream.now += 2.0
        lines.begins(Doing.STEP)
        stream.now += 3.0
        lines.stepped()
        lines.due(number, Noted)
        assert not told or number == 3
        if number == 2:  # the device has passed the first line's end
            stream.done = 6.5
    assert [line["step"] for line in told] == [1]
    assert stream.waited <= 4  # reads of what has passed
    lines.close(3)
    assert [line["wall_s"] for line in told] == [6.0, 6.0, 6.0]


# Work.


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "vocab_size": 128, "attn_implementation": "eager", **changes}
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_formula_counts_what_torch_counts(frozen, tied):
    model = llama(tie_word_embeddings=tied)
    if frozen:
        model.requires_grad_(False)
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    ids = torch.randint(0, 128, (2, 32))
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    predicted = work_of(model).of_token(32) * ids.numel()
    assert predicted == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_work_says_why_it_is_not_known():
    config = SimpleNamespace(is_encoder_decoder=True)
    model = nn.Linear(2, 2)
    model.config = config
    assert work_of(model).of_token(8) is None
    assert "an encoder and a decoder" in work_of(model).formula()
    model.config = SimpleNamespace(num_local_experts=8)
    assert "experts" in work_of(model).formula()
    assert work_of(model, per_token=5.0).of_token(8) == 5.0
    del model.config
    assert work_of(model).of_token(8) == 24
    assert "no config" in work_of(model).formula()
    assert work_of(model, {"weight": (2, 100)}).weights == 2 * 2 + 2  # a layer that says its sides has them


def test_a_peak_is_known_by_the_devices_name_or_its_text_says_what_to_give():
    half = torch.bfloat16
    assert peak_of("NVIDIA H100 80GB HBM3", half, tf32=False)[0] == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", half, tf32=False)[0] == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB", half, tf32=False)[0] == 312e12
    assert peak_of("NVIDIA A10G", half, tf32=False)[0] == 70e12
    assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True)[0] == 156e12
    for device, dtype in (("NVIDIA A100-SXM4-80GB", torch.float32), ("Quadro", half)):
        peak, why = peak_of(device, dtype, tf32=False)
        assert peak is None
        assert "peak_flops=" in why


def test_mfu_is_operations_over_the_peak(hand):
    told = []
    lines = lines_of(told, work=Work(10, 10, 5, layers=2, width=4), peak=1e6, ranks=2)
    step(lines, hand, 1)
    lines.close(1)
    per_token = 6 * 10 + 4 * 5 + 12 * 2 * 4 * 100
    assert told[0]["mfu"] == pytest.approx(per_token * (600 / 10 / 2) / 1e6)


# Files.


def test_a_new_run_keeps_the_record_of_an_earlier_one(tmp_path):
    for number in range(3):
        record = Record(tmp_path, goes_on=False)
        record.write({"step": number})
        record.close()
    found = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert found == {
        "metrics.jsonl": '{"step":2}\n',
        "metrics.1.jsonl": '{"step":0}\n',
        "metrics.2.jsonl": '{"step":1}\n',
    }


def test_a_run_that_goes_on_appends_and_drops_a_line_that_was_cut(tmp_path):
    (tmp_path / METRICS).write_text('{"step":1}\n{"step":2}\n{"st')
    record = Record(tmp_path, goes_on=True)
    record.write({"step": 2, "loss": math.nan, "norm": -math.inf})
    record.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 2, "loss": "NaN", "norm": "-Infinity", "resumed": True}]


def test_a_full_disk_ends_the_record_and_not_the_run(tmp_path, caplog, monkeypatch):
    record = Record(tmp_path, goes_on=False)
    record.write({"step": 1})

    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "_file", SimpleNamespace(write=full, close=record._file.close))
    with caplog.at_level(logging.WARNING, logger="shardwise"):
        record.write({"step": 2})
        record.write({"step": 3})
        record.close()
    assert [entry.message for entry in caplog.records] == [
        f"{tmp_path}: the run's record ends here: No space left on device."
    ]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Record(tmp_path / "file" / "run", goes_on=False)


# The bar.


LINE = {
    **{"step": 3, "epoch": 0.5, "loss": 1.25, "learning_rate": 3e-4, "gradient_norm": None, "mfu": 0.413},
    **{"tokens_per_s": 12345.0, "tokens_per_s_per_gpu": 6172.5, "samples_per_s": 3.0, "wall_s": 2.0},
    "time_s": {"data": 0.5},
    "memory_bytes": {
        "device": {"now": 17_000_000_000, "peak": 1},
        "host": {"now": 2_500_000_000, "peak": 1},
        "drive": None,
    },
    "left_s": 3723.0,
}


def test_the_bar_says_what_is_known_and_leaves_out_what_is_not():
    assert text_of(LINE, 6, 1) == (
        "██████░░░░░░ 50% · step 3/6 · epoch 0.50/1 · loss 1.25 · lr 0.0003 · 12.3k tok/s (6.17k each) · MFU 41.3% · "
        "device 17.0 GB · host 2.50 GB · data 25% · left 1:02:03"
    )
    bare = {**LINE, **dict.fromkeys(("epoch", "loss", "learning_rate", "tokens_per_s", "mfu", "left_s"))}
    assert text_of(bare, None, None) == "step 3 · 3 samples/s · device 17.0 GB · host 2.50 GB · data 25%"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_redraws_itself_on_a_terminal_and_says_little_elsewhere():
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        bar = Bar(6, 1, stream)
        for number in (1, 2, 3):
            bar.show({**LINE, "step": number})
        bar.rest()
    assert terminal.getvalue().startswith("\r\x1b[2K")
    assert terminal.getvalue().endswith("\n")
    assert max(map(len, terminal.getvalue().split("\r\x1b[2K"))) <= 80
    assert [line.split(" · ")[1] for line in file.getvalue().splitlines()] == ["step 1/6", "step 3/6"]


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (90000, "25:00:00"), (400000, "4 d 15 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_counts():
    assert [count(number) for number in (0, 950, 1234, 5e6, 7e9)] == ["0", "950", "1.23k", "5M", "7G"]


# An Accelerator's loop.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, ids):
        return self.head(self.embedding(ids))


def trained(tmp_path, *, watches=True, epochs=2, accumulate=1, keep=False, stop_after=None, **wishes):
    """Losses of a small run of 8 batches of 2 rows of 5 tokens an epoch; its record is in tmp_path."""
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, gradient_accumulation_steps=accumulate)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(0, 50, (16, 5), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(ids), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(epochs):
        for (batch,) in accelerator.watch(loader, bar=False, **wishes) if watches else loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if stop_after is not None and len(losses) == stop_after:
                break
    if not keep:
        accelerator.end_training()
    return (accelerator, losses) if keep else losses


def record_of(directory):
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def test_steps_of_any_optimizer_are_watched(tmp_path):
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    idle, busy = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (idle, busy)]
    accelerator.prepare(idle, busy, *optimizers)
    for batch in accelerator.watch([torch.ones(1, 2)] * 3, bar=False):
        accelerator.backward(busy(batch).sum())
        optimizers[1].step()
        optimizers[1].zero_grad()
    accelerator.end_training()
    assert [(line["step"], line["loss"] is None) for line in record_of(tmp_path)] == [
        (1, False),
        (2, False),
        (3, False),
    ]


@pytest.mark.parametrize("ends", ["end_training", "free_memory"])
def test_steps_of_a_loop_that_was_left_have_their_line_when_the_run_ends(tmp_path, ends):
    accelerator, losses = trained(tmp_path, epochs=1, stop_after=7, log_every=4, keep=True)
    getattr(accelerator, ends)()
    lines = [line for line in record_of(tmp_path) if line["steps"]]
    assert [(line["step"], line["steps"]) for line in lines] == [(4, 4), (7, 3)]
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 3])
    assert [line["samples"] for line in lines] == [8, 6]
    forget_run()


def test_a_watched_run_has_the_same_losses_and_a_line_for_each_step(tmp_path):
    plain = trained(tmp_path / "plain", watches=False)
    forget_run()
    began = time.perf_counter()
    assert trained(tmp_path / "run", epochs=2) == plain
    took = time.perf_counter() - began
    lines = record_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert [line["loss"] for line in lines] == pytest.approx(plain, rel=1e-6)
    assert all(line["tokens"] == 10 and line["samples"] == 2 and line["learning_rate"] == 0.5 for line in lines)
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert lines[-1]["epoch"] == 2.0
    assert lines[-1]["memory_bytes"]["host"]["peak"] >= lines[-1]["memory_bytes"]["host"]["now"] > 0
    watched = sum(sum(line["time_s"].values()) for line in lines)
    assert watched == pytest.approx(lines[-1]["elapsed_s"], rel=0.05)
    assert watched <= took
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["versions"]["torch"] == torch.__version__
    assert about["weights"] == 50 * 8 + 8 * 50 + 50
    assert about["multiplied_weights"] == {"trained": 400, "frozen": 0}
    assert "CPU" in about["mfu"]["peak"]
    assert not (tmp_path / "plain" / METRICS).exists()


def test_lines_cover_several_steps_and_the_rest_of_an_epoch(tmp_path):
    losses = trained(tmp_path, accumulate=2, log_every=3, epochs=1, peak_flops=1e9)
    lines = record_of(tmp_path)
    assert [(line["step"], line["steps"], line["tokens"]) for line in lines] == [(3, 3, 60), (4, 1, 20)]
    assert lines[0]["loss"] == pytest.approx(sum(losses[:6]) / 6)
    assert lines[1]["loss"] == pytest.approx(sum(losses[6:]) / 2)
    assert lines[0]["mfu"] == pytest.approx(2400 * lines[0]["tokens_per_s"] / 1e9)


def test_a_loop_that_is_broken_off_has_a_record(tmp_path):
    trained(tmp_path, epochs=1, log_every=2, stop_after=5)
    lines = record_of(tmp_path)
    assert [(line["step"], line["steps"], line["loss"] is None) for line in lines] == [
        (2, 2, False),
        (4, 2, False),
        (5, 1, False),  # end_training brings it together
    ]


def test_saves_and_evaluations_have_their_parts(tmp_path):
    accelerator, _ = trained(tmp_path, keep=True, epochs=1)
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        accelerator._models[0](torch.zeros(2, 5, dtype=torch.int64))
    accelerator.end_training()
    last = record_of(tmp_path)[-1]
    assert last["step"] == 8
    assert last["time_s"]["saving"] > 0
    assert last["time_s"]["evaluation"] > 0
    assert activity.listener is None


@pytest.mark.parametrize(
    ("wishes", "error"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a number above 0"),
        ({"log_every": 1.5}, "log_every is 1.5; it must be a whole number"),
        ({"log_every": None}, "log_every is None"),
        ({"steps": True}, "steps is True"),
        ({"peak_flops": math.inf}, "peak_flops is inf"),
        ({"peak_flops": math.nan}, "peak_flops is nan"),
        ({"epochs": 2, "steps": 5}, "give one of them"),
    ],
)
def test_wrong_wishes_are_errors(wishes, error):
    with pytest.raises(ConfigError, match=error):
        Wishes(**wishes).check()


def test_one_run_has_one_record_and_needs_steps_and_a_loader(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(PrepareError, match="no optimizer is prepared"):
        accelerator.watch([])
    model = Net()
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(DataError, match="not a int"):
        accelerator.watch(5)
    with pytest.raises(DataError, match="has no length"):
        accelerator.watch(iter([]), epochs=2)
    with caplog.at_level(logging.WARNING, logger="shardwise"):
        assert len(accelerator.watch([1, 2], epochs=2, bar=False)) == 2
    assert "no metrics.jsonl is written" in caplog.text
    with pytest.raises(ConfigError, match="epochs was 2 in the first call, and is None now"):
        accelerator.watch([1, 2], bar=False)
    accelerator.free_memory()
    assert accelerator._run.watch is None


def test_trackers_get_each_line(tmp_path):
    seen = []
    tracker = SimpleNamespace(name="mine", log=lambda values, step=None: seen.append((step, values)))
    accelerator = Accelerator(cpu=True, log_with=tracker, project_dir=tmp_path)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    accelerator.init_trackers("run")
    for ids in accelerator.watch([torch.ones(2, 3, dtype=torch.int64)], bar=False):
        accelerator.backward(model(ids).sum())
        optimizer.step()
    assert seen == []  # a line is whole when the next batch comes, or the run ends
    accelerator.end_training()
    ((step_, values),) = seen
    assert step_ == 1
    assert {"train/loss", "train/tokens_per_s", "time/step_s", "memory/host_now_bytes"} <= values.keys()
    assert all(isinstance(value, (int, float)) for value in values.values())


def test_token_ids_are_found_in_batches_of_usual_shapes():
    ids, labels, images = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(4, 3, 8, 8),
    )
    assert ids_in({"input_ids": ids, "labels": ids + 1}) is ids
    assert ids_in((labels, ids)) is ids
    assert ids_in(ids) is ids
    assert ids_in((images, labels)) is None
    assert ids_in("a text") is None
    assert rows_of((images, labels)) == 4
    assert rows_of(["a", "b"]) == 0


# The Trainer's callback.


def test_the_callback_writes_a_line_for_each_log_of_a_trainer(tmp_path):
    model = llama()
    args = SimpleNamespace(
        device=CPU,
        bf16=False,
        fp16=False,
        world_size=2,
        output_dir=str(tmp_path),
        to_sanitized_dict=lambda: {"learning_rate": 0.1},
    )
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, num_train_epochs=2, global_step=0, logging_steps=2)
    control = SimpleNamespace(should_evaluate=False, should_save=False)
    callback = WatchCallback(bar=False)
    told = (args, state, control)
    callback.on_init_end(*told)
    callback.on_train_begin(*told, model=model)
    for number in (1, 2, 3, 4):
        callback.on_step_begin(*told)
        model(input_ids=torch.zeros(2, 8, dtype=torch.int64))
        callback.on_pre_optimizer_step(*told)
        state.global_step = number
        control.should_evaluate = control.should_save = number == 4
        callback.on_step_end(*told)
        if number % 2 == 0:
            callback.on_log(*told, logs={"loss": 1.0 / number, "learning_rate": 0.1, "grad_norm": torch.tensor(2.0)})
    model.eval()
    model(input_ids=torch.zeros(2, 8, dtype=torch.int64))
    callback.on_evaluate(*told)
    time.sleep(0.002)
    control.should_save = False
    callback.on_save(*told)
    callback.on_log(*told, logs={"train_runtime": 1.0})
    callback.on_train_end(*told)
    lines = record_of(tmp_path)
    assert [(line["step"], line["steps"], line["loss"], line["tokens"]) for line in lines] == [
        (2, 2, 0.5, 64),
        (4, 2, 0.25, 64),
    ]
    assert lines[1]["time_s"]["evaluation"] > 0
    assert lines[1]["time_s"]["saving"] >= 0.002
    assert lines[1]["gradient_norm"] == 2.0
    assert activity.listener is None
    assert not model._forward_pre_hooks
    assert not hasattr(callback, "on_no_event")


class Told:
    """What a Trainer says on two ranks, of `batches` batches in an epoch, which it trains to `max_steps`."""

    def __init__(self, folder, batches, max_steps, accumulation=1):
        self.args = SimpleNamespace(
            device=CPU,
            bf16=False,
            fp16=False,
            world_size=2,
            output_dir=str(folder),
            to_sanitized_dict=dict,
            gradient_accumulation_steps=accumulation,
        )
        whole = sys.maxsize if batches is None else -(-max_steps * accumulation // batches)
        self.state = SimpleNamespace(
            is_world_process_zero=True, max_steps=max_steps, num_train_epochs=whole, global_step=0, logging_steps=2
        )
        self.told = (self.args, self.state, SimpleNamespace(should_evaluate=False, should_save=False))
        self.loader = iter(()) if batches is None else range(batches)

    def train(self, callback, model, *, until=None):
        """A log for every two steps. until: where an interruption ends it."""
        self.state.global_step = 0
        callback.on_train_begin(*self.told, model=model, train_dataloader=self.loader)
        for number in range(1, self.state.max_steps + 1):
            callback.on_step_begin(*self.told)
            model(input_ids=torch.zeros(2, 8, dtype=torch.int64))
            if number == until:
                return
            self.state.global_step = number
            callback.on_step_end(*self.told)
            if number % 2 == 0:
                callback.on_log(*self.told, logs={"loss": 1.0})
        callback.on_train_end(*self.told)


@pytest.mark.parametrize(
    ("batches", "accumulation", "max_steps", "epochs"),
    [(8, 1, 12, 1.5), (8, 1, 5, 0.625), (8, 3, 4, 4 / 3), (None, 1, 4, None)],
    ids=["half", "within", "accumulated", "stream"],
)
def test_the_epoch_of_a_trainer_is_that_of_its_loader(tmp_path, capsys, batches, accumulation, max_steps, epochs):
    Told(tmp_path, batches, max_steps, accumulation).train(WatchCallback(), llama())
    assert record_of(tmp_path)[-1]["epoch"] == epochs
    of_the_run = f"epoch {epochs:.2f}/{epochs:g}" if epochs else f"step {max_steps}/{max_steps} · loss"
    assert of_the_run in capsys.readouterr().err


def test_steps_of_a_trainer_behind_its_last_log_have_their_tokens_and_no_other_run_has_them(tmp_path):
    callback, model = WatchCallback(bar=False), llama()
    for _ in range(2):
        Told(tmp_path, 8, 3).train(callback, model)
        lines = record_of(tmp_path)
        assert [(line["step"], line["tokens"], line["samples"]) for line in lines] == [(2, 64, 8), (3, 32, 4)]


def test_a_trainer_that_was_interrupted_and_trains_again_counts_each_token_once(tmp_path):
    callback, model = WatchCallback(bar=False), llama()
    Told(tmp_path, 8, 4).train(callback, model, until=3)
    assert len(model._forward_pre_hooks) == 1
    Told(tmp_path, 8, 4).train(callback, model)
    assert [line["tokens"] for line in record_of(tmp_path)] == [64, 64]
    assert not model._forward_pre_hooks
    assert activity.listener is None
