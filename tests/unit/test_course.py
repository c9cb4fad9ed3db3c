"""The orders of epochs: those of one generator that runs on, wherever a loader begins."""

import pytest
import torch
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from shardwise.data.course import Course, can_run_on

SAMPLERS = {
    "random": lambda: RandomSampler(range(7)),
    "random, one sample": lambda: RandomSampler(range(1)),
    "random, fewer": lambda: RandomSampler(range(7), num_samples=3),
    "random, more": lambda: RandomSampler(range(7), num_samples=17),
    "random, with replacement": lambda: RandomSampler(range(7), replacement=True, num_samples=70),
    "subset": lambda: SubsetRandomSampler([4, 2, 9, 11]),
    "weighted": lambda: WeightedRandomSampler([0.1, 0.4, 0.5], 9),
}


def _orders_of_one_generator(make, seed, epochs):
    sampler = make()
    sampler.generator = torch.Generator().manual_seed(seed)
    return [list(sampler) for _ in range(epochs)]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_orders_are_those_of_one_generator_from_whatever_epoch_they_are_read(kind):
    expected = _orders_of_one_generator(SAMPLERS[kind], 11, 6)
    sampler = SAMPLERS[kind]()
    assert can_run_on([sampler])
    course = Course(11, runs_on=True)
    for epoch in (0, 1, 2, 2, 5, 3, 0, 4):
        course.begin_order([sampler], epoch)
        assert list(sampler) == expected[epoch], epoch


def test_a_broken_off_epoch_does_not_change_the_next():
    expected = _orders_of_one_generator(SAMPLERS["random, with replacement"], 5, 2)
    sampler = SAMPLERS["random, with replacement"]()
    course = Course(5, runs_on=True)
    course.begin_order([sampler], 0)
    assert next(iter(sampler)) == expected[0][0]
    course.begin_order([sampler], 1)
    assert list(sampler) == expected[1]


def test_a_loaded_seed_makes_its_own_orders():
    sampler = SAMPLERS["random"]()
    course = Course(5, runs_on=True)
    course.begin_order([sampler], 3)
    course.seed = 6
    course.begin_order([sampler], 3)
    assert list(sampler) == _orders_of_one_generator(SAMPLERS["random"], 6, 4)[3]


def test_a_sampler_of_the_users_own_class_is_never_read_in_vain():
    class Counting(RandomSampler):
        def __iter__(self):
            raise AssertionError("read")

    assert not can_run_on([Counting(range(3))])
    assert not can_run_on([])


def test_orders_that_were_saved_before_generators_ran_on_go_on_as_they_were():
    sampler = SAMPLERS["random"]()
    Course(5).begin_order([sampler], 3)
    assert list(sampler) == _orders_of_one_generator(SAMPLERS["random"], 8, 1)[0]
