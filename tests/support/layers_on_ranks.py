"""Layers whose experts are shared out over ranks, against the same layers in one process."""

import copy
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ironmoe.moe import Capacity, EnsembleRouter, ExpertChoiceRouter, MoE, SoftMoE, TopKRouter
from ironmoe.moe.exchange.expert_parallel import replicated_tokens

D, F, E = 8, 24, 4  # every rank of 4 has one expert, every rank of 2 has two
QUIET = {"noise_std": 0, "importance_weight": 0, "load_weight": 0}

# name → the layer
LAYERS = {
    "top 2": lambda: MoE(D, F, E, 2),
    "top 1": lambda: MoE(D, F, E, 1, bias=False),
    "all experts": lambda: MoE(D, F, E, E, router=TopKRouter(D, E, E, renormalize=True, **QUIET)),
    "gated": lambda: MoE(D, F, E, 2, activation="swiglu"),
    "recomputed": lambda: MoE(D, F, E, 2, recompute=True),
    "shared": lambda: MoE(D, F, E, 2, shared_dim=F, shared_gate=True),
    "capacity": lambda: MoE(D, F, E, 2, capacity=Capacity(0.5, images_per_group=1)),
    "expert choice": lambda: MoE(D, F, E, router=ExpertChoiceRouter(D, E, images_per_group=1)),
    "ensemble": lambda: MoE(D, F, E, 1, router=EnsembleRouter(D, E, 1, ensemble_size=2)),
    "soft": lambda: SoftMoE(D, F, E, 2),
    "selection bias": lambda: MoE(
        D, F, E, 2, router=TopKRouter(D, E, 2, selection_bias=True, **QUIET)
    ),
}


def made(name, dtype=torch.float64):
    """The same on every rank. In eval: no noise."""
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.4)
    return layer.eval()


def one_expert_takes_all(layer):
    with torch.no_grad():
        layer.router.weight[0] = 9.0
    return layer


