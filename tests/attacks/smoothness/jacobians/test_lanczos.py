"""The largest singular value from products alone."""

import pytest
import torch

from ironmoe.attacks.smoothness.jacobians.lanczos import largest_singular_value


def of(matrices, steps=50, tolerance=1e-10):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrices.shape[:2], dtype=torch.float64, generator=generator)
    counts = {"times": 0, "transposed": 0}

    def times(v):
        counts["times"] += 1
        return (matrices @ v[..., None])[..., 0]

    def transposed(u):
        counts["transposed"] += 1
        return (matrices.mT @ u[..., None])[..., 0]

    found = largest_singular_value(
        times, transposed, start, matrices.shape[2], steps=steps, tolerance=tolerance
    )
    return found, counts


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (2, 1, 5), (2, 5, 1), (1, 4, 4)])
def test_it_is_that_of_the_decomposition(shape):
    matrices = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, counts = of(matrices)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(matrices)[:, 0])
    assert counts["times"] <= min(shape[1:]) and counts["transposed"] == counts["times"] + 1


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_of_matrices_of_small_rank(rank):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 7, rank, dtype=torch.float64, generator=generator) for _ in range(2))
    matrices = a @ b.mT
    found, _ = of(matrices)
    torch.testing.assert_close(found.value, torch.linalg.svdvals(matrices)[:, 0])


def test_equal_singular_values_are_found_in_one_step():
    found, counts = of(torch.eye(8, dtype=torch.float64)[None] * 3)
    assert counts["times"] == 1
    torch.testing.assert_close(found.value, torch.tensor([3.0], dtype=torch.float64))


def test_steps_are_few_and_the_residual_says_how_good_they_are():
    """A slow case: singular values that are close together."""
    values = torch.linspace(1, 2, 60, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    frames = (torch.randn(60, 60, dtype=torch.float64, generator=generator) for _ in range(2))
    left, right = (torch.linalg.qr(frame)[0] for frame in frames)
    matrix = (left * values @ right)[None]
    rough, counts = of(matrix, steps=4)
    assert counts["times"] == 4 and 2 - rough.value.item() > 0 and rough.residual.item() > 0.01
    assert (values - rough.value).abs().min() <= rough.residual.item()
    good, counts = of(matrix, tolerance=1e-3)
    assert counts["times"] < 50 and good.residual.item() <= 1e-3 * good.value.item()
    assert 2 - good.value.item() < 1e-4
