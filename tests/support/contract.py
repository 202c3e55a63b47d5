"""What the kernels' numbers are held to, and inputs that make mistakes show."""

from contextlib import contextmanager
from importlib import import_module

import oracle
import pytest
import torch
import torch.nn.functional as F

from ironmoe.kernels import Routing, expert_mlp
from ironmoe.kernels.tuning import CHIPS, INTERPRETER, assume, chip_of

_only_on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no product of the interpreter"
)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=_only_on_gpu)]
SETTINGS = [  # of the products
    pytest.param(torch.float32, "ieee", id="float32"),
    pytest.param(torch.float16, "ieee", id="float16"),
    pytest.param(torch.bfloat16, "ieee", id="bfloat16", marks=_only_on_gpu),
    pytest.param(torch.float32, "tf32", id="tf32", marks=_only_on_gpu),
]


def assert_accurate(got, plain, exact, name="", slack=2.0):
    """The error against float64, its largest and its RMS, is at most twice that of plain torch in
    the same dtype.

    ``slack`` adds units in the last place of the largest value: half a one for the rounding of a
    result, which falls as it may; more where values are few, with which plain torch may be lucky.
    """
    assert got.shape == exact.shape and got.dtype == plain.dtype, name
    if exact.numel() == 0:
        return
    exact = exact.detach().cpu().double()
    ours, theirs = (t.detach().cpu().double() - exact for t in (got, plain))
    assert ours.isfinite().all(), f"{name} is not finite"
    unit = slack * torch.finfo(plain.dtype).eps * exact.abs().max()
    for measure in (lambda error: error.abs().max(), lambda error: error.square().mean().sqrt()):
        assert measure(ours) <= 2 * measure(theirs) + unit, (
            f"{name}: {measure(ours)} against {measure(theirs)}"
        )


@contextmanager
def poisoned():
    """Memory that kernels get without a value is full of NaN, or of the largest integer, and so is
    what lies around it.

    What they leave unwritten shows, and what they read past an end; what they write there fails at
    the end of the block.
    """
    margin, buffers, new_empty = 64, [], torch.Tensor.new_empty

    def guarded(like, *size, **options):
        size = torch.Size(size if isinstance(size[0], int) else size[0])
        buffers.append(new_empty(like, size.numel() + 2 * margin, **options))
        return buffers[-1][margin : margin + size.numel()].view(size)

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is empty
    try:
        assert torch.empty(3).isnan().all()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", guarded)
            patch.setattr(
                torch, "empty_like", lambda like, **options: guarded(like, like.shape, **options)
            )
            yield
        for buffer in buffers:
            if not buffer.is_meta:
                around = torch.stack([buffer[:margin], buffer[-margin:]])
                assert (
                    around.isnan()
                    if around.is_floating_point()
                    else around == torch.iinfo(around.dtype).max
                ).all()
    finally:
        torch.use_deterministic_algorithms(False)


def dot_row_by_row(a, b, dtype):
    """A product for the interpreter in which a row's bits do not depend on its place, which in
    numpy's BLAS they do."""
    return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(1)


@contextmanager
def programs_in_reverse():
    """The interpreter runs one program after the other, so a race shows only in another order. No
    order is promised on a GPU."""
    if torch.cuda.is_available():
        yield
        return
    builder = import_module("triton.runtime.interpreter").interpreter_builder
    set_grid_idx = builder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            builder, "set_grid_idx", lambda x, y, z: set_grid_idx(builder.grid_dim[0] - 1 - x, y, z)
        )
        yield


@contextmanager
def chip_or_skip(name, tensor):
    """Configurations of another chip, where this machine can run them: the interpreter can."""
    chip, own = CHIPS[name], chip_of(tensor)
    if chip.tma > own.tma or chip.shared_memory > own.shared_memory:
        pytest.skip(f"{name} has more than {own.name}")
    with assume(chip._replace(processors=INTERPRETER.processors)):
        yield


