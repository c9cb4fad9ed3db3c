"""What the ranks say together: order, shares, nested collectives, and nobody left waiting."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping

import pytest
import torch

from shardwise import PartialState, gather, pad_across_processes, reduce, send_to_device, set_seed
from shardwise.errors import ConfigError, DataError
from shardwise.ranks import batches
from shardwise.run.process import broadcast, broadcast_object_list, forget_run, gather_object, synchronize_rng_states

Point = namedtuple("Point", "x y")


def fresh():
    forget_run()
    return PartialState(cpu=True)


def _gathers(ranks):
    fresh()
    r, n = ranks.rank, ranks.world_size
    whole = gather(
        {
            "a": torch.tensor([r, r]),
            "b": [torch.tensor(float(r)), (torch.tensor([[r > 0]]),)],
            "c": Point(torch.zeros(0, 3), torch.full((1, 2), r, dtype=torch.bfloat16)),
        }
    )
    assert whole["a"].tolist() == [i for i in range(n) for _ in range(2)]
    assert whole["b"][0].tolist() == list(range(n))
    assert whole["b"][1][0].tolist() == [[i > 0] for i in range(n)]
    assert isinstance(whole["c"], Point)
    assert whole["c"].x.shape == (0, 3)
    assert whole["c"].y.dtype == torch.bfloat16
    assert gather_object([r, "x"]) == [e for i in range(n) for e in (i, "x")]
    assert gather_object({"r": r}) == [{"r": i} for i in range(n)]
    assert reduce(torch.tensor([1, r]), "sum").tolist() == [n, sum(range(n))]
    assert reduce({"m": torch.tensor(r)}, "mean")["m"].item() == pytest.approx((n - 1) / 2)
    assert reduce(torch.ones(2), "sum", scale=0.5).tolist() == [n / 2] * 2
    point = Point(torch.tensor(0.5 + r), torch.full((2,), r, dtype=torch.bfloat16))
    odd = {"a": torch.tensor([r, -r]), "b": [torch.tensor(r == 1), point]}
    most, least = reduce(odd, "max"), reduce(odd, reduction="min")
    assert most["a"].tolist() == [n - 1, 0]
    assert least["a"].tolist() == [0, 1 - n]
    assert most["a"].dtype == torch.int64
    assert (most["b"][0].item(), least["b"][0].item()) == (n > 1, False)
    assert most["b"][0].dtype == torch.bool
    assert (most["b"][1].x.item(), least["b"][1].x.item()) == (n - 0.5, 0.5)
    assert most["b"][1].y.tolist() == [n - 1] * 2
    assert isinstance(most["b"][1], Point)
    assert reduce(torch.tensor(r), "max", scale=2).item() == 2 * (n - 1)
    with pytest.raises(DataError, match="complex numbers have no max"):
        reduce(torch.tensor([r * 1j]), "max")
    with pytest.raises(DataError, match="'sum', 'mean', 'max' or 'min'"):
        reduce(torch.zeros(1), "product")
    mine = torch.tensor([r])
    assert broadcast([mine], from_process=n - 1)[0].item() == n - 1
    assert mine.item() == r
    names = [r, f"n{r}"]
    assert broadcast_object_list(names, from_process=n - 1) is names
    assert names == [n - 1, f"n{n - 1}"]
    padded = pad_across_processes({"t": torch.ones(2, 1 + r)}, dim=1, pad_index=7)["t"]
    assert padded.shape == (2, n)
    assert (padded[:, 1 + r :] == 7).all()
    front = pad_across_processes(torch.ones(1 + r), pad_index=-1, pad_first=True)
    assert front.tolist() == [-1.0] * (n - 1 - r) + [1.0] * (1 + r)
    assert pad_across_processes(torch.ones(3), dim=1).shape == (3,)
    ragged = batches.gather_ragged(ranks, torch.arange(r + 1))
    assert [part.tolist() for part in ragged] == [list(range(i + 1)) for i in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nested_tensors_go_around(world, n):
    world(n).run(_gathers)


def _disagree(ranks, what):
    fresh()
    r = ranks.rank
    try:
        if what == "shape":
            gather(torch.zeros(2 + r))
        elif what == "dtype":
            gather(torch.zeros(2, dtype=torch.float64 if r else torch.float32))
        elif what == "count":
            gather([torch.zeros(1)] * (1 + r))
        elif what == "text":
            gather({"a": torch.zeros(1), "b": "x" if r else torch.zeros(1)})
        elif what == "reduce":
            reduce(torch.zeros(1 + r))
        elif what == "dimensions":
            pad_across_processes(torch.zeros((1,) * (1 + r)))
        elif what == "sparse":
            gather(torch.eye(2).to_sparse())
    except Exception as error:
        return type(error), str(error)
    return None, ""


@pytest.mark.parametrize("what", ["shape", "dtype", "count", "text", "reduce", "dimensions", "sparse"])
def test_a_disagreement_is_the_same_error_everywhere(world, what):
    (kind, words), other = world(2).run(_disagree, what)
    assert kind is DataError
    assert (kind, words) == other


def _order(ranks, path, fail):
    state = fresh()
    try:
        with state.main_process_first():
            if state.is_main_process:
                if fail:
                    raise OSError("no space left")
                with open(path, "w") as file:
                    file.write("done")
            with open(path) as file:
                text = file.read()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    with state.local_main_process_first():
        pass
    state.wait_for_everyone()
    return text


def test_the_main_process_goes_first(world, tmp_path):
    assert world(3).run(_order, str(tmp_path / "file"), False) == ["done"] * 3


def test_the_others_learn_that_the_main_process_failed(world, tmp_path):
    first, *others = world(3).run(_order, str(tmp_path / "file"), True)
    assert first == "OSError: no space left"
    assert others == ["RankError: rank 0 failed: OSError: no space left"] * 2


def _only(ranks, capture=None):
    state = fresh()
    r, last = ranks.rank, ranks.world_size - 1

    @state.on_main_process
    def main(x):
        return x

    @state.on_last_process
    def at_last():
        return "last"

    @state.on_process(process_index=1)
    def one():
        return "one"

    @state.on_local_process(local_process_index=0)
    def local():
        return "local"

    assert main(3) == (3 if r == 0 else None)
    assert at_last() == ("last" if r == last else None)
    assert one() == ("one" if r == 1 else None)
    assert local() == ("local" if r == 0 else None)
    assert main.__name__ == "main"
    with pytest.raises(ConfigError, match="process_index"):
        state.on_process(main)


def test_decorated_functions_run_where_they_should(world):
    world(2).run(_only)


def _split(ranks):
    state = fresh()
    r = ranks.rank
    with state.split_between_processes(list(range(5))) as share:
        assert share == [[0, 1, 2], [3, 4]][r]
    with state.split_between_processes(["a"]) as share:
        assert share == [["a"], []][r]
    with state.split_between_processes(["a"], apply_padding=True) as share:
        assert share == ["a"]
    given = {"t": torch.arange(3), "l": (1, 2, 3)}
    with state.split_between_processes(given, apply_padding=True) as share:
        assert share["t"].tolist() == [[0, 1], [2, 2]][r]
        assert share["l"] == [(1, 2), (3, 3)][r]
    assert given["l"] == (1, 2, 3)
    with pytest.raises(DataError, match="differ in length"), state.split_between_processes({"a": [1], "b": []}):
        pass


def test_a_list_is_split_between_processes(world):
    world(2).run(_split)


def _seeds(ranks):
    fresh()
    set_seed(3)
    same = torch.rand(1).item()
    set_seed(3, device_specific=True)
    own = torch.rand(1).item()
    torch.manual_seed(ranks.rank)
    synchronize_rng_states(["torch"])
    return same, own, torch.rand(1).item()


def test_seeds_are_one_or_each_ranks_own(world):
    (a, own_a, synced_a), (b, own_b, synced_b) = world(2).run(_seeds)
    assert a == b == own_a != own_b
    assert synced_a == synced_b


class Frozen(Mapping):
    def __init__(self, items):
        self.inner = dict(items)

    def __getitem__(self, key):
        return self.inner[key]

    def __iter__(self):
        return iter(self.inner)

    def __len__(self):
        return len(self.inner)


def test_containers_keep_their_type_on_the_way_to_a_device():
    from transformers import BatchEncoding
    from transformers.modeling_outputs import CausalLMOutput

    counted = defaultdict(list, a=torch.zeros(1))
    moved = send_to_device(
        [counted, OrderedDict(b=torch.zeros(1)), Frozen({"c": torch.zeros(1)}), Point(torch.zeros(1), "text"), None],
        "meta",
    )
    assert isinstance(moved[0], defaultdict)
    assert moved[0]["a"].is_meta
    assert not counted["a"].is_meta
    assert isinstance(moved[1], OrderedDict)
    assert moved[2]["c"].is_meta
    assert moved[3].x.is_meta
    assert moved[3].y == "text"
    encoding = send_to_device(BatchEncoding({"ids": torch.zeros(1)}), "meta", non_blocking=True)
    assert isinstance(encoding, BatchEncoding)
    assert encoding["ids"].is_meta
    output = send_to_device(CausalLMOutput(logits=torch.zeros(1)), "meta")
    assert isinstance(output, CausalLMOutput)
    assert output.logits.is_meta
    assert dataclasses.is_dataclass(output)
    compiled = torch.compile(send_to_device, backend="eager", fullgraph=True)
    traced = compiled([torch.zeros(1), {"x": (torch.zeros(2), None, "text")}], "cpu", non_blocking=True)
    assert traced[1]["x"][0].tolist() == [0, 0]
    assert traced[1]["x"][1:] == (None, "text")
    assert send_to_device(tensor=torch.zeros(1), device="meta").is_meta
    kept = send_to_device({"x": torch.zeros(1), "deep": [{"keep": torch.zeros(1)}]}, "meta", skip_keys="keep")
    assert kept["x"].is_meta
    assert not kept["deep"][0]["keep"].is_meta
