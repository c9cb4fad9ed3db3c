"""`shardwise import`, without ranks: every element arrives at its place, and what is spoiled is one sentence and no output."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from rig.foreign_files import Layout, Net, groups_of, write_deepspeed
from shardwise.checkpoint.read import Checkpoint
from shardwise.cli.main import run as command
from shardwise.errors import CheckpointError
from shardwise.foreign.deepspeed import read_deepspeed
from shardwise.foreign.importing import import_checkpoint
from shardwise.foreign.matching import match_named, match_shapes
from shardwise.plan.precision import LossScaler

STEPS = 3


def trained_run(steps: int = STEPS) -> tuple[Net, torch.optim.AdamW, Any]:
    torch.manual_seed(5)
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, eps=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    for step in range(steps):
        tokens = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def saved(folder: Path, layout: Layout) -> tuple[Net, torch.optim.AdamW]:
    model, optimizer, scheduler = trained_run()
    write_deepspeed(folder, model, optimizer, scheduler, STEPS, layout)
    return model, optimizer


LAYOUTS = [
    *(Layout(stage=stage, world=world) for stage in (1, 2, 3) for world in (1, 2, 3)),
    Layout(stage=2, world=2, version="0.14.4", bf16=True),
    Layout(stage=2, world=3, version="0.19.8", aligned=True),
    Layout(stage=2, world=1, version="0.19.8", aligned=True),
    Layout(stage=3, world=2, version="0.19.8", sub_group_numel=20),
    Layout(stage=1, world=2, elastic=True),
    Layout(stage=2, world=2, round_robin=True),
    Layout(stage=1, world=3, bf16=True, accumulates_fp32=True),
    Layout(stage=2, world=7),
    Layout(stage=3, world=7),
]


def said(layout: Layout) -> str:
    flags = [
        name for name in ("aligned", "elastic", "bf16", "accumulates_fp32", "round_robin") if getattr(layout, name)
    ]
    return "-".join([f"{layout.version}-zero{layout.stage}-x{layout.world}", *flags])


@pytest.mark.parametrize("layout", LAYOUTS, ids=said)
def test_every_element_of_a_run_of_deepspeed_arrives_at_its_place(tmp_path, layout):
    model, optimizer = saved(tmp_path / "run", layout)
    done = import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert (done.step, done.world_size, done.source) == (STEPS, layout.world, f"DeepSpeed {layout.version}")
    checkpoint = Checkpoint(tmp_path / "out")
    checkpoint.verify()
    addresses = set(checkpoint.addresses("model0/")) | set(checkpoint.addresses("optimizer0/"))
    states = {name: checkpoint.state(0)["optimizers"][0] for name in ("numbers", "names", "groups")}
    for name, weight in model.named_parameters():
        kind = "trained" if weight.requires_grad else "frozen"
        own = weight.bfloat16() if layout.bf16 and kind == "frozen" else weight
        assert torch.equal(checkpoint.read_whole(f"model0/{kind}/{name}"), own), name
        addresses.remove(f"model0/{kind}/{name}")
        for key in ("exp_avg", "exp_avg_sq") if weight.requires_grad else ():
            assert torch.equal(checkpoint.read_whole(f"optimizer0/{key}/model0/{name}"), optimizer.state[weight][key])
            addresses.remove(f"optimizer0/{key}/model0/{name}")
        if weight.requires_grad:
            assert states["numbers"]["numbers"][f"model0/{name}"]["step"] == STEPS
    assert torch.equal(checkpoint.read_whole("model0/buffer/scale"), model.scale)
    assert addresses == {"model0/buffer/scale"}
    groups = checkpoint.state(0)["optimizers"][0]["groups"]
    assert [group["lr"] for group in groups] == [group["lr"] for group in optimizer.param_groups]
    assert layout.elastic or [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert not any("fused" in group or "params" in group for group in groups)


def test_what_a_script_gave_to_save_checkpoint_lies_beside_as_json(tmp_path):
    kept = {"note": {"epoch": 1}, "best": 0.5, "tensor": torch.ones(2)}
    saved(tmp_path / "run", Layout(client_state=kept))
    done = import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "client_state.json").read_text()) == {"note": {"epoch": 1}, "best": 0.5}
    assert any("client_state['tensor'] is not carried over" in note for note in done.notes)


def fused(content: Any) -> None:
    """DeepSpeed's own Adam counts steps in its groups, as plain numbers."""
    base = content["optimizer_state_dict"]["base_optimizer_state"]
    for state in base["state"].values():
        del state["step"]
    for group in base["param_groups"]:
        group |= {"step": 7, "bias_correction": True}


