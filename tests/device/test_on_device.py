"""Whole layers, models and attacks on a GPU beside the CPU. Without a GPU their kernels run in
Triton's interpreter.

What the device computes is held to twice the error that the same float32 code makes on the CPU,
both against float64: a device adds in another order, and its exp may be off by one place more, but
neither changes the size of an error. Verdicts of attacks must be the same.
"""

import copy
from contextlib import contextmanager

import contract
import documented
import pytest
import torch
from torch import nn

from ironmoe.attacks import APGD, PGD, evaluate
from ironmoe.attacks.training import pgd
from ironmoe.moe import MoE, VMoE, freeze_weights, trace_routing, upcycle
from ironmoe.moe.routers.capacity import Capacity

D, F, E, K = 16, 24, 3, 2
EPS = 0.3
ONLY_ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="the interpreter cannot do it, or another case rehearses it"
)  # fmt: skip

# The interpreter's numpy: exp of large numbers, and an index of one element.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:RuntimeWarning", "ignore:.*:DeprecationWarning:triton.runtime.interpreter"
)


@contextmanager
def on_cpu():
    """CPU tensors take the CPU's own code, though the device of this test may be the
    interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


def passes(model, x, dy=None):
    """y and the gradients of x and of every parameter, by name."""
    x = x.clone().requires_grad_()
    named = dict(model.named_parameters())
    y = model(x)
    dy = torch.ones_like(y) if dy is None else dy.to(y)
    gradients = torch.autograd.grad(y, [x, *named.values()], dy, allow_unused=True)
    found = {"y": y.detach(), **dict(zip(["x", *named], gradients, strict=True))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check(model, x, device, slack=2.0):
    """``passes`` on the device, against float64, beside the same in the same dtype on the CPU."""
    with on_cpu():
        dy = torch.randn(model(x).shape)
        exact = passes(copy.deepcopy(model).double(), x.double(), dy)
        plain = passes(model, x, dy)
    got = passes(copy.deepcopy(model).to(device), x.to(device), dy)
    assert got.keys() == exact.keys() == plain.keys()
    for name in exact:
        contract.assert_accurate(got[name], plain[name], exact[name], name, slack)


def small_vmoe(**options):
    torch.manual_seed(1)
    model = VMoE(
        8, 4, D, 2, 2, F, 6, moe_layers=(1,), num_experts=E, top_k=K, channels=1, **options
    ).eval()
    nn.init.normal_(model.head.weight, std=0.5)  # it starts as zeros, which let no gradient through
    return model


@pytest.fixture
def images():
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        pytest.param(torch.float32, "ieee", id="float32"),
        pytest.param(torch.float32, "tf32", id="tf32", marks=ONLY_ON_GPU),
        pytest.param(torch.bfloat16, "ieee", id="bfloat16", marks=ONLY_ON_GPU),
    ],
)
def test_moe(device, dtype, precision, activation):
    layer = MoE(D, F, E, K, activation=activation, precision=precision, dtype=dtype).eval()
    if precision == "ieee":
        return check(layer, torch.randn(33, D).to(dtype), device)
    # tf32 rounds operands to 10 bits of mantissa: 2⁻¹¹ of each, in two products one after the
    # other, with slopes of about 1
    x, dy = torch.randn(33, D), torch.randn(33, D)
    with on_cpu():
        exact = passes(copy.deepcopy(layer).double(), x.double(), dy)
    for name, found in passes(layer.to(device), x.to(device), dy).items():
        error = (found.cpu().double() - exact[name]).norm() / exact[name].norm()
        assert error < 8 * 2**-11, name


def test_vmoe(device, images):
    check(small_vmoe(), images, device)


def test_patched_hugging_face_model(device):
    pytest.importorskip("transformers", minversion="5.17")
    import hf_families as families

    model = families.patched(families.build("mixtral")).eval()
    embeddings = torch.randn(2, 7, model.get_input_embeddings().weight.shape[1])

    class FromEmbeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(inputs_embeds=x).logits

    check(FromEmbeddings(), embeddings, device)


def test_upcycled_model_is_the_dense_one(device, images):
    dense = small_vmoe()
    dense.blocks[1] = copy.deepcopy(dense.blocks[0])  # without experts
    sparse = upcycle(copy.deepcopy(dense), E, K).eval()

    def logits(model, x):
        return {"y": model(x).detach()}

    with on_cpu():
        exact, plain = logits(copy.deepcopy(dense).double(), images.double()), logits(dense, images)
    got = logits(sparse.to(device), images.to(device))
    # gates that add up to 1 but for their rounding
    contract.assert_accurate(got["y"], plain["y"], exact["y"], slack=4)


@pytest.mark.parametrize("priority", [False, True])
def test_capacity(device, priority):
    """The same choices are dropped, and everything else is as accurate."""
    layer = MoE(
        D, F, E, K, capacity=Capacity(0.7, tokens_per_group=20, priority=priority, multiple_of=1)
    ).eval()
    x = torch.randn(40, D)
    with on_cpu(), trace_routing(layer) as expected:
        layer(x)
    there = copy.deepcopy(layer).to(device)
    with trace_routing(there) as found:
        there(x.to(device))
    (ours,), (right,) = found.layers.values(), expected.layers.values()
    assert (right.routings[0].experts == E).any()
    assert torch.equal(ours.routings[0].experts.cpu(), right.routings[0].experts)
    check(layer, x, device)


def test_trace(device, images):
    """Every choice is that of the CPU, in a model whose choices are clear: the next best is behind
    by more than rounding.
    """
    model = small_vmoe()
    with on_cpu(), trace_routing(model) as expected:
        model(images)
    (right,) = expected.layers.values()
    best = right.all_logits[0].topk(K + 1, dim=-1).values
    assert (best[..., :-1] - best[..., 1:]).min() > 1e-4
    there = copy.deepcopy(model).to(device)
    with trace_routing(there) as found:
        there(images.to(device))
    (ours,) = found.layers.values()
    assert torch.equal(ours.routings[0].experts.cpu(), right.routings[0].experts)
    torch.testing.assert_close(
        ours.routings[0].gates.cpu(), right.routings[0].gates, rtol=1e-4, atol=1e-6
    )


def attacked(make, images, device):
    """(result on the device, result on the CPU, where images may fall) of an attack that every
    second image has no room for.
    """
    model = small_vmoe()
    with on_cpu(), torch.no_grad():
        labels = model(images).argmax(1)
    eps = torch.tensor([EPS, 0.0]).repeat(len(images) // 2)
    with on_cpu():
        expected = make(copy.deepcopy(model), eps).run(images, labels)
    found = make(copy.deepcopy(model).to(device), eps.to(device)).run(
        images.to(device), labels.to(device)
    )
    return found, expected, eps > 0


ATTACKS = {
    "PGD": lambda model, eps: PGD(model, eps, steps=2),
    "PGD to the end": lambda model, eps: PGD(model, eps, steps=2, early_stop=False),
    "APGD": lambda model, eps: APGD(model, eps, steps=3),
}


@pytest.mark.parametrize(
    "name", ["PGD", *(pytest.param(name, marks=ONLY_ON_GPU) for name in ("PGD to the end", "APGD"))]
)  # fmt: skip
def test_attack(device, images, name):
    """Images that have room for it fall, on both; the others do not. Points differ where a gradient
    is near 0: its sign is rounding.
    """
    found, expected, may_fall = attacked(ATTACKS[name], images, device)
    assert torch.equal(found.success.cpu(), may_fall) and torch.equal(expected.success, may_fall)
    assert torch.equal(found.clean_correct.cpu(), expected.clean_correct)
    distance = (found.adversarial.cpu().double() - images.double()).abs().flatten(1).amax(1)
    assert (distance <= EPS * may_fall.double() * (1 + 1e-6)).all()
    with on_cpu(), torch.no_grad():
        prediction = small_vmoe().double()(found.adversarial.cpu().double()).argmax(1)
    assert torch.equal(prediction, found.prediction.cpu())
    same = (found.adversarial.cpu() - expected.adversarial).abs() < 1e-6
    assert same.double().mean() > 0.9


def test_evaluate(device, images):
    model = small_vmoe()
    with on_cpu(), torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 6  # one is wrong from the start

    def report(on):
        there = copy.deepcopy(model).to(on)
        attacks = {"PGD": PGD(there, EPS, steps=2)}
        found = evaluate(
            there, [(images.to(on), labels.to(on))], attacks, eps=[1e-6, EPS], checks=False
        )
        return (
            found.clean_accuracy,
            found.worst_case,
            found.attacks["PGD"].curve,
            found.attacks["PGD"].fell_at.tolist(),
        )

    with on_cpu():
        expected = report("cpu")
    assert report(device) == expected
    assert expected[0].count == len(images) - 1 and expected[1].count == 0


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_inner_attack_of_a_training(device, images, norm):
    model, labels = small_vmoe(), torch.arange(len(images))
    start = images + 0.1 * torch.randn(images.shape)
    settings = {"eps": EPS, "alpha": EPS / 4, "steps": 1, "norm": norm}
    with on_cpu():
        expected = pgd(model, images, labels, start=start, **settings)
    found = pgd(
        model.to(device), images.to(device), labels.to(device), start=start.to(device), **settings
    )
    # the sign of a gradient near 0 may differ
    near = (found.cpu() - expected).abs() < 1e-5
    assert near.float().mean() > 0.95


def test_two_runs_and_frozen_weights_give_the_same_bits(device):
    layer = MoE(D, F, E, K).eval().to(device)
    x, dy = torch.randn(33, D).to(device), torch.randn(33, D).to(device)
    first, second = passes(layer, x, dy), passes(layer, x, dy)
    with freeze_weights(layer):
        leaf = x.clone().requires_grad_()
        (frozen,) = torch.autograd.grad(layer(leaf), [leaf], dy)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(frozen, first["x"])


@ONLY_ON_GPU
def test_the_cuda_graph_of_the_documentation():
    """The example as it stands; then a replay from the start is the step, bit by bit."""
    variables = {}
    exec(compile(documented.cuda_graph_example(), "docs/kernels.md", "exec"), variables)

    point, image = variables["point"], variables["image"]
    start = (variables["low"] + variables["high"]) / 2
    documented.check_point(variables, start, moved_by=8 / 255)
    found = []
    for once in (variables["graph"].replay, variables["step"]):
        with torch.no_grad():
            point.copy_(start)
            image.copy_(start)
        once()
        found.append(point.clone())
    assert torch.equal(*found)
    assert (found[0] - start).abs().max() > 1 / 255


@ONLY_ON_GPU
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_cuda_graph_replays_the_inner_attack_of_a_training(device, images, norm):
    """eps is a tensor, so that the same graph serves while it grows."""
    model = small_vmoe().to(device)
    x, y = images.to(device), torch.arange(len(images), device=device)
    eps = torch.tensor(EPS, device=device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the first launches compile
        pgd(model, x, y, eps=eps, steps=2, norm=norm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = pgd(model, x, y, eps=eps, steps=2, norm=norm)

    order = float("inf") if norm == "Linf" else 2
    for radius in (EPS, EPS / 4):
        eps.fill_(radius)
        graph.replay()
        torch.cuda.synchronize()
        length = (found - x).flatten(1).norm(order, dim=1)
        assert (length > radius / 4).all() and (length <= radius * (1 + 1e-6)).all()
