"""The blocks that a GPU runs at 128 rows an expert and more, in bfloat16: every kernel of the
expert, against float64.
"""

from collections.abc import Callable
from functools import partial

import contract
import driver
import pytest
import torch
from torch import Tensor

from ironmoe.kernels import ACTIVATIONS
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.gpu.grouped_matmul import grouped_matmul

GELU, GATED, INTERLEAVED = "gelu", "swiglu", "clamped_swiglu_interleaved"
DIM = 144  # two steps of 64 terms, and a part of one


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """Weights as nn.Linear has them."""
    return tensor


def transposed(name: str, tensor: Tensor) -> Tensor:
    """Weights with their axes exchanged, as gpt-oss has them."""
    return tensor.mT.contiguous().mT if name in ("w_in", "w_out") else tensor


@pytest.mark.parametrize(
    ("act", "hidden", "lay"),
    [
        (GATED, 64, transposed),
        (GATED, 192, as_stored),
        (GELU, 64, as_stored),
        (GELU, 192, transposed),
        (INTERLEAVED, 64, as_stored),
        (INTERLEAVED, 192, transposed),
    ],
)
def test_forward_and_backward(
    device: str, act: str, hidden: int, lay: Callable[[str, Tensor], Tensor]
) -> None:
    """y and all gradients, with biases.

    One expert has more than a tile of rows, one none, one exactly a tile.
    """
    leaves = contract.oracle.layer(
        130, DIM, hidden, 3, torch.bfloat16, ACTIVATIONS[act].gated, True
    )
    experts = torch.tensor([[0, 2]]).repeat(130, 1).int()
    experts[128:, 1] = 3  # dropped
    routing = contract.Routing(torch.rand(130, 2), experts)
    first = len(driver.launches)
    contract.check_mlp(device, leaves, routing, act, lay=lay)
    assert {launch.tile.split("×")[0] for launch in driver.launches[first:] if launch.tile} == {
        "128"
    }


@pytest.mark.parametrize("act", [GATED, GELU, INTERLEAVED])
@pytest.mark.parametrize("hidden", [320, 208])
def test_units_alone(device: str, act: str, hidden: int) -> None:
    """Inference, in which H is not written; the units have the bits that they have beside it."""
    offsets = torch.tensor([0, 130, 130, 270], dtype=torch.int32)
    wide = 2 * hidden if ACTIVATIONS[act].gated else hidden
    x, token = torch.randn(60, DIM).bfloat16(), torch.randint(60, (272,), dtype=torch.int32)
    weight, bias = (
        (torch.randn(3, wide, DIM) * DIM**-0.5).bfloat16(),
        torch.randn(3, wide).bfloat16(),
    )
    tiles = plan_tiles(offsets, 272, torch.bfloat16)

    with contract.poisoned():
        run = partial(
            grouped_matmul, x, weight, bias, offsets, tiles,
            row_token=token, activation=act, precision="ieee",
        )  # fmt: skip
        kept, units = run()
        _, alone = run(keep_hidden=False)
    assert kept is not None and units is not None and alone is not None
    exact = torch.zeros(272, wide, dtype=torch.float64)
    plain = torch.zeros(272, wide, dtype=torch.bfloat16)
    for expert, rows in ((0, slice(130)), (2, slice(130, 270))):
        own = x[token[rows].long()]
        exact[rows] = torch.nn.functional.linear(
            own.double(), weight[expert].double(), bias[expert].double()
        )
        plain[rows] = torch.nn.functional.linear(own, weight[expert], bias[expert])
    contract.assert_accurate(kept, plain, exact, "H")
    contract.assert_accurate(
        units, contract.plain_activation(act, plain), ACTIVATIONS[act].value(exact), "units"
    )
    assert torch.equal(units, alone)


@pytest.mark.parametrize("act", [GATED, GELU])
def test_tf32(device: str, act: str) -> None:
    """The products of float32 that round their factors to 10 bits; errors of 2⁻¹¹ a factor, over
    the terms of a sum.
    """
    leaves = contract.oracle.layer(40, DIM, 72, 2, torch.float32, ACTIVATIONS[act].gated, True)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    routing = contract.choose(40, 2, 2)
    dy = torch.randn(40, DIM)
    got = contract.mlp_results(
        leaves, routing.gates.requires_grad_(), routing.experts, act, dy, "tf32"
    )
    exact = contract.exact_mlp(leaves, routing, act, dy)
    for name, want in exact.items():
        error = (got[name].double() - want).square().mean().sqrt() / want.square().mean().sqrt()
        assert 0 < error < 2**-9, name
