"""Work follows demand: kernel launches, what they write, and the bytes kept between forward and
backward, counted."""

from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ironmoe.kernels import Routing, expert_mlp, topk_route
from ironmoe.kernels.gpu.launch import observe
from ironmoe.moe import MoE, freeze_weights

T, D, F, E, K = 12, 16, 24, 3, 2
PLAN = {"count": 1, "scan": 1, "place": 1}
FORWARD = PLAN | {"grouped_matmul": 2, "gather_sum": 1}
INPUT = {"hidden_gradient": 1, "grouped_matmul": 1, "gather_sum": 1}
GATES = {"hidden_gradient": 1, "bias_dot": 1, "gate_gradient": 1}
EVERYTHING = INPUT | GATES | {"weight_gradient": 2, "expert_sum": 2}
BACKWARD = {
    "x": INPUT,
    "gates": GATES,
    "w_in": {"hidden_gradient": 1, "weight_gradient": 1},
    "b_in": {"hidden_gradient": 1, "expert_sum": 1},
    "w_out": {"hidden_gradient": 1, "weight_gradient": 1},
    "b_out": {"expert_sum": 1},
    "x gates": INPUT | GATES,
    "x w_in": INPUT | {"weight_gradient": 1},
    "x gates w_in b_in w_out b_out": EVERYTHING,
}


def layer(device, weights_grad=True, biases=True):
    """Leaves by name, and the routing's experts."""
    shapes = {"x": (T, D), "w_in": (E, F, D), "w_out": (E, D, F)} | (
        {"b_in": (E, F), "b_out": (E, D)} if biases else {}
    )
    leaves = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    routing = topk_route(torch.randn(T, E, device=device), K)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "x" or weights_grad)
    return leaves | {"gates": routing.gates.requires_grad_()}, routing.experts


def forward(leaves, experts, **options):
    leaves = dict(leaves)
    x, w_in, w_out, gates = (leaves.pop(name) for name in ("x", "w_in", "w_out", "gates"))
    return expert_mlp(x, w_in, w_out, Routing(gates, experts), **leaves, **options)


def launches(f):
    with observe() as seen:
        f()
    return seen


def applies(launch, activation):
    unit = launch.arguments.get("UNIT")
    return unit is not None and unit.activation == activation


def count(f):
    return dict(Counter(launch.kernel.__name__.removesuffix("_kernel") for launch in launches(f)))


def test_inference_and_forward_run_the_plan_two_products_and_one_sum(device):
    leaves, experts = layer(device)
    with torch.no_grad():
        assert count(lambda: forward(leaves, experts)) == FORWARD
    assert count(lambda: forward(leaves, experts)) == FORWARD


def test_inference_writes_no_pre_activations(device):
    leaves, experts = layer(device)
    with torch.no_grad():
        up = [x for x in launches(lambda: forward(leaves, experts)) if applies(x, "gelu")]
    assert [x.arguments["hidden"] for x in up] == [None]
    up = [x for x in launches(lambda: forward(leaves, experts)) if applies(x, "gelu")]
    assert [x.arguments["hidden"].shape for x in up] == [(T * K, F)]


def test_weights_are_read_where_they_lie(device):
    """As gpt-oss has them: transposed, gate and up in turns. They are gigabytes, so no kernel may
    get a copy."""
    leaves, experts = layer(device, biases=False)
    stored = {
        "w_in": torch.randn(E, D, 2 * F, device=device),
        "w_out": torch.randn(E, F, D, device=device),
    }
    leaves |= {name: weight.mT.requires_grad_() for name, weight in stored.items()}

    def run():
        forward(leaves, experts, activation="clamped_swiglu_interleaved").sum().backward()

    operands = [x.arguments["w"] for x in launches(run) if "w" in x.arguments]
    read = [getattr(w, "base", w).data_ptr() for w in operands]
    w_in, w_out = (weight.data_ptr() for weight in stored.values())
    assert read == [w_in, w_out, w_out, w_in]


@pytest.mark.parametrize("wanted", BACKWARD)
def test_each_demand_runs_its_own_kernels(device, wanted):
    leaves, experts = layer(device)
    loss = forward(leaves, experts).sum()
    assert (
        count(lambda: torch.autograd.grad(loss, [leaves[name] for name in wanted.split()]))
        == BACKWARD[wanted]
    )


@pytest.mark.parametrize("wanted", BACKWARD)
def test_nothing_is_written_that_nobody_asked_for(device, wanted):
    leaves, experts = layer(device)
    loss = forward(leaves, experts).sum()
    seen = launches(lambda: torch.autograd.grad(loss, [leaves[name] for name in wanted.split()]))
    through = [x.arguments for x in seen if x.kernel.__name__ == "hidden_gradient_kernel"]
    names = set(wanted.split())
    assert len(through) == (names != {"b_out"})
    for arguments in through:
        assert (arguments["d_hidden"] is not None) == bool(names & {"x", "w_in", "b_in"})
        assert (arguments["gated"] is not None) == ("w_out" in names)
        assert (arguments["partial"] is not None) == ("gates" in names)
        assert (arguments["K"] == 0) == (names == {"w_out"}), "dW₂ alone needs no product with W₂"


def test_backward_runs_everything_once(device):
    leaves, experts = layer(device)
    loss = forward(leaves, experts).sum()
    assert count(lambda: loss.backward()) == EVERYTHING
    assert all(leaf.grad is not None for leaf in leaves.values())


def test_backward_with_inputs_follows_demand(device):
    leaves, experts = layer(device)
    loss = forward(leaves, experts).sum()
    assert count(lambda: loss.backward(inputs=[leaves["x"]])) == INPUT