def elastic_fused(content: Any) -> None:
    for state in content["optimizer_state_dict"]["base_optimizer_state"]:
        del state["step"]
    content["optimizer_state_dict"]["base_optimizer_state_step"] = 7


@pytest.mark.parametrize(("elastic", "change"), [(False, fused), (True, elastic_fused)])
def test_a_step_that_is_counted_in_the_groups_is_each_weights(tmp_path, elastic, change):
    saved(tmp_path / "run", Layout(elastic=elastic))
    for rank in range(2):
        rewritten(f"*rank_{rank}_*optim*", change)(tmp_path / "run" / f"global_step{STEPS}")
    import_checkpoint(tmp_path / "run", tmp_path / "out")
    (optimizer,) = Checkpoint(tmp_path / "out").state(0)["optimizers"]
    assert {float(numbers["step"]) for numbers in optimizer["numbers"].values()} == {7.0}
    assert not any("step" in group for group in optimizer["groups"])


def test_what_of_a_model_is_no_tensor_is_said(tmp_path):
    saved(tmp_path / "run", Layout())
    tag = tmp_path / "run" / f"global_step{STEPS}"
    rewritten("mp_rank*", lambda content: content["module"].update({"up._extra_state": "text"}))(tag)
    done = import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert any("up._extra_state" in note for note in done.notes)


def test_excluded_frozen_weights_are_said(tmp_path):
    saved(tmp_path / "run", Layout(stage=3, frozen=False))
    done = import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert any("2 frozen weight(s) are not in it" in note for note in done.notes)
    assert not list(Checkpoint(tmp_path / "out").addresses("model0/frozen/"))


@pytest.mark.parametrize("overflows", [(), (0,), (2, 3), (5,), (1, 4, 11)], ids=str)
@pytest.mark.parametrize("version", ["0.14.4", "0.17.0", "0.17.1", "0.19.8"])
def test_the_loss_scale_goes_on_as_deepspeed_moves_it(tmp_path, version, overflows):
    """DeepSpeed counts iterations; the scale doubles when so many have gone by without an overflow, later versions say when."""
    later_rise = version > "0.17.0"
    window, steps, later = 4, 12, 5
    scale, last = 16.0, -1
    history = []
    for step in range(steps + later):
        if step == steps:
            counts = {"cur_scale": scale, "cur_iter": step, "last_overflow_iter": last, "scale_window": window}
        if step in overflows:
            scale, last = scale / 2, step
        elif (step - last - later_rise) % window == 0 and step - last > later_rise:
            scale *= 2
        history.append(scale)
    saved(tmp_path / "run", Layout(version=version, scaler=counts))
    import_checkpoint(tmp_path / "run", tmp_path / "out")
    ours = LossScaler(enabled=True, growth_interval=window)
    ours.load_state_dict(Checkpoint(tmp_path / "out").state(0)["scaler"])
    for expected in history[steps:]:
        ours.scale(torch.ones(()))
        ours.update(False, step=0, say=False)
        assert ours.state_dict()["value"] == expected


def test_a_schedule_of_deepspeed_keeps_its_position(tmp_path):
    class Warmup:
        def state_dict(self) -> dict[str, Any]:
            return {"last_batch_iteration": STEPS - 1}

    model, optimizer, torchs = trained_run()
    write_deepspeed(tmp_path / "run", model, optimizer, Warmup(), STEPS, Layout())
    done = import_checkpoint(tmp_path / "run", tmp_path / "out")
    assert any("3 steps" in note for note in done.notes)
    (state,) = Checkpoint(tmp_path / "out").state(0)["schedulers"]
    assert state["last_batch_iteration"] == STEPS - 1
    again = torch.optim.lr_scheduler.LambdaLR(trained_run(0)[1], lambda n: 1 / (1 + n))
    again.load_state_dict(state)
    assert again.last_epoch == torchs.last_epoch
    assert again._step_count == torchs._step_count