def among_nan(tensor, margin=8):
    """The same values as a view into a larger tensor that is NaN all around: what is read past an
    end shows."""
    around = tensor.new_full([n + 2 * margin for n in tensor.shape], float("nan"))
    view = around[tuple(slice(margin, margin + n) for n in tensor.shape)]
    return view.copy_(tensor)


def choose(tokens, num_experts, top_k, drop=0.0):
    """A Routing on the CPU: distinct experts, each choice dropped with probability ``drop``."""
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].int()
    dropped = torch.rand(tokens, top_k) < drop
    return Routing(
        torch.rand(tokens, top_k).masked_fill(dropped, 0), experts.masked_fill(dropped, num_experts)
    )


def plain_moe(leaves, gates, experts, act):
    """What one writes with torch alone: a loop over experts, in the dtype of x."""
    y = torch.zeros_like(leaves["x"])
    for e in range(len(leaves["w_in"])):
        token, slot = (experts == e).nonzero(as_tuple=True)
        b_in, b_out = (leaves[name][e] if name in leaves else None for name in ("b_in", "b_out"))
        hidden = F.linear(leaves["x"][token], leaves["w_in"][e], b_in)
        rows = F.linear(plain_activation(act, hidden), leaves["w_out"][e], b_out)
        y = y.index_add(0, token, (rows * gates[token, slot, None]).to(y.dtype))
    return y


def plain_activation(name, hidden):
    plain = {
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
    }
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
    if name in gates:
        gate, up = hidden.chunk(2, -1)
        return plain[gates[name]](gate) * up
    return plain[name](hidden) if name in plain else oracle.activation(name, hidden)


def mlp_results(leaves, gates, experts, act, dy, precision="ieee"):
    """y and the gradients of gates and leaves, by name."""
    biases = {name: leaves[name] for name in ("b_in", "b_out") if name in leaves}
    with poisoned():
        y = expert_mlp(
            leaves["x"],
            leaves["w_in"],
            leaves["w_out"],
            Routing(gates, experts),
            activation=act,
            precision=precision,
            **biases,
        )
        return with_gradients(y, gates, leaves, dy)


def with_gradients(y, gates, leaves, dy):
    wanted = {"gates": gates, **leaves}
    return {"y": y.detach()} | dict(
        zip(wanted, torch.autograd.grad(y, wanted.values(), dy), strict=True)
    )


def exact_mlp(leaves, routing, act, dy):
    """``mlp_results`` in float64, by the definition."""
    wide = {name: leaf.detach().cpu().double().requires_grad_() for name, leaf in leaves.items()}
    gates, experts = routing.gates.cpu().double().requires_grad_(), routing.experts.cpu()
    biases = (wide.get(name) for name in ("b_in", "b_out"))
    y = oracle.dense_moe(wide["x"], wide["w_in"], wide["w_out"], gates, experts, *biases, act)
    return with_gradients(y, gates, wide, dy.cpu().double())


def check_mlp(device, leaves, routing, act="gelu", precision="ieee", slack=2.0, lay=None, dy=None):
    """Values and all gradients of the expert against float64, held to twice the error of plain
    torch. ``lay`` lays inputs out."""
    low = {name: leaf.detach().to(device) for name, leaf in leaves.items()}
    dy = torch.randn_like(low["x"]) if dy is None else dy.to(device, low["x"].dtype)
    gates, experts = (t.to(device) for t in routing)
    laid = {name: lay(name, leaf) for name, leaf in low.items()} if lay else low
    laid_dy = lay("dy", dy) if lay else dy

    def fresh(tensors):
        return {
            name: t.detach().requires_grad_() for name, t in tensors.items()
        }, gates.clone().requires_grad_()

    ours, own_gates = fresh(laid)
    ours = mlp_results(ours, own_gates, experts, act, laid_dy, precision)
    low, own_gates = fresh(low)
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    plain = with_gradients(plain_moe(low, own_gates, experts, act), own_gates, low, dy)
    torch.backends.cuda.matmul.allow_tf32 = False
    exact = exact_mlp(low, Routing(gates, experts), act, dy)
    for name in exact:
        assert_accurate(ours[name], plain[name], exact[name], name, slack)
    return ours