def images(rank, counts, dtype=torch.float64):
    """(images of this rank, 6, D), positive where one expert shall take all."""
    x = torch.rand(counts[rank], 6, D, generator=torch.Generator().manual_seed(rank))
    return x.to(dtype).requires_grad_()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(layer, twin, batches, *, rank, tolerance, call=lambda layer, x, _: layer(x)):
    """y, dX, the second derivatives and the gradients of all weights."""
    x, others = batches[rank], [x.detach().clone().requires_grad_() for x in batches]
    y = call(layer, x, rank)
    (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
    (y.sum() + dx.square().sum()).backward()

    ys = [call(twin, other, number) for number, other in enumerate(others)]
    dxs = torch.autograd.grad(sum(y.square().sum() for y in ys), others, create_graph=True)
    sum(y.sum() + dx.square().sum() for y, dx in zip(ys, dxs, strict=True)).backward()

    close(y, ys[rank], tolerance)
    close(dx, dxs[rank], tolerance)
    close(x.grad, others[rank].grad, tolerance)
    names = [name for name, _ in layer.named_parameters()]
    for name, own, other in zip(names, layer.parameters(), twin.parameters(), strict=True):
        got = torch.zeros_like(other) if own.grad is None else whole(own.grad)
        if not hasattr(own, "device_mesh"):
            dist.all_reduce(got)
        want = torch.zeros_like(other) if other.grad is None else other.grad
        close(got, want, tolerance, name)


def close(got, want, tolerance, name=""):
    scale = float(want.detach().abs().max()) if want.numel() else 1.0
    torch.testing.assert_close(
        got, want, rtol=tolerance, atol=tolerance * max(scale, 1.0), msg=lambda text: name + text
    )


def equal_to_one_process(mesh, rank):
    world = mesh.size()
    even, uneven, nobody = [2] * world, [3, 0, 1, 2][:world], [0] * world
    # with four ranks, those whose way of rows differs
    few = ("top 1", "all experts", "shared", "expert choice", "ensemble", "soft")
    for name in LAYERS if world == 2 else few:
        # an ensemble takes the tokens of its two members
        batches = [
            images(number, even if name == "ensemble" else uneven) for number in range(world)
        ]
        layer = made(name).parallelize(mesh, gradients="sum")
        compare(layer, made(name), batches, rank=rank, tolerance=1e-12)

    batches = [images(number, nobody) for number in range(world)]
    layer = made("top 2").parallelize(mesh, gradients="sum")
    compare(layer, made("top 2"), batches, rank=rank, tolerance=1e-12)

    batches = [images(number, uneven) for number in range(world)]
    layer = one_expert_takes_all(made("top 1")).parallelize(mesh, gradients="sum")
    compare(layer, one_expert_takes_all(made("top 1")), batches, rank=rank, tolerance=1e-12)
    assert (whole(layer.fc1.weight.grad)[1:] == 0).all()  # 0, not None: others have tokens

    batches = [images(number, even, torch.float32) for number in range(world)]
    layer = made("top 2", torch.float32).parallelize(mesh, gradients="sum")
    compare(layer, made("top 2", torch.float32), batches, rank=rank, tolerance=1e-6)


def masks_and_strange_inputs(mesh, rank):
    world = mesh.size()
    layer, twin = made("shared").parallelize(mesh, gradients="sum"), made("shared")
    batches = [images(number, [2] * world) for number in range(world)]
    masks = [torch.arange(12).view(2, 6) % (number + 2) != 0 for number in range(world)]
    masks[-1] = torch.zeros(2, 6, dtype=torch.bool)  # a rank whose tokens are all padding
    with torch.no_grad():
        for x, mask in zip(batches, masks, strict=True):
            x[~mask] = float("nan")
    compare(
        layer,
        twin,
        batches,
        rank=rank,
        tolerance=1e-12,
        call=lambda layer, x, number: layer(x.nan_to_num(), masks[number]),
    )

    for name in ("capacity", "expert choice", "soft", "ensemble"):
        layer, twin = made(name).parallelize(mesh), made(name)
        y, want = (each(batches[rank].nan_to_num(), masks[rank]) for each in (layer, twin))
        close(y, want, 1e-12, name)

    layer, twin = made("top 2").parallelize(mesh), made("top 2")
    x = images(rank, [2] * world).detach()
    for strange in (x.mT.contiguous().mT, x[:1, :1].expand(3, 5, D), x[:, ::2]):
        close(layer(strange), twin(strange), 1e-12)


def only_what_is_asked_for(mesh, rank):
    """No product for weights where only dX is asked, none for dX where only weights are."""
    layer = made("all experts").parallelize(mesh)  # no rank is without rows
    x = images(rank, [2] * mesh.size())

    def flops(want):
        y = layer(x)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), want, allow_unused=True)
        return counter.get_total_flops()

    experts = [layer.fc1.weight, layer.fc2.weight]
    only_x, only_w, both = flops([x]), flops(experts), flops([x, *experts])
    # The two products of dX are those of dW. Only the first layer's dX is left out in only_w.
    rows = 2 * 6 * 2 * mesh.size() * (E // mesh.size()) * D * F
    assert both - only_x == 2 * rows, (only_x, only_w, both)
    assert both - only_w >= rows, (only_x, only_w, both)

    for weight in experts:
        weight.requires_grad_(False)
    assert flops([x]) == only_x


def copies_of_tokens(mesh, rank):
    """All ranks have the same tokens: each result and gradient is that of one process."""
    world = mesh.size()
    for name in ("top 2", "shared", "capacity", "expert choice", "soft"):
        layer, twin = made(name).parallelize(mesh), made(name)
        x, same = images(0, [2] * world), images(0, [2] * world)
        with replicated_tokens([layer.expert_parallel]):
            y, want = layer(x), twin(same)
            (dx,) = torch.autograd.grad(y.square().sum(), [x], create_graph=True)
            (dx_want,) = torch.autograd.grad(want.square().sum(), [same], create_graph=True)
            dx.square().sum().backward()
            dx_want.square().sum().backward()
        close(y, want, 1e-12)
        close(dx, dx_want, 1e-12)
        close(x.grad, same.grad, 1e-12)
        for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
            if other.grad is not None:
                close(whole(own.grad), other.grad, 1e-12)


def rows_travel_while_the_shared_expert_works(mesh, rank):
    """In the forward pass and in the backward pass."""
    layer, events = made("shared").parallelize(mesh), []
    group = layer.expert_parallel.group
    start, finish = type(group).start_rows, type(group).finish_rows

    def noted(name, function, rows_at=None):
        def call(self, *arguments):
            if rows_at is None or arguments[rows_at] == "rows":
                events.append(name)
            return function(self, *arguments)

        return call

    type(group).start_rows = noted("start", start, rows_at=4)
    type(group).finish_rows = noted("finish", finish)
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.fc1.weight.register_hook(lambda _: events.append("shared"))
    try:
        y = layer(images(rank, [2] * mesh.size()))
        # the first end is that of the counts; then rows go to the experts and back
        assert events == ["finish", "start", "shared", "finish", "start", "finish"], events
        events.clear()
        y.sum().backward()
        assert events == ["start", "finish", "start", "shared", "finish"], events
    finally:
        type(group).start_rows, type(group).finish_rows = start, finish


def bounded_buffers(mesh, rank):
    world = mesh.size()
    batches = [images(number, [2, 1, 0, 2][:world]) for number in range(world)]
    layer = made("top 2").parallelize(mesh, gradients="sum", max_tokens_per_rank=24)
    compare(layer, made("top 2"), batches, rank=rank, tolerance=1e-12)
    assert layer.expert_parallel.overflow.take() == 0

    # the first 5 tokens of each rank find a place at the only expert that is asked
    counts = [2] * world
    tight = one_expert_takes_all(made("top 1")).parallelize(mesh, max_tokens_per_rank=5)
    twin = one_expert_takes_all(made("top 1"))
    x = images(rank, counts).detach()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = tight(x).flatten(0, 1)
    close(y[:5], twin(x).flatten(0, 1)[:5], 1e-12)
    assert not y[5:].any()
    assert any("7 choices" in str(warning.message) for warning in said)
    assert tight.expert_parallel.overflow.take() == 7
    assert tight.expert_parallel.overflow.take() == 0


def other_ways_to_run(mesh, rank):
    world = mesh.size()
    layer, twin = made("shared").parallelize(mesh), made("shared")
    x = images(rank, [2] * world)
    close(copy.deepcopy(layer)(x), twin(x), 1e-12)
    again = checkpoint(layer, x, use_reentrant=False)
    close(again, twin(x), 1e-12)
    grads = (torch.autograd.grad(y.square().sum(), [x])[0] for y in (again, twin(x)))
    close(*grads, 1e-12)
    if world == 2:  # it takes seconds
        compiled = torch.compile(layer, backend="eager")
        close(compiled(x), twin(x), 1e-12)

    single, twin = (made("shared", torch.float32) for _ in range(2))
    single.parallelize(mesh)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = single(x.float()), twin(x.float())
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits

    try:
        torch.func.vmap(layer)(x)
    except NotImplementedError as error:
        assert "torch.func" in str(error)
    else:
        raise AssertionError("torch.func must be refused")


def gradients_are_rounded_row_by_row(mesh, rank):
    """In bfloat16, as rows travel: 1 + 0.4 · 2⁻⁷ is 1 there, and 0.4 · 2⁻⁷ added to it changes
    nothing. Rounded once at the end, the sum would be 1 + 2⁻⁷."""
    world = mesh.size()
    layer = MoE(
        D, D, world, world, activation="relu", bias=False, dispatch_dtype=torch.bfloat16
    ).double()
    nn.init.zeros_(layer.router.weight)  # all gates are 1 / world
    with torch.no_grad():
        layer.fc1.weight[:] = torch.eye(D)
        layer.fc2.weight[:] = 0
        for expert, factor in enumerate((1 + 0.4 / 128, 0.4 / 128)):
            layer.fc2.weight[expert] = world * factor * torch.eye(D)
    layer.eval()
    for each in (layer, copy.deepcopy(layer).parallelize(mesh)):
        x = torch.ones(3, D, dtype=torch.float64, requires_grad=True)
        (dx,) = torch.autograd.grad(each(x).sum(), [x])
        assert (dx == 1).all(), dx


def refused(mesh, rank):
    cases = [
        (lambda: MoE(D, F, E + 1, 2).parallelize(mesh), ValueError, "num_experts = 5"),
        (lambda: made("top 2").parallelize("ep"), TypeError, "DeviceMesh"),
        (lambda: made("top 2").parallelize(mesh, gradients="max"), ValueError, "gradients"),
        (
            lambda: made("top 2").parallelize(mesh, max_tokens_per_rank=0),
            ValueError,
            "max_tokens_per_rank",
        ),
        (lambda: made("top 2").parallelize(mesh).parallelize(mesh), ValueError, "shared out"),
    ]
    for call, kind, words in cases:
        try:
            call()
        except kind as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


CASES = (
    equal_to_one_process,
    masks_and_strange_inputs,
    only_what_is_asked_for,
    copies_of_tokens,
    rows_travel_while_the_shared_expert_works,
    bounded_buffers,
    other_ways_to_run,
    gradients_are_rounded_row_by_row,
    refused,
)