def test_what_accelerate_and_trainer_keep_around_a_tag_comes_along(tmp_path):
    saved(tmp_path / "run", Layout(stage=3, world=2))
    (tmp_path / "run" / f"global_step{STEPS}").rename(tmp_path / "run" / "pytorch_model")
    (tmp_path / "run" / "latest").write_text("pytorch_model")
    for rank in range(2):
        kept = {"step": 5, "random_state": random.Random(rank).getstate(), "torch_manual_seed": torch.get_rng_state()}
        kept["numpy_random_seed"] = numpy.random.RandomState(rank).get_state()
        torch.save(kept, tmp_path / "run" / f"random_states_{rank}.pkl")
    import_checkpoint(tmp_path / "run", tmp_path / "one")
    first, second = (Checkpoint(tmp_path / "one").state(rank) for rank in range(2))
    assert first["counters"] == {"step": 5}
    assert second["generators"]["python"] == random.Random(1).getstate()
    assert (second["generators"]["numpy"][1] == numpy.random.RandomState(1).get_state()[1]).all()
    for rank in range(2):
        path = tmp_path / "run" / f"random_states_{rank}.pkl"
        kept = torch.load(path, weights_only=False)
        names = {"random_state": "python", "numpy_random_seed": "numpy", "torch_manual_seed": "cpu"}
        torch.save({names[key]: kept[key] for key in names}, tmp_path / "run" / f"rng_state_{rank}.pth")
        path.unlink()
    import_checkpoint(tmp_path / "run", tmp_path / "two")
    assert Checkpoint(tmp_path / "two").state(1)["generators"]["python"] == second["generators"]["python"]
    (tmp_path / "run" / "rng_state_1.pth").unlink()
    assert "rng_state_1.pth is missing" in refused(tmp_path / "run", tmp_path / "three")


# What is spoiled.


class Runs:
    """Would make a file if it were unpickled as pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def truncated(tag: Path) -> None:
    path = next(tag.glob("*rank_1_*optim_states.pt"))
    path.write_bytes(path.read_bytes()[:-200])


def emptied(tag: Path) -> None:
    next(tag.glob("*rank_0_*optim_states.pt")).write_bytes(b"")


def missing_rank(tag: Path) -> None:
    next(tag.glob("*rank_0_*optim_states.pt")).unlink()


def missing_last_rank(tag: Path) -> None:
    next(tag.glob("*rank_2_*optim_states.pt")).unlink()


def missing_models(tag: Path) -> None:
    for path in tag.glob("*model_states.pt"):
        path.unlink()


def missing_optimizers(tag: Path) -> None:
    for path in tag.glob("*optim_states.pt"):
        path.unlink()


def odd_latest(tag: Path) -> None:
    (tag.parent / "latest").write_text("../elsewhere")


def rewritten(pattern: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change what is in a file, keeping its tensors; DeepSpeed's own objects become plain ones."""

    def spoil(tag: Path) -> None:
        from shardwise.foreign.pickles import Inert, read_pickle

        def without(value: Any) -> Any:
            if isinstance(value, Inert):
                return value.args[0] if value.args else argparse.Namespace(**value.state)
            if isinstance(value, dict):
                return type(value)((key, without(item)) for key, item in value.items())
            return [without(item) for item in value] if type(value) is list else value

        path = next(tag.glob(pattern))
        content = without(read_pickle(path))
        content.get("optimizer_state_dict", {}).pop("param_slice_mappings", None)
        change(content)
        torch.save(content, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    return spoil


def longer(content: Any) -> None:
    masters = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    masters[0] = torch.cat([masters[0], torch.zeros(9)])


def shorter_moment(content: Any) -> None:
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"] = state["exp_avg"][:-1]


def on_a_drive(content: Any) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}


def other_weights(content: Any) -> None:
    content["param_shapes"][0]["more"] = torch.Size([40])


def renamed(content: Any) -> None:
    """The same sizes in another order, as files of two runs may have them."""
    group = content["param_shapes"][0]
    content["param_shapes"][0] = dict(reversed(group.items()))


def another_time(content: Any) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][1]["step"] = torch.tensor(8.0)


def tensor_parallel(content: Any) -> None:
    content["mp_world_size"] = 2


SPOILED: list[tuple[str, Callable[[Path], None], str]] = [
    ("truncated", truncated, "damaged, or no file of torch.save"),
    ("emptied", emptied, "damaged, or no file of torch.save"),
    ("missing rank", missing_rank, "rank 0's *_optim_states.pt is missing"),
    ("missing last rank", missing_last_rank, "was saved by 3 rank(s), and has optimizer states of 2"),
    ("missing models", missing_models, "is incomplete"),
    ("missing optimizers", missing_optimizers, "has no *_optim_states.pt"),
    ("odd latest", odd_latest, "which is no directory beside it"),
    ("longer", rewritten("*rank_1_*optim*", longer), "elements are expected"),
    ("shorter moment", rewritten("*rank_0_*optim*", shorter_moment), "elements are expected"),
    ("on a drive", rewritten("*rank_0_*optim*", on_a_drive), "no optimizer states"),
    ("other weights", rewritten("mp_rank*", other_weights), "of two runs"),
    ("renamed", rewritten("mp_rank*", renamed), "of two runs"),
    ("another time", rewritten("*rank_1_*optim*", another_time), "rank 1 has taken [3.0, 8.0] steps"),
    ("tensor parallel", rewritten("mp_rank*", tensor_parallel), "split over ranks"),
    ("not one", lambda tag: [p.unlink() for p in (*tag.iterdir(), tag.parent / "latest")], "is neither"),
]