def test_frozen_and_trainable_weights_run_the_same_and_give_the_same_bits(device):
    found = []
    for trainable in (False, True):
        torch.manual_seed(1)
        leaves, experts = layer(device, trainable)
        loss = forward(leaves, experts).square().sum()
        grads = []
        assert (
            count(
                lambda loss=loss, leaves=leaves, grads=grads: grads.extend(
                    torch.autograd.grad(loss, [leaves["x"]])
                )
            )
            == INPUT
        )
        found.append(grads[0])
    assert torch.equal(*found)


def module_gradient(device, training, frozen):
    torch.manual_seed(2)
    layer = MoE(D, F, E, K).to(device).train(training)
    layer.router.noise_std = 0.0
    x = torch.randn(T, D, device=device, requires_grad=True)
    found = []

    def run():
        found.extend(torch.autograd.grad(layer(x).square().sum(), [x]))

    if frozen:
        with freeze_weights(layer):
            return count(run), found[0]
    return count(run), found[0]


def test_train_and_eval_frozen_or_not_run_the_same_and_give_the_same_bits(device):
    (launched, grad), *others = (
        module_gradient(device, training, frozen)
        for training in (True, False)
        for frozen in (True, False)
    )
    assert (
        launched["hidden_gradient"] == 1
        and "weight_gradient" not in launched
        and "expert_sum" not in launched
    )
    for other_launched, other_grad in others:
        assert other_launched == launched
        assert torch.equal(grad, other_grad)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(device):
    module = torch.nn.ParameterDict(
        {"w_in": torch.randn(E, F, D), "w_out": torch.randn(E, D, F)}
    ).to(device)
    holder = torch.nn.Module()
    holder.w_in, holder.w_out = module["w_in"], module["w_out"]
    for name in ("w_in", "w_out"):
        torch.nn.utils.parametrize.register_parametrization(holder, name, Doubled())
    return lambda: (holder.w_in, holder.w_out), [
        holder.parametrizations.w_in.original,
        holder.parametrizations.w_out.original,
    ]


def views(device):
    base = torch.randn(2, E, D, F, device=device, requires_grad=True)
    return lambda: (base[0].transpose(1, 2), base[1]), [base]


def tied(device):
    weight = torch.randn(E, F, D, device=device, requires_grad=True)
    return lambda: (weight, weight.transpose(1, 2)), [weight]


@pytest.mark.parametrize("weights", [parametrized, views, tied])
def test_demand_reaches_through_whatever_made_the_weights(device, weights):
    make, parameters = weights(device)
    leaves, experts = layer(device, biases=False)

    def run(wanted):
        w_in, w_out = make()
        loss = forward(leaves | {"w_in": w_in, "w_out": w_out}, experts).sum()
        return count(lambda: torch.autograd.grad(loss, wanted))

    assert run([leaves["x"]]) == INPUT
    assert run(parameters) == {"hidden_gradient": 1, "weight_gradient": 2}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_follow_demand(device, reentrant):
    # a reentrant one asks for all that requires grad
    leaves, experts = layer(device, weights_grad=not reentrant, biases=False)

    def run(x):
        return forward(leaves | {"x": x}, experts)

    loss = checkpoint(run, leaves["x"], use_reentrant=reentrant).sum()
    launched = count(
        lambda: loss.backward() if reentrant else torch.autograd.grad(loss, [leaves["x"]])
    )
    again = FORWARD | {"hidden_gradient": 1, "grouped_matmul": 3, "gather_sum": 2}
    assert launched == again | ({"gate_gradient": 1} if reentrant else {})


def kept(leaves, experts, **options):
    """(bytes kept that are no input, whether x was kept)."""
    inputs = {leaf.data_ptr() for leaf in leaves.values()} | {experts.data_ptr()}
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(leaves, experts, **options)
    own = sum(size for pointer, size in seen.items() if pointer not in inputs)
    return own, leaves["x"].data_ptr() in seen


INDEX_BYTES = 4 * (E + 1) + 3 * 4 * T * K  # offsets, row_token, row_slot, slot_row


def tile_bytes(device):
    seen = launches(lambda: forward(*layer(device)))
    (place,) = [x for x in seen if x.kernel.__name__ == "place_kernel"]
    return place.arguments["tiles"].nbytes


@pytest.mark.parametrize("trainable", [False, True])
def test_kept_are_pre_activations_gates_and_indices_and_x_for_its_weights_alone(device, trainable):
    own, keeps_x = kept(*layer(device, trainable))
    assert own == 4 * T * K * F + INDEX_BYTES + tile_bytes(device)
    assert keeps_x == trainable


@pytest.mark.parametrize("recompute", [False, True])
def test_pre_activations_live_on_unless_they_are_recomputed(device, recompute):
    leaves, experts = layer(device, False)
    with observe() as seen:
        y = forward(leaves, experts, recompute=recompute)
    (hidden,) = [
        StorageWeakRef(x.arguments["hidden"].untyped_storage()) for x in seen if applies(x, "gelu")
    ]
    seen.clear()
    assert hidden.expired() == recompute
    assert y.requires_grad


def test_recomputing_costs_one_product_more(device):
    leaves, experts = layer(device)
    loss = forward(leaves, experts, recompute=True).sum()
    launched = count(lambda: torch.autograd.grad(loss, [leaves["x"]]))
    assert launched == INPUT | {"grouped_matmul": 2}


@pytest.mark.parametrize("wanted", [[], ["b_out"]])
def test_nothing_is_kept_where_no_gradient_needs_it(device, wanted):
    leaves, experts = layer(device, False)
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    own, keeps_x = kept(leaves, experts)
    assert not keeps_x
    assert own == (INDEX_BYTES + tile_bytes(device) if wanted else 0)
