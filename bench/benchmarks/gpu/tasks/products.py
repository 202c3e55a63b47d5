"""What launches one product of a layer and little else, so that its blocks can be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ironmoe.bench.benchmarks.shapes import Problem, Shape, make_problem
from ironmoe.kernels import Dispatch, plan_dispatch, tuning
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.kernels.expert_down import expert_down_backward_op
from ironmoe.kernels.grouped_matmul import grouped_matmul_backward_op, grouped_matmul_op
from ironmoe.kernels.tuning import Chip, chip_of


def work_of(
    product: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], list[Tensor]], Chip, int]:
    """How one product is launched.

    Args:
        product: a row of the table of blocks in ``kernels/tuning.py``.

    Returns:
        (what launches the product and little else, the chip, the rows of a tile)
    """
    products = Products.of_layer(shape, dtype, device)
    works = {
        "plain": products.plain,
        "hidden_gradient": products.hidden_gradient,
        "weight_gradient": products.weight_gradient,
    }
    run = works.get(product.removesuffix("_interleaved"), products.up)
    rows = tuning.rows_per_tile(shape.rows, shape.num_experts, dtype)
    return run, chip_of(products.problem.x), rows


@dataclass(frozen=True)
class Products:
    """The products of one layer, as the expert MLP calls them.

    hidden (R, F | 2F), activated (R, F): random stand-ins for what a forward pass leaves; tiles:
    the row tiles that ``plan_tiles`` cuts.
    """

    problem: Problem
    dispatch: Dispatch
    tiles: Tensor
    hidden: Tensor
    activated: Tensor

    @classmethod
    def of_layer(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> "Products":
        """The products of a layer under a uniform routing."""
        problem = make_problem(shape, "uniform", dtype, device)
        dispatch = plan_dispatch(problem.experts, shape.num_experts)
        return cls(
            problem=problem,
            dispatch=dispatch,
            tiles=plan_tiles(dispatch.offsets, shape.rows, dtype),
            hidden=torch.randn(shape.rows, shape.wide, device=device, dtype=dtype),
            activated=torch.randn(shape.rows, shape.hidden, device=device, dtype=dtype),
        )

    @property
    def _rows(self) -> dict[str, Any]:
        """What says which rows belong to which expert, for every product."""
        return {"offsets": self.dispatch.offsets, "tiles_2n": self.tiles, "precision": "ieee"}

    def up(self) -> list[Tensor]:
        """The first layer with its activation."""
        hidden, activated = grouped_matmul_op(
            x=self.problem.x.detach(),
            weight=self.problem.w_in.detach(),
            bias=None,
            row_token=self.dispatch.row_token,
            slot_row=self.dispatch.slot_row,
            activation=self.problem.shape.activation,
            keep_hidden=True,
            **self._rows,
        )
        return [hidden, activated]

    def plain(self) -> list[Tensor]:
        """The two products without an epilogue: the second layer, and the input gradient, whose
        weights lie the other way.
        """
        out, _ = grouped_matmul_op(
            x=self.activated,
            weight=self.problem.w_out.detach(),
            bias=None,
            row_token=None,
            slot_row=None,
            activation="none",
            keep_hidden=True,
            **self._rows,
        )
        d_rows, _, _ = grouped_matmul_backward_op(
            dh=self.hidden,
            x=None,
            weight=self.problem.w_in.detach(),
            row_token=None,
            slot_row=None,
            want_x=True,
            want_w=False,
            want_b=False,
            **self._rows,
        )
        return [out, d_rows]

    def hidden_gradient(self) -> list[Tensor]:
        """The gradients of gates and H."""
        d_gates, _, _, dh = expert_down_backward_op(
            dy=self.problem.dy,
            gates=self.problem.gates.detach(),
            w_out=self.problem.w_out.detach(),
            b_out=None,
            hidden=self.hidden,
            row_token=self.dispatch.row_token,
            row_slot=self.dispatch.row_slot,
            slot_row=self.dispatch.slot_row,
            activation=self.problem.shape.activation,
            want_gates=True,
            want_w=False,
            want_b=False,
            want_h=True,
            **self._rows,
        )
        return [d_gates, dh]

    def weight_gradient(self) -> list[Tensor]:
        """The gradient of the first layer's weights."""
        _, dw, _ = grouped_matmul_backward_op(
            dh=self.hidden,
            x=self.problem.x.detach(),
            weight=self.problem.w_in.detach(),
            row_token=self.dispatch.row_token,
            slot_row=self.dispatch.slot_row,
            want_x=False,
            want_w=True,
            want_b=False,
            **self._rows,
        )
        return [dw]
