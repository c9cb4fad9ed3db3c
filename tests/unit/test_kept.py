"""What an optimizer keeps that is made of tensors goes through a checkpoint's plain data and comes back the same."""

from __future__ import annotations

from collections import OrderedDict, deque

import pytest
import torch
from torch import nn

from rig.optimizers import Halves, Shadow
from shardwise.checkpoint.codec import decode, encode
from shardwise.errors import CheckpointError
from shardwise.step.kept import cannot_keep, mapped, packages_of, packed, pieces, unpacked

MINE = {"rig"}


def kept():
    shadow = Shadow(torch.arange(6.0).view(2, 3))
    shadow.inner = {"kept": [torch.ones(2)], 3: (1, None, "text")}
    return [deque([torch.zeros(2), 5], maxlen=3), shadow, Halves(torch.ones(3), torch.zeros(3)), OrderedDict(a=1)]


def saved_and_read(value):
    tensors = {}
    found = encode(packed(value), tensors, "state")
    return unpacked(decode(found, tensors.__getitem__), MINE)


def test_all_of_it_comes_back():
    before = kept()
    after = saved_and_read(before)
    assert [type(item) for item in after] == [type(item) for item in before]
    assert after[0].maxlen == 3
    assert after[1].dtype is torch.float32
    one, other = dict(pieces(before, "")), dict(pieces(after, ""))
    assert one.keys() == other.keys()
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(other[k]))
        for k, v in one.items()
        if not isinstance(v, str | None)
    )
    assert after[1].rows.stride() == before[1].rows.stride() != (2, 1)


def test_a_copy_shares_no_tensor():
    before = kept()
    copied = mapped(before, torch.clone)
    for (_, one), (_, other) in zip(pieces(before, ""), pieces(copied, ""), strict=True):
        assert not isinstance(one, torch.Tensor) or one.data_ptr() != other.data_ptr()
    copied[1].inner["kept"].clear()
    assert len(before[1].inner["kept"]) == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [([iter([])], "list_iterator"), ({"a": nn.Linear(1, 1)}, "Linear"), ((lambda: 1,), "function"), (kept(), None)],
)
def test_what_cannot_be_kept_is_found(value, name):
    assert cannot_keep(value, MINE) == name


def test_objects_of_other_packages_are_neither_kept_nor_made():
    assert cannot_keep(Shadow(torch.ones(2)), {"elsewhere"}) == "Shadow"
    with pytest.raises(CheckpointError, match="no such class"):
        unpacked({"kept": "object", "class": "rig.optimizers:Shadow", "fields": {}}, {"elsewhere"})
    for path in ("rig.optimizers:Lamb", "rig.optimizers:moment", "rig.nowhere:Shadow", "rig.optimizers:torch.Tensor"):
        with pytest.raises(CheckpointError, match="no such class"):
            unpacked({"kept": "object", "class": path, "fields": {}}, MINE)


def test_torchs_own_packages_are_no_optimizers():
    assert packages_of(torch.optim.SGD([nn.Parameter(torch.ones(1))])) == set()


def test_the_name_of_a_dtype_names_nothing_else_of_torch():
    assert unpacked({"kept": "dtype", "name": "bfloat16"}, MINE) is torch.bfloat16
    for name in ("load", "no_such", None):
        with pytest.raises(CheckpointError, match="no dtype of torch"):
            unpacked({"kept": "dtype", "name": name}, MINE)
