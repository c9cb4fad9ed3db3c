"""A batch size that fits: what counts as out of memory, and which sizes are tried."""

import pytest
import torch

from shardwise import find_executable_batch_size, release_memory
from shardwise.errors import ConfigError
from shardwise.run.joined import forget_run
from shardwise.run.memory_fit import should_reduce_batch_size


@pytest.fixture(autouse=True)
def _own_run():
    forget_run()
    yield
    forget_run()


def caused(outer, inner):
    outer.__cause__ = inner
    return outer


def in_a_circle():
    error = ValueError("a")
    return caused(error, caused(ValueError("b"), error))


def of_the_allocator():
    try:
        torch.empty(10**16)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("any"), True),
        (MemoryError(), True),
        (of_the_allocator(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("HIP out of memory."), True),
        (RuntimeError("XPU out of memory."), True),
        (RuntimeError("NPU out of memory. Tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (caused(ValueError("a step failed"), MemoryError()), True),
        (caused(RuntimeError("a"), caused(KeyError("b"), RuntimeError("CUDA out of memory."))), True),
        (in_a_circle(), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
        (caused(ValueError("a"), KeyError("b")), False),
    ],
    ids=repr,
)
def test_what_counts_as_out_of_memory(error, wanted):
    assert should_reduce_batch_size(error) is wanted


def tried(starting, fits, **keywords):
    sizes = []

    @find_executable_batch_size(starting_batch_size=starting, **keywords)
    def run(batch_size, *args):
        sizes.append(batch_size)
        if not fits(batch_size):
            raise RuntimeError("CUDA out of memory.")
        return (batch_size, *args)

    return run, sizes


def test_each_size_is_nine_tenths_of_the_last():
    run, sizes = tried(128, lambda size: size == 8)
    assert run("more") == (8, "more")
    assert sizes == [128, 115, 103, 92, 82, 73, 65, 58, 52, 46, 41, 36, 32, 28, 25, 22, 19, 17, 15, 13, 11, 9, 8]
    assert run() == (8,)  # a later call begins there


def test_the_next_size_is_given_by_a_function_with_or_without_the_last():
    left = iter([5, 3, 1])
    run, sizes = tried(8, lambda size: size < 4, reduce_batch_size_fn=lambda: next(left))
    assert run() == (3,)
    assert sizes == [8, 5, 3]
    run, sizes = tried(8, lambda size: size < 4, reduce_batch_size_fn=lambda size: size // 2)
    assert run() == (2,)
    assert sizes == [8, 4, 2]
    run, sizes = tried(8, lambda size: size < 4, reduce_batch_size_fn=lambda size=3: size)
    assert run() == (3,)


@pytest.mark.parametrize("starting", [0, 16])
def test_no_size_that_fits_is_an_error(starting):
    run, _ = tried(starting, lambda size: False)
    with pytest.raises(RuntimeError, match="No executable batch size found, reached zero"):
        run()


def test_other_errors_pass():
    @find_executable_batch_size(starting_batch_size=4)
    def run(batch_size):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run()


def test_a_batch_size_that_is_given_twice_is_a_type_error():
    @find_executable_batch_size(starting_batch_size=4)
    def run(batch_size, first, second):
        return batch_size

    with pytest.raises(TypeError, match=r"Batch size was passed into `run`.*run\(first='a', second='b'\)"):
        run(128, "a", "b")
    with pytest.raises(ConfigError, match="first parameter"):
        find_executable_batch_size(lambda: None)


def test_released_arguments_are_none():
    assert release_memory(torch.zeros(1), [1]) == [None, None]
