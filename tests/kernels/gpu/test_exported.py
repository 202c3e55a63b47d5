"""What torch.export makes of a layer runs the Triton kernels."""

import pytest
import torch
from export_cases import EXAMPLE, exported, moe, quiet, tokens

from ironmoe.kernels.gpu.launch import observe


@pytest.mark.parametrize("trains", [False, True])
def test_an_exported_program_runs_the_kernels_and_each_product_plans_its_tiles(device, trains):
    layer = quiet(moe()).train(trains).to(device)
    run = exported(layer, tokens(EXAMPLE).to(device)).module()
    for count in (3, 70):
        x = tokens(count).to(device).requires_grad_()
        with observe() as launches:
            y = run(x)
            (dx,) = torch.autograd.grad(y.square().sum(), [x])
        names = [launch.kernel.fn.__name__ for launch in launches]
        products = ("grouped_matmul_kernel", "hidden_gradient_kernel")
        assert names.count("tiles_kernel") == sum(names.count(name) for name in products) == 4

        expected = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        (dx_expected,) = torch.autograd.grad(expected.square().sum(), [x])
        torch.testing.assert_close(dx, dx_expected, rtol=1e-4, atol=1e-5)