def refused(source: Path, out: Path, **given: Any) -> str:
    """The sentence of the refusal; nothing may be left."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(source, out, **given)
    assert sorted(out.parent.iterdir()) == before
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("name", "spoil", "words"), SPOILED, ids=[name for name, _, _ in SPOILED])
def test_what_is_spoiled_is_one_sentence_and_no_output(tmp_path, name, spoil, words):
    saved(tmp_path / "run", Layout(stage=2, world=3))
    spoil(tmp_path / "run" / f"global_step{STEPS}")
    assert words in refused(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("cut", range(0, 2000, 97))
def test_a_file_that_ends_anywhere_is_refused(tmp_path, cut):
    """Also where pickles are cut within: no error of another kind comes out."""
    saved(tmp_path / "run", Layout(stage=3, world=2))
    path = next((tmp_path / "run" / f"global_step{STEPS}").glob("*rank_1_*model_states.pt"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * cut // 2000])
    refused(tmp_path / "run", tmp_path / "out")


def test_a_file_that_would_run_code_is_refused_by_its_name(tmp_path):
    saved(tmp_path / "run", Layout(client_state={}))
    path = tmp_path / "run" / f"global_step{STEPS}" / "mp_rank_00_model_states.pt"
    rewritten(path.name, lambda content: content.update(extra=Runs(tmp_path / "ran")))(path.parent)
    assert "would execute posix.mkdir" in refused(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_directory_that_is_there_stays(tmp_path):
    saved(tmp_path / "run", Layout())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "is there already" in refused(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_what_lies_where_an_import_is_put_together_stays(tmp_path):
    saved(tmp_path / "run", Layout())
    (tmp_path / ".staging-out").mkdir()
    (tmp_path / ".staging-out" / "mine").write_text("x")
    assert "Move it away" in refused(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / ".staging-out" / "mine").read_text() == "x"


def test_a_disk_without_room_leaves_nothing(tmp_path, monkeypatch):
    from shardwise.files import disk

    saved(tmp_path / "run", Layout())
    writes = []

    def full(operation: str, path: Path) -> None:
        writes.append(path)
        if len(writes) == 12:
            raise OSError(28, "No space left on device")

    with disk.watched(full):
        assert "No space left" in refused(tmp_path / "run", tmp_path / "out")


def test_a_partition_is_mapped_and_never_read_whole(tmp_path):
    """What is in memory is what is being written: the pieces are views of the disk."""
    saved(tmp_path / "run", Layout(stage=2, world=2))
    run = read_deepspeed(tmp_path / "run" / f"global_step{STEPS}")
    largest = max(piece.spec.nbytes for pieces in run.pieces for piece in pieces)
    assert largest == 11 * 5 * 4
    for piece in (piece for pieces in run.pieces for piece in pieces if "/trained/" in piece.address):
        values = piece.source.read()
        assert values.untyped_storage().nbytes() > values.nbytes


# accelerate.


def plain_state(folder: Path, *, safe: bool, ranks: int = 1) -> tuple[Net, torch.optim.AdamW, Any]:
    """accelerate's own writer, as `save_state` calls it on each rank."""
    from accelerate import PartialState
    from accelerate.checkpointing import save_accelerator_state

    PartialState(cpu=True)
    model, optimizer, scheduler = trained_run()
    folder.mkdir(exist_ok=True)
    try:
        for rank in range(ranks):
            torch.manual_seed(rank)
            weights = model.state_dict()
            if safe:
                weights.pop("head.weight")
            save_accelerator_state(
                str(folder), [weights], [optimizer], [scheduler], [], rank, STEPS, safe_serialization=safe
            )
    finally:
        PartialState._reset_state()
    return model, optimizer, scheduler


