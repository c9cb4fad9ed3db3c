"""A model's buffers, of any dtype and layout, are rank 0's on every rank, and come back from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise import Accelerator, DeepSpeedPlugin, gathered
from shardwise.errors import CheckpointError, PrepareError, RankError
from shardwise.run.process import forget_run


def _numbers(rank: int, *shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape) + 10 * rank


def _sparse(layout: torch.layout, rank: int, **more: Any) -> Tensor:
    """Rank 1 has more entries than rank 0."""
    return (_numbers(rank, 4, 4).float() * (torch.eye(4) if rank == 0 else torch.ones(4, 4))).to_sparse(
        layout=layout, **more
    )


DTYPES = [
    *(torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


def _once_on(which: int, rank: int) -> Tensor:
    """Rows that repeat, as one row of memory on rank `which` and as four on the others."""
    row = _numbers(rank, 1, 3).float().expand(4, 3)
    return row if rank == which else row.clone()


# What rank `rank` builds, by what is special about it.
KINDS: dict[str, Callable[[int], Tensor]] = {
    **{str(dtype): lambda rank, dtype=dtype: _numbers(rank, 2, 3).to(dtype) for dtype in DTYPES},  # type: ignore[misc]
    "one number": lambda rank: torch.tensor(1.5 + rank),
    "one number of 8 bits": lambda rank: torch.tensor(1.5 + rank).to(torch.float8_e5m2),
    "empty": lambda rank: torch.empty(0, 3),
    "expanded": lambda rank: _numbers(rank, 1, 3).float().expand(4, 3),
    "expanded, only on rank 1": lambda rank: _once_on(1, rank),
    "expanded, only on rank 0": lambda rank: _once_on(0, rank),
    "transposed": lambda rank: _numbers(rank, 3, 5).t(),
    "every other": lambda rank: _numbers(rank, 6, 2)[::2],
    "channels last": lambda rank: _numbers(rank, 2, 3, 4, 4).float().to(memory_format=torch.channels_last),
    "conjugated": lambda rank: (_numbers(rank, 3) * (1 + 2j)).to(torch.complex64).conj(),
    "COO": lambda rank: _sparse(torch.sparse_coo, rank),
    "COO, not coalesced": lambda rank: torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2], [1, 1, 0]]), _numbers(rank, 3).to(torch.int16), (3, 3), check_invariants=False
    ),
    "COO of rows": lambda rank: _numbers(rank, 4, 3).float().to_sparse(1),
    "COO, empty": lambda rank: torch.zeros(3, 3).to_sparse(),
    "CSR": lambda rank: _sparse(torch.sparse_csr, rank),
    "CSC": lambda rank: _sparse(torch.sparse_csc, rank),
    "BSR": lambda rank: _sparse(torch.sparse_bsr, rank, blocksize=(2, 2)),
    "BSC": lambda rank: _sparse(torch.sparse_bsc, rank, blocksize=(2, 2)),
}
NAMES = {kind: f"buffer{number}" for number, kind in enumerate(KINDS)}
STATISTICS = NAMES["torch.int32"]  # each rank has its own, after prepare


class Net(nn.Module):
    """A linear and the buffers that rank `rank` builds, one of which two modules have."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, 3)
        for kind, name in NAMES.items():
            self.register_buffer(name, KINDS[kind](rank))
        self.other = nn.Module()
        self.other.register_buffer("same", self.buffer0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def _bytes(value: Tensor) -> Tensor:
    value = value.cpu()
    dense = value.detach() if value.layout == torch.strided else value.detach().to_dense()
    return dense.resolve_conj().contiguous().reshape(-1).view(torch.uint8)


def _unlike_rank_0(found: Any) -> list[str]:
    """The kinds that are not what rank 0 builds. found: buffers by name."""
    differing = []
    for kind, name in NAMES.items():
        have, want = found[name], KINDS[kind](0)
        same = have.shape == want.shape and have.dtype == want.dtype and have.layout == want.layout
        if not same or not torch.equal(_bytes(have), _bytes(want)):
            differing.append(kind)
    return differing


USE_CPU = True  # tests/gpu runs the same on CUDA devices


def _accelerator(stage: int) -> Accelerator:
    forget_run()
    return Accelerator(cpu=USE_CPU, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))


def _strides(model: nn.Module) -> dict[str, Any]:
    return {name: buffer.stride() for name, buffer in model.named_buffers() if buffer.layout == torch.strided}


