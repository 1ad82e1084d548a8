"""Hadamard matrices against SciPy's, and what makes a random rotation one."""

import pytest
import scipy.linalg
import torch

from planish.errors import PlanishError
from planish.network.hadamard import hadamard, has_hadamard, random_rotation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("k", range(9))
def test_powers_of_two_are_scipys(k):
    assert torch.equal(hadamard(2**k), torch.from_numpy(scipy.linalg.hadamard(2**k, dtype=float)))


@pytest.mark.parametrize("n", [12, 20, 24, 44, 48, 96, 192, 320, 384, 768, 1152, 1280, 1408])
def test_the_widths_of_transformers_have_one(n):
    matrix = hadamard(n)
    assert matrix.shape == (n, n)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


def test_order_twelve_is_doubled_into_192():
    assert torch.equal(hadamard(192), torch.kron(hadamard(16), hadamard(12)))


@pytest.mark.parametrize("n", [0, -4, 3, 5, 6, 7, 10, 28, 36, 100])
def test_sizes_without_a_construction(n):
    assert not has_hadamard(n)
    with pytest.raises(PlanishError, match=f"no Hadamard matrix of size {n} here"):
        hadamard(n)


@pytest.mark.parametrize("n", [1, 2, 16, 25, 28, 36, 192])
def test_rotations_are_orthogonal_and_depend_on_the_seed_only(n):
    matrix = random_rotation(n, generator())
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix, random_rotation(n, generator()))
    if n > 2:
        assert not torch.equal(matrix, random_rotation(n, generator(1)))


def test_one_outlier_is_spread_over_all_coordinates():
    spread = random_rotation(192, generator())[:, 7] * 10
    torch.testing.assert_close(spread.abs(), torch.full((192,), 10 / 192**0.5, dtype=torch.float64))


def test_one_generator_gives_another_matrix_each_time():
    drawn = generator()
    assert not torch.equal(random_rotation(16, drawn), random_rotation(16, drawn))
