"""Tiles of 64 and 128 rows, with the blocks that large layers take.

Hidden widths lie on both sides of every edge of a block: where the last block holds only a part
(F % 128 = 64), two programs could write the same columns of H.
"""

import contract
import pytest
import torch

from ironmoe.kernels import ACTIVATIONS, Routing, plan_dispatch
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.gpu import grouped_matmul as gpu
from ironmoe.kernels.tuning import rows_per_tile

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
HALF_PRECISION = contract.DTYPES[1:]
INTERLEAVED = "clamped_swiglu_interleaved"
DIM = 48  # a multiple of 16: other strides take the narrow blocks of rows that are not aligned
HIDDEN = {"swiglu": (8, 64, 136, 192, 320), "gelu": (64, 192), INTERLEAVED: (64, 192)}
ROWS = {64: 50, 128: 150}  # rows a tile: rows of each of the two experts


def routing(rows):
    """Both experts take every token, so each has ``rows`` rows: more than a tile, not a
    multiple."""
    gates, experts = torch.rand(rows, 2), torch.tensor([[0, 1]], dtype=torch.int32).expand(rows, 2)
    return Routing(gates, experts.contiguous())


@pytest.mark.parametrize(("act", "hidden"), [(act, f) for act in HIDDEN for f in HIDDEN[act]])
@pytest.mark.parametrize("dtype", HALF_PRECISION)
def test_error_is_at_most_twice_that_of_plain_torch(device, dtype, hidden, act):
    """y and every gradient, on poisoned memory, with biases."""
    rows = ROWS[128]
    assert rows_per_tile(2 * rows, 2, dtype) == 128
    leaves = contract.oracle.layer(rows, DIM, hidden, 2, dtype, ACTIVATIONS[act].gated, True)
    contract.check_mlp(device, leaves, routing(rows), act, slack=0.5)


@pytest.mark.parametrize("act", ["swiglu", INTERLEAVED])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_no_bit_depends_on_the_order_of_programs(device, rows, transposed, act):
    """Two programs that write the same place show in the other order. Weights lie both ways in
    memory."""
    hidden, dtype = 192, torch.float16
    plan = plan_dispatch(routing(ROWS[rows]).experts.to(device), 2)
    assert rows_per_tile(2 * ROWS[rows], 2, dtype) == rows
    tiles = plan_tiles(plan.offsets, 2 * ROWS[rows], dtype)
    wide = hidden * (2 if ACTIVATIONS[act].gated else 1)
    x = torch.randn(ROWS[rows], DIM, dtype=dtype, device=device)
    weight = torch.randn(2, wide, DIM, dtype=dtype, device=device)
    weight = weight.mT.contiguous().mT if transposed else weight

    def products():
        with contract.poisoned():
            return gpu.grouped_matmul(
                x,
                weight,
                None,
                plan.offsets,
                tiles,
                row_token=plan.row_token,
                activation=act,
                precision="ieee",
            )

    in_order = products()
    with contract.programs_in_reverse():
        in_reverse = products()
    assert all(torch.equal(one, other) for one, other in zip(in_order, in_reverse, strict=True))