def prepared_saved_loaded(ranks: Any, stage: int, folder: str, anew: bool) -> Any:
    """What is not rank 0's after prepare and after a load, by kind; and whether what is exported is."""
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
    accelerator = _accelerator(stage)
    model = Net(ranks.rank)
    accelerator.prepare(model)
    sent = _unlike_rank_0(model._buffers)
    assert model.other.same is model.buffer0
    # A copy to another device has no gaps.
    assert _strides(model) == _strides(Net(0)) or not USE_CPU
    exported = accelerator.get_state_dict(model)
    exported_well = not exported or _unlike_rank_0(exported) == []
    with torch.no_grad():
        model._buffers[STATISTICS].add_(100 * ranks.rank)
    accelerator.save_state(folder)
    if anew:
        accelerator, model = _accelerator(stage), Net(7)
        accelerator.prepare(model)
    accelerator.load_state(folder)
    assert model.other.same is model.buffer0
    with torch.no_grad():
        model._buffers[STATISTICS].sub_(100 * ranks.rank)
    return sent, exported_well, _unlike_rank_0(model._buffers)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(("stage", "n"), [(0, 1), (3, 2), (1, 3)])
def test_buffers_of_every_kind_are_sent_saved_and_loaded(world, tmp_path, stage, n, anew):
    for found in world(n).run(prepared_saved_loaded, stage, str(tmp_path / "state"), anew):
        assert found == ([], True, [])


def _with(buffer: Tensor) -> nn.Module:
    model = nn.Linear(3, 3)
    model.register_buffer("odd", buffer)
    return model


def _refused(ranks: Any, make: Callable[[int], Tensor]) -> str:
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype")
    with pytest.raises((PrepareError, RankError)) as caught:
        _accelerator(0).prepare(_with(make(ranks.rank)))
    return str(caught.value)


def _longer(rank: int) -> Tensor:
    return torch.zeros(3 + rank)


def _wider(rank: int) -> Tensor:
    return torch.zeros(3, dtype=(torch.float32, torch.float64)[rank])


def _nested(rank: int) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    ("make", "words"),
    [(_longer, "(4,)"), (_wider, "float64"), (_nested, "the buffer odd cannot be sent to the other ranks")],
)
def test_buffers_that_cannot_be_one_on_all_ranks_are_refused_on_each(world, make, words):
    for text in world(2).run(_refused, make):
        assert words in text


def _unsaved(ranks: Any, folder: str) -> str:
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype")
    accelerator = _accelerator(0)
    accelerator.prepare(_with(_nested(0)))
    with pytest.raises(CheckpointError) as caught:
        accelerator.save_state(folder)
    return str(caught.value)


def test_a_buffer_that_no_checkpoint_can_hold_is_named_before_anything_is_written(world, tmp_path):
    (text,) = world(1).run(_unsaved, str(tmp_path / "state"))
    assert "model0/buffer/odd" in text
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def _other_shape(ranks: Any, folder: str) -> str:
    accelerator = _accelerator(0)
    accelerator.prepare(_with(torch.zeros(1)))
    accelerator.save_state(folder)
    accelerator = _accelerator(0)
    model = accelerator.prepare(_with(torch.full((3,), 5.0)))
    with pytest.raises(CheckpointError) as caught:
        accelerator.load_state(folder)
    assert model.odd.tolist() == [5.0, 5.0, 5.0]
    return str(caught.value)


def test_a_buffer_of_another_shape_is_not_spread_out(world, tmp_path):
    for text in world(2).run(_other_shape, str(tmp_path / "state")):
        assert "model0/buffer/odd has shape (1,), but this model's is (3,)" in text


class Coded(nn.Module):
    """Frozen parameters of odd dtypes beside large ones, which have no memory until `prepare`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(80, 80).requires_grad_(False)
        self.head = nn.Linear(80, 3)
        self.codes = nn.Parameter(_numbers(rank, 3, 5).to(torch.int16), requires_grad=False)
        self.scales = nn.Parameter(_numbers(rank, 3, 5).to(torch.float8_e5m2), requires_grad=False)
        self.marks = nn.Parameter(_numbers(rank, 7) % 2 == 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x))


def _coded(ranks: Any) -> None:
    accelerator = _accelerator(3)
    with accelerator.init():
        model = Coded(ranks.rank)
    assert model.linear.weight.is_meta
    accelerator.prepare(model)
    expected = Coded(0)
    with gathered(model):
        for (name, found), value in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(_bytes(found), _bytes(value)), name


def test_frozen_weights_of_every_dtype_are_rank_0s_beside_those_without_memory(world):
    world(2).run(_coded)
