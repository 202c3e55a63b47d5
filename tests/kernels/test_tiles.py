"""The routes of a product on the CPU: right at every number of rows, on every processor."""

import pytest
import torch

from ironmoe.kernels import tiles
from ironmoe.kernels.tiles import ONEDNN_MIN_WEIGHT, matmul, rows_compiled

ROWS = (0, 1, 7, 8, 9, 64, 65, 128, 129, 300)


def operands(rows, length, width, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    a, weight = torch.randn(rows, length).to(dtype), torch.randn(width, length).to(dtype)
    return a, weight.t(), torch.randn(width).to(dtype)


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_of_any_number_of_rows_is_that_of_float64(rows, has_bfloat16, monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPLIES_BFLOAT16", has_bfloat16)
    for length, width in ((40, 24), (1024, 1024)):  # the second weight is not converted
        a, b, bias = operands(rows, length, width)
        exact = torch.addmm(bias.double(), a.double(), b.double())
        size = torch.addmm(bias.double().abs(), a.double().abs(), b.double().abs())
        y = matmul(a, b, bias)
        assert y.dtype == torch.bfloat16 and y.shape == (rows, width)
        # The product may be rounded once before the bias is added, and the sum is rounded again.
        rounded = exact.abs() + (exact - bias.double()).abs()
        sums = length * torch.finfo(torch.float32).eps * size
        bound = torch.finfo(torch.bfloat16).eps / 2 * rounded + 1.01 * sums
        assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_without_bfloat16_instructions_products_are_those_of_float32(rows, monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPLIES_BFLOAT16", False)
    a, b, bias = operands(rows, 1024, 1024)
    expected = torch.addmm(bias.float(), a.float(), b.float()).bfloat16()
    assert torch.equal(matmul(a, b, bias), expected)


def test_a_large_weight_is_not_converted_for_a_few_rows(monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPLIES_BFLOAT16", True)
    converted = []
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: converted.append(self.numel()) or self.to(torch.float32)
    )
    a, b, bias = operands(3, 1024, ONEDNN_MIN_WEIGHT // 1024 + 1)
    matmul(a, b, bias)
    assert not converted
    a, b, bias = operands(3, 1024, ONEDNN_MIN_WEIGHT // 1024 - 1)
    matmul(a, b, bias)
    assert b.numel() in converted


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("rows", [3, 140])
def test_gradients_to_the_second_are_those_of_float64(rows, has_bfloat16, monkeypatch):
    monkeypatch.setattr(tiles, "MULTIPLIES_BFLOAT16", has_bfloat16)

    def derivatives(dtype):
        a, b, _ = (each.to(dtype) for each in operands(rows, 1024, 1024))
        a.requires_grad_()
        b.requires_grad_()
        loss = matmul(a, b).sigmoid().sum()
        first = torch.autograd.grad(loss, (a, b), create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), (a, b))

    for low, exact in zip(derivatives(torch.bfloat16), derivatives(torch.float64), strict=True):
        assert (low.double() - exact).norm() <= 0.1 * exact.norm()


def test_few_numbers_of_rows_are_compiled_and_none_is_much_larger():
    assert [rows_compiled(rows) for rows in ROWS] == [0, 8, 8, 8, 16, 64, 128, 128, 256, 384]
    assert len({rows_compiled(rows) for rows in range(129)}) == 6
    assert all(rows <= rows_compiled(rows) < 2 * rows for rows in range(5, 2000))


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_a_torch_without_onednn_computes_bfloat16_in_float32(machine, monkeypatch):
    class Nothing:
        """What ``torch.ops.mkldnn`` is there: it has no operator."""

    monkeypatch.setattr(tiles.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert not tiles._multiplies_bfloat16()


def test_a_processor_that_is_no_x86_is_asked_through_onednn(monkeypatch):
    class Operators:
        _is_mkldnn_bf16_supported = staticmethod(lambda: True)

    monkeypatch.setattr(tiles.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    assert tiles._multiplies_bfloat16()
