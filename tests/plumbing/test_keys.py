"""Keyed random numbers: they depend on the whole key and on nothing else."""

import numpy as np
import pytest
import torch

from plumbing.keys import STEP, numpy_rng, torch_generator


def draw(*key):
    return torch.rand(4, generator=torch_generator(*key)).tolist()


def test_a_draw_depends_on_the_whole_key_and_nothing_else():
    torch.manual_seed(1)
    first = draw(4, 0, 17)
    torch.manual_seed(2)
    assert draw(4, 0, 17) == first
    numbers = range(4)
    keys = np.stack(np.meshgrid(numbers, numbers, numbers), -1).reshape(-1, 3).tolist()
    assert len({tuple(draw(*key)) for key in keys}) == len(keys) == 64


def test_numpys_draws_do_too():
    first = numpy_rng(STEP, 0, 17).random(4).tolist()
    assert numpy_rng(STEP, 0, 17).random(4).tolist() == first
    assert numpy_rng(STEP, 1, 17).random(4).tolist() != first


def test_a_negative_part_is_refused():
    for generator in (numpy_rng, torch_generator):
        with pytest.raises(ValueError):
            generator(STEP, -1)
