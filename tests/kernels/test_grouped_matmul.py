import pytest
import torch

from ironmoe.kernels import Routing, expert_mlp, grouped_matmul


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0], [5, 0, 0], [1, 1, 1], [700, 0, 3]])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_loop_and_unassigned_rows_are_zero(counts, bias):
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    x = torch.randn(sum(counts) + 2, 4, dtype=torch.float64)
    weight, b = (
        torch.randn(3, 5, 4, dtype=torch.float64),
        torch.randn(3, 5, dtype=torch.float64) if bias else None,
    )
    y = grouped_matmul(x, weight, offsets, bias=b)
    for e in range(3):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        torch.testing.assert_close(y[rows], x[rows] @ weight[e].t() + (b[e] if bias else 0))
    assert (y[-2:] == 0).all()


def test_gradients_of_both_orders():
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return grouped_matmul(x, weight, offsets, bias=bias)

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_rounded_once(dtype, rounding):
    """Half a unit of its own dtype, and what float32 loses in a sum of 64 terms."""
    x, weight = torch.randn(6, 64, dtype=dtype), torch.randn(1, 8, 64, dtype=dtype)
    y = grouped_matmul(x, weight, torch.tensor([0, 6])).double()
    exact, magnitudes = (
        x.double() @ weight[0].double().t(),
        x.double().abs() @ weight[0].double().abs().t(),
    )
    atol = rounding(64, magnitudes.max().item(), torch.float32)
    torch.testing.assert_close(y, exact, rtol=torch.finfo(dtype).eps / 2, atol=atol)


def test_large_float32_products_equal_float64():
    x, weight = torch.randn(1000, 256), torch.randn(1, 512, 256)
    y = grouped_matmul(x, weight, torch.tensor([0, 1000]))
    torch.testing.assert_close(
        y.double(), x.double() @ weight[0].double().t(), rtol=1e-5, atol=1e-4
    )


def test_flops_are_counted_on_every_route():
    from torch.utils.flop_counter import FlopCounterMode

    for rows in (10, 1000):  # the second is large enough for oneDNN in the first layer
        x, w_in, w_out = torch.randn(rows, 256), torch.randn(1, 512, 256), torch.randn(1, 256, 512)
        routing = Routing(torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int32))
        with FlopCounterMode(display=False) as counter:
            expert_mlp(x, w_in, w_out, routing)
        assert counter.get_total_flops() == 2 * (2 * rows * 256 * 512)


def test_bad_input_is_named():
    x, weight = torch.zeros(4, 3), torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="offsets must have shape"):
        grouped_matmul(x, weight, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="weight must have shape"):
        grouped_matmul(x, torch.zeros(2, 5, 4), torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match="bias must have shape"):
        grouped_matmul(x, weight, torch.tensor([0, 2, 4]), bias=torch.zeros(2, 3))
