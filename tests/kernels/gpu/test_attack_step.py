import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ironmoe.attacks import PGD
from ironmoe.attacks.balls.ball import NORMS
from ironmoe.attacks.balls.l2 import L2Ball
from ironmoe.attacks.balls.linf import LinfBall
from ironmoe.kernels.attack_step import _l2_operator, _linf_operator, l2_step, linf_step
from ironmoe.kernels.gpu.launch import observe

BOX = (0.0, 1.0)
ULP = torch.finfo(torch.float32).eps
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


@st.composite
def cases(draw):
    """(point, grad, center, eps, alpha) on the CPU: a point inside ball and box, gradients of every
    size, many on the faces."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    shape = draw(
        st.sampled_from([(1, 1), (3, 7), (2, 3, 5, 5), (4, 16), (1, 1025), (2, 4099), (0, 3, 4)])
    )
    center = torch.rand(shape)
    center = torch.where(torch.rand(shape) < 0.3, center.round(), center)
    eps = draw(st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 3.0, 100.0])) * torch.rand(
        shape[0], dtype=torch.float64
    )
    alpha = draw(st.sampled_from([0.0, 0.025, 1.0, 30.0])) * eps
    scale = draw(st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e30]))
    grad = (scale * torch.randn(shape)).to(
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    )
    grad = grad.clamp(-6e4, 6e4) if grad.dtype == torch.float16 else grad
    point = LinfBall(center, eps, BOX).project(center + torch.randn(shape))
    if draw(st.booleans()):
        point = L2Ball(center, eps, BOX).project(point)
    return point, grad, center, eps, alpha


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def assert_rounded(image, moved, dtype):
    # Triton's interpreter does; GPUs round to nearest
    truncates = dtype == torch.bfloat16 and moved.device.type == "cpu"
    torch.testing.assert_close(image, moved.to(dtype), rtol=2**-7 if truncates else 0, atol=0)


def l2_by_float64(point, grad, center, eps, alpha):
    ball = L2Ball(center.double(), eps, BOX)
    return ball.project(ball.ascend(point.double(), grad.double(), alpha))


@quick
@given(cases(), st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]))
def test_linf_gives_the_bits_of_the_twin(device, case, image_dtype):
    point, grad, center, eps, alpha = on(device, *case)
    ball = LinfBall(center, eps, BOX)
    with observe() as launches:
        moved, image = linf_step(point, grad, ball.low, ball.high, alpha, image_dtype=image_dtype)
    assert len(launches) == (len(point) > 0)
    assert torch.equal(moved, ball.project(ball.ascend(point, grad, alpha)))
    assert_rounded(image, moved, image_dtype or torch.float32)
    assert torch.equal(moved, ball.step(point, grad, alpha)) and moved is not point
    if len(point):
        assert (ball.distance(moved) <= eps).all() and moved.min() >= 0 and moved.max() <= 1


@quick
@given(cases(), st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]))
def test_l2_against_float64(device, case, image_dtype):
    point, grad, center, eps, alpha = on(device, *case)
    with observe() as launches:
        moved, image = l2_step(point, grad, center, eps, BOX, alpha, image_dtype=image_dtype)
    assert len(launches) == (len(point) > 0)
    assert_rounded(image, moved, image_dtype or torch.float32)
    if len(point):
        # y may lie far outside: its own rounding is relative to the length of the step
        slack = 8 * ULP * (1 + alpha)
        exact = l2_by_float64(point, grad, center, eps, alpha)
        assert ((moved - exact).flatten(1).abs().amax(1) <= slack).all()
        assert (
            L2Ball(center, eps, BOX).distance(moved) <= eps + slack * point[0].numel() ** 0.5
        ).all()
        assert moved.min() >= 0 and moved.max() <= 1
    assert torch.equal(moved, l2_step(point, grad, center, eps, BOX, alpha)[0])


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("bounds", [(1.0, 2.0), (-2.1, 2.6), (0.5, 0.5 + 1e-6)])
def test_other_boxes(device, norm, bounds):
    """Also lanes past the last pixel, which are neither clipped nor free."""
    center = torch.empty(3, 5, 7, device=device).uniform_(*bounds).clamp(*bounds)
    ball = NORMS[norm](
        center, torch.tensor([0.2, 1.0, 9.0], dtype=torch.float64, device=device), bounds
    )
    grad = torch.randn(3, 5, 7, device=device)
    moved = ball.step(center, grad, 2 * ball.eps)
    torch.testing.assert_close(
        moved, ball.project(ball.ascend(center, grad, 2 * ball.eps)), rtol=0, atol=3e-6
    )
    assert ((moved >= torch.tensor(bounds[0])) & (moved <= torch.tensor(bounds[1]))).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_l2_step_has_its_length_for_gradients_of_any_size(device, scale):
    center = torch.full((2, 5), 0.5, device=device)
    grad = scale * torch.tensor([[3.0, 0, 0, 4.0, 0], [0.0] * 5], device=device)
    length = torch.tensor([0.5, 0.5], device=device)
    moved, _ = l2_step(center, grad, center, 2 * length, BOX, length)
    torch.testing.assert_close(
        (moved - center).cpu(), torch.tensor([[0.3, 0, 0, 0.4, 0], [0.0] * 5])
    )
    assert torch.equal(moved[1], center[1])


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_strided_tensors(device, norm):
    """The gradient of a mean is one number, expanded; images may be channels last; eps one number,
    expanded."""
    torch.manual_seed(1)
    center = torch.rand(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    eps = torch.tensor(0.3, dtype=torch.float64, device=device).expand(2)
    for grad in (
        torch.tensor(-2.0, device=device).expand(2, 3, 4, 5),
        torch.randn(5, 4, 3, 2, device=device).permute(3, 2, 1, 0),
    ):
        moved = NORMS[norm](center, eps, BOX).step(center, grad, eps)
        dense = NORMS[norm](center.contiguous(), eps.contiguous(), BOX)
        assert torch.equal(moved, dense.step(dense.center, grad.contiguous(), dense.eps))
        torch.testing.assert_close(
            moved, dense.project(dense.ascend(dense.center, grad, eps)), rtol=0, atol=8 * ULP
        )


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_what_the_twin_does(device, norm, bad):
    ball = NORMS[norm](
        torch.rand(2, 9, device=device), torch.ones(2, dtype=torch.float64, device=device), BOX
    )
    grad = torch.randn(2, 9, device=device)
    grad[0, 3] = bad
    moved = ball.step(ball.center, grad, 0.1 * ball.eps)
    twin = ball.project(ball.ascend(ball.center, grad, 0.1 * ball.eps))
    torch.testing.assert_close(moved, twin, equal_nan=True, rtol=0, atol=8 * ULP)
    assert moved[1].isfinite().all() and moved.isnan().any() == (norm == "L2")


@pytest.mark.parametrize("image_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_float64_takes_the_twin(device, dtype, image_dtype):
    point, grad = (
        torch.rand(2, 6, dtype=dtype, device=device),
        torch.randn(2, 6, dtype=torch.float64, device=device),
    )
    eps = torch.full((2,), 0.1, device=device)
    with observe() as launches:
        moved, image = linf_step(
            point, grad, point - 0.1, point + 0.1, eps, image_dtype=image_dtype
        )
        moved_l2, image_l2 = l2_step(point, grad, point, eps, BOX, eps, image_dtype=image_dtype)
    assert not launches and moved.dtype == moved_l2.dtype == dtype
    assert torch.equal(image, moved.to(image_dtype)) and torch.equal(
        image_l2, moved_l2.to(image_dtype)
    )
    assert (image is moved) == (image_l2 is moved_l2) == (image_dtype == dtype)


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_are_registered_right(device, dtype, image_dtype):
    point = torch.rand(2, 3, 4, dtype=dtype, device=device)
    grad = torch.randn(2, 3, 4, device=device).bfloat16()
    eps = torch.full((2,), 0.1, dtype=torch.float64, device=device)
    torch.library.opcheck(_linf_operator, (point, grad, point - 0.1, point + 0.1, eps, image_dtype))
    torch.library.opcheck(_l2_operator, (point.mT, grad.mT, point.mT, eps, *BOX, eps, image_dtype))


def test_without_an_operator_on_cpu():
    """Plain CPU tensors: the twin's bits, its layout, outside autograd."""
    point = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    eps = torch.full((2,), 0.1)
    with observe() as launches:
        moved, image = linf_step(point, torch.randn(2, 3, 4, 4), point - 0.1, point + 0.1, eps)
    assert not launches and moved is image and not moved.requires_grad
    assert moved.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_an_attack_takes_one_launch_a_question(device, norm):
    """Without early stop the last of three steps is asked about, too, in a round like any other."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).to(device)
    images = torch.rand(4, 3, 2, 2, device=device)
    labels = model(images).argmax(1)
    with observe() as launches:
        result = PGD(model, 0.5, steps=3, norm=norm, early_stop=False).run(images, labels)
    assert [seen.kernel.fn.__name__ for seen in launches] == [f"{norm.lower()}_step_kernel"] * 4
    assert (result.distance <= 0.5).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"point": torch.rand(2, 4).bfloat16()},
            TypeError,
            "point must be a float32 or float64 tensor .* got torch.bfloat16",
        ),
        ({"point": torch.rand(2)}, TypeError, "point must be .* of shape \\(2,\\)"),
        (
            {"grad": torch.rand(2, 5)},
            ValueError,
            "grad must have shape \\(2, 4\\).* got \\(2, 5\\)",
        ),
        (
            {"grad": torch.ones(2, 4, dtype=torch.int64)},
            TypeError,
            "grad must be a tensor of .* got torch.int64",
        ),
        (
            {"grad": torch.rand(2, 4, device="meta")},
            ValueError,
            "grad must be on cpu like point, got meta",
        ),
        (
            {"center": torch.rand(2, 4).double()},
            TypeError,
            "center must be a tensor of torch.float32, got torch.float64",
        ),
        ({"alpha": 0.1}, TypeError, "alpha must be a tensor .* got 0.1"),
        ({"alpha": torch.tensor(0.1)}, ValueError, "alpha must have shape \\(2,\\).* got \\(\\)"),
        ({"eps": torch.rand(3)}, ValueError, "eps must have shape \\(2,\\).* got \\(3,\\)"),
        ({"bounds": (1.0, 0.0)}, ValueError, "bounds must be .* got \\(1.0, 0.0\\)"),
        (
            {"image_dtype": torch.int8},
            TypeError,
            "image_dtype must be None or one of .* got torch.int8",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    right = {
        "point": torch.rand(2, 4),
        "grad": torch.rand(2, 4),
        "center": torch.rand(2, 4),
        "bounds": BOX,
    }
    right |= {"eps": torch.rand(2), "alpha": torch.rand(2)}
    with pytest.raises(error, match=message):
        l2_step(**right | change)
    if not change.keys() & {"center", "eps", "bounds"}:
        right = {"low": right["center"], "high": right["center"]} | {
            name: right[name] for name in ("point", "grad", "alpha")
        }
        with pytest.raises(error, match=message):
            linf_step(**right | change)
