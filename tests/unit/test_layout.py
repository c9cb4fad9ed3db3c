"""A layout against a map of single elements, which is built by appending and knows no arithmetic."""

from __future__ import annotations

import random
from itertools import groupby

import pytest

from shardwise.errors import LayoutError
from shardwise.plan.layout import Layout, Piece, Region

Element = tuple[int, int] | None  # which tensor, and its how many-eth element; None in padding


def drawn(seed: int) -> tuple[list[int], int, int]:
    """(sizes, world size, alignment)"""
    source = random.Random(seed)
    sizes = [source.choice([1, 2, 3, 7, 8, 9, 31, 64, 100]) for _ in range(source.randrange(1, 7))]
    return sizes, source.choice([1, 2, 3, 4, 7]), source.choice([1, 2, 4, 8, 32])


def packed(sizes: list[int], world_size: int, alignment: int) -> Layout:
    return Layout.pack([(f"t{i}", (size,), size) for i, size in enumerate(sizes)], world_size, alignment)


def elements_of(sizes: list[int], world_size: int, alignment: int) -> list[Element]:
    """What lies at each place of the buffer."""
    elements: list[Element] = []
    for tensor, size in enumerate(sizes):
        while len(elements) % alignment:
            elements.append(None)
        elements += [(tensor, element) for element in range(size)]
    while len(elements) % world_size or len(elements) // world_size % alignment:
        elements.append(None)
    return elements


def placed(pieces: tuple[Piece, ...], numel: int) -> list[Element]:
    """What pieces put at each place of `numel` ones; no place twice."""
    found: list[Element] = [None] * numel
    for piece in pieces:
        for i in range(piece.numel):
            assert found[piece.in_shard + i] is None
            found[piece.in_shard + i] = (piece.slot, piece.in_slot + i)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_element_lies_where_appending_puts_it_and_belongs_to_one_rank(seed: int) -> None:
    sizes, world_size, alignment = drawn(seed)
    layout, elements = packed(sizes, world_size, alignment), elements_of(sizes, world_size, alignment)
    assert layout.numel == len(elements)
    assert layout.shard_numel * world_size == layout.numel
    assert layout.shard_numel % alignment == 0
    for index, slot in enumerate(layout.slots):
        assert (slot.name, slot.shape, slot.numel) == (f"t{index}", (sizes[index],), sizes[index])
        assert slot.offset == elements.index((index, 0))
        assert slot.offset % alignment == 0
    shards = [placed(layout.pieces(rank), layout.shard_numel) for rank in range(world_size)]
    assert [element for shard in shards for element in shard] == elements


@pytest.mark.parametrize("seed", range(60))
def test_a_piece_is_as_long_as_its_tensor_is_in_one_interval(seed: int) -> None:
    """No two pieces of a rank are of one tensor, and they come in the tensors' order."""
    sizes, world_size, alignment = drawn(seed)
    layout, elements = packed(sizes, world_size, alignment), elements_of(sizes, world_size, alignment)
    for rank in range(world_size):
        mine = elements[rank * layout.shard_numel : (rank + 1) * layout.shard_numel]
        runs = [tensor for tensor, _ in groupby(element[0] for element in mine if element is not None)]
        assert [piece.slot for piece in layout.pieces(rank)] == runs


@pytest.mark.parametrize("seed", range(60))
def test_regions_of_all_ranks_are_the_buffer_and_a_whole_one_is_all_of_it(seed: int) -> None:
    sizes, world_size, alignment = drawn(seed)
    layout, elements = packed(sizes, world_size, alignment), elements_of(sizes, world_size, alignment)
    for rank in range(world_size):
        region = Region(layout, rank)
        assert region.numel == layout.shard_numel
        assert placed(region.pieces, region.numel) == elements[region.interval]
    whole = Region(layout, None)
    assert (whole.numel, whole.interval) == (layout.numel, slice(0, layout.numel))
    assert placed(whole.pieces, whole.numel) == elements
    assert len(whole.pieces) == len(sizes), "a tensor is in one piece"


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("parts", [2, 3])
def test_a_shard_is_the_parts_of_those_that_hold_it(seed: int, parts: int) -> None:
    sizes, world_size, alignment = drawn(seed)
    tensors = [(f"t{i}", (size,), size) for i, size in enumerate(sizes)]
    layout = Layout.pack(tensors, world_size, alignment, parts)
    assert layout.slots == packed(sizes, world_size, alignment).slots
    whole = placed(Region(layout, None).pieces, layout.numel)
    for rank in range(world_size):
        shard = placed(layout.pieces(rank), layout.shard_numel)
        for part in range(parts):
            region = Region(layout, rank * parts + part, parts)
            assert region.numel % alignment == 0
            assert placed(region.pieces, region.numel) == shard[region.in_shard] == whole[region.interval]


def test_the_drawing_at_the_top_of_the_file_is_what_pack_does() -> None:
    layout = packed([3, 6, 2], 2, 4)
    assert [slot.offset for slot in layout.slots] == [0, 4, 12]
    assert layout.numel == 16
    assert layout.pieces(0) == (Piece(0, 0, 0, 3), Piece(1, 0, 4, 4))
    assert layout.pieces(1) == (Piece(1, 4, 0, 2), Piece(2, 0, 4, 2))


def test_a_rank_may_hold_nothing_but_padding() -> None:
    layout = packed([3], 4, 8)
    assert [len(layout.pieces(rank)) for rank in range(4)] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ([("a", (2,), 2), ("blocks.0.empty", (0, 3), 0)], "blocks.0.empty has no elements"),
        ([], "at least one tensor"),
    ],
)
def test_what_cannot_be_placed_is_a_layout_error_that_names_it(
    tensors: list[tuple[str, tuple[int, ...], int]], told: str
) -> None:
    with pytest.raises(LayoutError, match=told):
        Layout.pack(tensors, 2, 4)