def names_of(model: Net, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {p: n for n, p in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("safe", [False, True])
def test_a_plain_state_of_accelerate_arrives(tmp_path, safe):
    model, optimizer, scheduler = plain_state(tmp_path / "state", safe=safe, ranks=2)
    generators = random.getstate(), numpy.random.get_state()
    done = import_checkpoint(tmp_path / "state", tmp_path / "out", names=names_of(model, optimizer))
    assert (done.step, done.world_size) == (STEPS, 2)
    checkpoint = Checkpoint(tmp_path / "out")
    for name, weight in model.named_parameters():
        kind = "trained" if weight.requires_grad else "frozen"
        assert torch.equal(checkpoint.read_whole(f"model0/{kind}/{name}"), weight), name
        if weight.requires_grad:
            moment = checkpoint.read_whole(f"optimizer0/exp_avg/model0/{name}")
            assert torch.equal(moment, optimizer.state[weight]["exp_avg"])
    first, second = checkpoint.state(0), checkpoint.state(1)
    assert first["schedulers"] == [scheduler.state_dict()]
    assert first["counters"] == {"step": STEPS}
    assert first["generators"]["python"] == generators[0]
    assert (first["generators"]["numpy"][1] == generators[1][1]).all()
    assert torch.equal(second["generators"]["torch"], torch.Generator().manual_seed(1).get_state())


def test_names_come_from_the_order_of_a_pickled_model(tmp_path):
    model, optimizer, _ = plain_state(tmp_path / "state", safe=False)
    assert command(["import", str(tmp_path / "state"), str(tmp_path / "out")]) == 0
    checkpoint = Checkpoint(tmp_path / "out")
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            moment = checkpoint.read_whole(f"optimizer0/exp_avg_sq/model0/{name}")
            assert torch.equal(moment, optimizer.state[weight]["exp_avg_sq"])


def test_a_sorted_file_of_weights_needs_names(tmp_path):
    model, optimizer, _ = plain_state(tmp_path / "state", safe=True)
    assert "does not keep the model's order" in refused(tmp_path / "state", tmp_path / "out")
    names = tmp_path / "names"
    names.write_text("\n".join(names_of(model, optimizer)))
    assert command(["import", str(tmp_path / "state"), str(tmp_path / "out"), "--names", str(names)]) == 0
    assert Checkpoint(tmp_path / "out").manifest.step == STEPS


def test_registered_objects_and_schedules_are_carried_unless_they_run_code(tmp_path):
    model, optimizer, _ = plain_state(tmp_path / "state", safe=False)
    torch.save({"value": torch.ones(3), "count": 4}, tmp_path / "state" / "custom_checkpoint_0.pkl")
    names = names_of(model, optimizer)
    import_checkpoint(tmp_path / "state", tmp_path / "one", names=names)
    (found,) = Checkpoint(tmp_path / "one").state(0)["objects"]
    assert found["count"] == 4
    assert found["value"].tolist() == [1, 1, 1]
    with open(tmp_path / "state" / "custom_checkpoint_0.pkl", "wb") as file:
        pickle.dump(Runs(tmp_path / "ran"), file)
    done = import_checkpoint(tmp_path / "state", tmp_path / "two", names=names)
    assert any("Registered objects are not carried over" in note for note in done.notes)
    assert not (tmp_path / "ran").exists()


WEIGHTS = {"embed": (61, 8), "q": (8, 8), "k": (8, 8), "norm": (8,), "head": (8, 61)}


def test_states_are_given_to_weights_by_order_or_refused():
    assert match_shapes([[(61, 8), (8, 8), (8, 8)], [(8,)]], WEIGHTS, in_order=True) == [["embed", "q", "k"], ["norm"]]
    assert match_shapes([[(61, 8), (8,)]], WEIGHTS, in_order=False) == [["embed", "norm"]]
    for groups, in_order, words in (
        ([[(61, 8), (8, 8)]], True, "fits q as well as k"),
        ([[(8, 8)], [(8, 8)]], True, "as well as"),
        ([[(8, 61), (61, 8)]], True, "do not follow the order"),
        ([[None, (8,)]], True, "fits embed as well as k"),
        ([[(8, 8)]], False, "does not keep the model's order"),
        ([[(61, 8)], [(61, 8)]], False, "two of the optimizer's states fit embed"),
        ([[(3, 3)]], False, "no weight of the shape (3, 3)"),
    ):
        with pytest.raises(CheckpointError, match=words.replace("(", r"\(").replace(")", r"\)")):
            match_shapes(groups, WEIGHTS, in_order=in_order)


def test_names_that_do_not_fit_are_refused():
    assert match_named([[(8, 8), None]], WEIGHTS, ["k", "norm"]) == [["k", "norm"]]
    for names, words in (
        (["k"], "1 name"),
        (["k", "k"], "1 of them"),
        (["norm", "k"], "another order"),
        (["k", "x"], "no weight x"),
    ):
        with pytest.raises(CheckpointError, match=words):
            match_named([[(8, 8), None]], WEIGHTS, names)
