"""A V-MoE on four ranks, by expert parallelism, FSDP2 and copies, trained as in one process."""

import copy

import torch
import torch.distributed as dist
from layers_on_ranks import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ironmoe.moe import VMoE, freeze_weights
from ironmoe.moe.distributed import average_gradients, clip_grad_norm_, parallelize

IMAGES, STEPS = 2, 2
MESHES = (
    ("mean", {"dp": 2, "ep": 2}),
    ("mean", {"fsdp": 2, "ep": 2}),
    ("sum", {"dp": 2, "fsdp": 1, "ep": 2}),
)


def made():
    torch.manual_seed(0)
    router = {"noise_std": 0, "importance_weight": 0, "load_weight": 0}
    # few shapes: DTensor thinks long about an operation on each new one
    model = VMoE(8, 4, 16, 2, 2, 16, 5, moe_layers=(1,), num_experts=4, channels=1, router=router)
    nn.init.normal_(model.head.weight)  # it begins with 0, and so would all gradients
    return model.double()


def batch(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(IMAGES, 1, 8, 8, generator=generator, dtype=torch.float64)


def optimizer_of(model):
    """Of a weight of each kind, for the same reason: with all weights, AdamW would be most of the
    time. eps is large, so that a gradient that is 0 but for its rounding makes no step.
    """
    weights = [block.mlp.fc1.weight for block in model.blocks]  # of a dense block, of experts
    return torch.optim.AdamW(weights, lr=1e-2, eps=1e-4)


def trained_as_one(kind, sizes, rank):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    model, twin = parallelize(made(), mesh, gradients=kind), made()
    optimizer, other = optimizer_of(model), optimizer_of(twin)
    for step in range(STEPS):
        y = model(batch(rank, step)).square()
        loss = y.mean() if kind == "mean" else y.sum() / (4 * y.numel())
        loss.backward()
        average_gradients(model, mesh)  # it knows what parallelize was told
        torch.cat([twin(batch(r, step)).square() for r in range(4)]).mean().backward()
        for (name, weight), same in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                whole(weight.grad), same.grad, rtol=1e-12, atol=1e-12, msg=f"{sizes} {name}"
            )

        bound = 0.5 * float(nn.utils.get_total_norm([p.grad for p in twin.parameters()]))
        norm = clip_grad_norm_(model, bound)
        want = nn.utils.clip_grad_norm_(twin.parameters(), bound)
        torch.testing.assert_close(norm, want, rtol=1e-12, atol=0)
        for each in (optimizer, other):
            each.step()
        for each in (model, twin):
            each.zero_grad()
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(weight), same.detach(), rtol=1e-12, atol=1e-12)

    # an attack's gradient, with frozen weights
    x = batch(rank, 9).requires_grad_()
    with freeze_weights(model):
        (dx,) = torch.autograd.grad(model(x).square().sum(), [x])
    (want,) = torch.autograd.grad(twin(x).square().sum(), [x])
    torch.testing.assert_close(dx, want, rtol=1e-10, atol=1e-10)


def all_meshes(_, rank):
    for kind, sizes in MESHES:
        trained_as_one(kind, sizes, rank)
        dist.barrier()


def norms_of_other_orders(_, rank):
    """FSDP2 leaves some ranks without a number of a small weight."""
    cases = (("dp", "ep"), 1.0), (("dp", "ep"), 3.0), (("fsdp", "ep"), float("inf"))
    for names, p in cases:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        model, twin = parallelize(made(), mesh), made()
        x = batch(0, 0)
        model(x).square().mean().backward()
        twin(x).square().mean().backward()
        average_gradients(model, mesh)
        norm = clip_grad_norm_(model.parameters(), 1e-3, p)
        want = nn.utils.clip_grad_norm_(twin.parameters(), 1e-3, p)
        torch.testing.assert_close(norm, want, rtol=1e-12, atol=0)


def weights_beside_fsdp(_, rank):
    """FSDP2 averages its own; a head that comes later is one of copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    torch.manual_seed(1)
    head = nn.Linear(5, 3).double()
    model = nn.Sequential(parallelize(made(), mesh), copy.deepcopy(head))
    twin = nn.Sequential(made(), head)
    model(batch(rank, 0)).square().mean().backward()
    average_gradients(model, mesh)
    torch.cat([twin(batch(r, 0)).square() for r in range(4)]).mean().backward()
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(weight.grad), same.grad, rtol=1e-12, atol=1e-12)


CASES = (all_meshes, weights_beside_fsdp, norms_of_other_orders)
