import copy
import pickle

import pytest
import torch
import twins
from torch import nn

from ironmoe.moe import MoE, VMoE, collect_aux_loss
from ironmoe.moe.adapters.upcycle import upcycle
from ironmoe.moe.layers.dense_mlp import read_mlp
from ironmoe.moe.layers.mlp import Mlp

DIM, HIDDEN = twins.DIM, twins.HIDDEN
TimmMlp, TimmGluMlp, MLPBlock, Encoder = (
    twins.TimmMlp,
    twins.TimmGluMlp,
    twins.MLPBlock,
    twins.Encoder,
)

MLPS = {
    "timm": TimmMlp,
    "timm, tanh": lambda: TimmMlp(lambda: nn.GELU(approximate="tanh")),
    "timm, relu in place": lambda: TimmMlp(lambda: nn.ReLU(inplace=True)),
    "timm, silu": lambda: TimmMlp(nn.SiLU),
    "timm, no first bias": lambda: TimmMlp(bias=(False, True)),
    "timm, no second bias": lambda: TimmMlp(bias=(True, False)),
    "timm, no bias": lambda: TimmMlp(bias=(False, False)),
    "timm glu": lambda: TimmGluMlp(nn.SiLU, gate_last=False),
    "timm glu, gate last": lambda: TimmGluMlp(nn.GELU, gate_last=True),
    "timm swiglu": twins.TimmSwiGLU,
    "torchvision": MLPBlock,
    "dinov2 swiglu": twins.Dinov2SwiGLUFFN,
    "projections": lambda: twins.Projections(gated=False),
    "gated projections": lambda: twins.Projections(gated=True, bias=False),
    "ironmoe": lambda: Mlp(DIM, HIDDEN),
    "ironmoe, gated": lambda: Mlp(DIM, HIDDEN, "clamped_swiglu"),
}


@pytest.fixture(params=MLPS)
def mlp(request):
    return MLPS[request.param]().double().eval()


def gates_of(moe, x):
    return moe.router(x.flatten(0, -2)).routing.gates.sum(-1).view(*x.shape[:-1], 1)


@pytest.mark.parametrize("top_k, renormalize", [(2, True), (1, True), (4, False)])
@pytest.mark.filterwarnings("ignore:top_k=1 and renormalize")
def test_an_mlp_of_any_library_computes_the_same_when_gates_sum_to_one(mlp, top_k, renormalize):
    x = 3 * torch.randn(2, 5, DIM, dtype=torch.float64)
    moe = upcycle(copy.deepcopy(mlp), 4, top_k, renormalize=renormalize)
    assert isinstance(moe, MoE) and not moe.training
    torch.testing.assert_close(moe(x), mlp(x), rtol=1e-12, atol=1e-12)


def test_other_gates_shrink_the_output_by_their_sum(mlp):
    x = torch.randn(2, 5, DIM, dtype=torch.float64)
    moe = upcycle(copy.deepcopy(mlp), 4, 2, renormalize=False)
    total = gates_of(moe, x)
    assert (total < 0.9).all()
    torch.testing.assert_close(moe(x), total * mlp(x), rtol=1e-12, atol=1e-12)


def test_every_expert_is_a_copy_and_the_router_is_new_and_small():
    mlp = TimmMlp()
    moe = upcycle(mlp, 5, 2)
    assert {name: tuple(p.shape) for name, p in moe.named_parameters()} == {
        "router.weight": (5, DIM),
        "fc1.weight": (5, HIDDEN, DIM),
        "fc1.bias": (5, HIDDEN),
        "fc2.weight": (5, DIM, HIDDEN),
        "fc2.bias": (5, DIM),
    }
    for name, value in mlp.named_parameters():
        assert (moe.get_parameter(name) == value).all()
        assert (
            moe.get_parameter(name).untyped_storage().data_ptr()
            != value.untyped_storage().data_ptr()
        )
    assert 0.01 < moe.router.weight.std() < 0.03
    assert not moe.router.weight.equal(upcycle(mlp, 5, 2).router.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_device_training_and_requires_grad_stay(dtype):
    mlp = TimmMlp().to(dtype).train()
    mlp.fc1.requires_grad_(False)
    with torch.no_grad():
        moe = upcycle(mlp, 3, 2)
    assert moe.training and {p.dtype for p in moe.parameters()} == {dtype}
    assert [name for name, p in moe.named_parameters() if not p.requires_grad] == [
        "fc1.weight",
        "fc1.bias",
    ]
    frozen = upcycle(twins.TimmSwiGLU().requires_grad_(False).eval(), 3, 2)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        assert upcycle(twins.TimmSwiGLU(), 3, 2).fc1.weight.requires_grad


def test_noise_is_a_fraction_of_each_matrix_and_differs_between_experts():
    mlp = TimmMlp(dim=64, hidden=96)
    nn.init.normal_(mlp.fc2.weight, std=5.0)
    torch.manual_seed(1)
    moe = upcycle(mlp, 4, 2, noise=0.1)
    for name in ("fc1", "fc2"):
        weight = mlp.get_submodule(name).weight
        noise = moe.get_submodule(name).weight - weight
        assert (noise.std((1, 2)) / weight.std() - 0.1).abs().max() < 0.005
        correlation = torch.corrcoef(noise.flatten(1))
        assert (correlation - torch.eye(4)).abs().max() < 0.06
        assert (moe.get_submodule(name).bias == mlp.get_submodule(name).bias).all()
    torch.manual_seed(1)
    assert upcycle(mlp, 4, 2, noise=0.1).fc1.weight.equal(moe.fc1.weight)


def roundings(depth):
    """On the way through an Encoder: products of width DIM and HIDDEN, two norms, and what one does
    with their results."""
    a_block = DIM + (DIM + HIDDEN) + 2 * DIM
    return depth * a_block + DIM + (DIM + HIDDEN)


def moe_layers(model):
    return [int(name.split(".")[1]) for name, m in model.named_modules() if isinstance(m, MoE)]


@pytest.mark.parametrize(
    "layers, depth, chosen",
    [
        ("all", 3, [0, 1, 2]),
        ("every 1", 3, [0, 1, 2]),
        ("every 2", 6, [1, 3, 5]),
        ("every 2", 5, [1, 3]),
        ("every 3", 6, [2, 5]),
        ("last 1", 6, [5]),
        ("last 2", 6, [3, 5]),
        # the published V-MoE S/32, Last 2, has 8 blocks and experts in 5 and 7
        ("last 2", 12, [9, 11]),
        ("last 2", 8, [5, 7]),
        ("last 2", 7, [3, 5]),
        ([0, -1, 1, 5], 6, [0, 1, 5]),
        (range(2, 4), 6, [2, 3]),
    ],
)
def test_layers_are_placed_as_in_vmoe(layers, depth, chosen, rounding):
    model = Encoder(depth)
    head, x = model.head, torch.randn(2, 3, DIM)
    before = model(x)
    assert upcycle(model, 2, 2, layers=layers) is model
    assert moe_layers(model) == chosen and model.head is head
    torch.testing.assert_close(model(x), before, rtol=0, atol=rounding(roundings(depth), before))


def test_the_remaining_layers_can_follow_later(rounding):
    model = Encoder(4)
    before = model(x := torch.randn(2, 3, DIM))
    upcycle(model, 4, layers="last 1")
    first = model.blocks[3].mlp
    upcycle(model, 2, 2, layers=[1])
    assert moe_layers(model) == [1, 3] and model.blocks[3].mlp is first
    torch.testing.assert_close(model(x), before, rtol=0, atol=rounding(roundings(4), before))
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp is an MoE already"):
        upcycle(model, 2, layers="last 2")


def test_chains_inside_a_block_and_around_the_model_do_not_matter():
    for wrap in (
        lambda model: nn.Sequential(model),
        lambda model: nn.ModuleList([nn.Sequential(nn.Identity(), model)]),
    ):
        model = wrap(Encoder(2, mlp=MLPBlock))
        upcycle(model, 2)
        assert sum(isinstance(m, MoE) for m in model.modules()) == 2
    single = nn.Sequential(nn.Sequential(twins.Block(TimmMlp())))
    assert isinstance(upcycle(single, 2)[0][0].mlp, MoE)


def test_an_mlp_to_another_width_is_no_expert():
    """As in the position biases of attention, beside which a block has one MLP."""
    model = Encoder(2)
    for block in model.blocks:
        block.attn = nn.Sequential(TimmMlp(out=3), nn.Linear(3, DIM))
    upcycle(model, 2)
    assert moe_layers(model) == [0, 1]


def test_vmoe_without_experts_gets_them(rounding):
    dim, depth, mlp_dim, patch = 16, 4, 32, 3 * 4 * 4
    dense = VMoE(8, 4, dim, depth, 2, mlp_dim, 5).eval()
    nn.init.normal_(dense.head.weight)
    images = torch.rand(3, 3, 8, 8)
    before = dense(images)
    # attention: two products, and one between its heads; MLP; norms
    a_block = 3 * dim + (dim + mlp_dim) + 2 * dim
    atol = rounding(patch + depth * a_block + dim, before)
    torch.testing.assert_close(
        upcycle(dense, 4, layers="every 2")(images), before, rtol=0, atol=atol
    )
    assert moe_layers(dense) == [1, 3] and dense.blocks[1].mlp.activation == "gelu_tanh"
    assert pickle.loads(pickle.dumps(dense))(images).equal(dense(images))


def test_gradients_reach_every_expert_and_the_router():
    model = upcycle(Encoder(2), 4, 2, noise=0.1, layers=[1])
    (model(torch.randn(64, 3, DIM)).square().sum() + collect_aux_loss(model)).backward()
    moe = model.blocks[1].mlp
    for parameter in moe.parameters():
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all()


def test_equal_experts_leave_the_router_to_the_auxiliary_losses():
    moe = upcycle(TimmMlp().double(), 4, 2)
    x = torch.randn(32, DIM, dtype=torch.float64)
    (of_output,) = torch.autograd.grad(moe(x).square().sum(), moe.router.weight)
    moe(x)
    (of_loss,) = torch.autograd.grad(moe.aux_loss, moe.router.weight)
    assert of_output.abs().max() < 1e-12 and of_loss.abs().max() > 1e-6


def test_options_reach_the_router_and_the_layer():
    moe = upcycle(TimmMlp(), 4, 3, router={"noise_std": 0.0, "z_weight": 0.1}, recompute=True)
    assert (
        moe.router.top_k,
        moe.router.renormalize,
        moe.router.noise_std,
        moe.router.z_weight,
    ) == (3, True, 0.0, 0.1)
    assert moe.recompute


def test_a_checkpoint_loads_into_a_model_upcycled_the_same_way():
    model = upcycle(Encoder(4), 3, 2, layers="every 2", noise=0.2).eval()
    with torch.device("meta"):
        other = Encoder(4)
    upcycle(other, 3, 2, layers="every 2").eval()
    assert all(p.is_meta for p in other.parameters())
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 3, DIM)
    for twin in (other, copy.deepcopy(model)):
        assert twin(x).equal(model(x))


class Skipping(TimmMlp):
    def forward(self, x):
        return x + super().forward(x)


class Pickier(TimmMlp):
    def forward(self, x, condition):
        return super().forward(x)


class Scaled(TimmMlp):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(DIM))


class Half(twins.TimmSwiGLU):
    def __init__(self):
        super().__init__()
        self.fc1_x.bias = None


class Uneven(TimmMlp):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(DIM, DIM)


class Functional(Mlp):
    activation = None

    def __init__(self):
        super().__init__(DIM, HIDDEN)
        self.activation = torch.tanh


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: TimmMlp(drop=0.1),
            r"drop1 with p = 0\.1, drop2 with p = 0\.1.*set it to 0.*behind the MLP",
        ),
        (lambda: MLPBlock(dropout=0.5), r"MLPBlock\) has dropout, 2 with p = 0\.5"),
        (lambda: TimmMlp(norm=nn.LayerNorm), r"holds more than two .*norm \(LayerNorm\)"),
        (
            lambda: TimmMlp(nn.Tanh),
            r"activation act, Tanh\(\), which computes none of gelu, gelu_tanh, quick_gelu, relu",
        ),
        (lambda: TimmMlp(nn.PReLU), r"holds more than .* act\.weight"),
        (lambda: TimmMlp(nn.ReLU6), r"act, ReLU6\(\), which computes none"),
        (lambda: TimmMlp(lambda: nn.LeakyReLU(1e-3)), r"act, LeakyReLU"),
        (
            lambda: TimmGluMlp(nn.Sigmoid, True),
            r"act, Sigmoid\(\), which computes none of swiglu, geglu",
        ),
        (Skipping, r"\(Skipping\) computes something else than its layers and gelu say"),
        (Pickier, r"\(Pickier\) cannot be run on tokens of shape \(1, 4, 12\).*condition"),
        (Scaled, "gamma"),
        (Functional, "calls an activation that is not one of its modules"),
        (Half, "biases on both of fc1_g and fc1_x or on none"),
        (Uneven, "as many inputs as the first has outputs, or half: got 16 and 12"),
    ],
)
def test_an_mlp_that_cannot_be_an_expert_is_named_and_nothing_changes(make, message):
    model = Encoder(3)
    model.blocks[2].mlp = make()
    modules = list(model.modules())
    with pytest.raises(
        ValueError,
        match=rf"(?s)blocks\.2\.mlp.*{message}.*Supported are two nn.Linear layers \(fc1 → fc2",
    ):
        upcycle(model, 2)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    upcycle(model, 2, layers=[0, 1])


def test_what_is_no_transformer_is_named():
    with pytest.raises(
        ValueError, match=r"head \(Linear\) is not a known two-layer MLP: it holds no modules"
    ):
        read_mlp(nn.Linear(3, 3), "head")
    with pytest.raises(ValueError, match=r"Linear has no .*no modules.*fc1 → fc2"):
        upcycle(nn.Linear(3, 3), 2)
    unknown = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))
    with pytest.raises(
        ValueError, match=r"Sequential has no .*, only 0 \(Linear\), 1 \(ReLU\), 2 \(Linear\)"
    ):
        upcycle(unknown, 2)
    with pytest.raises(
        ValueError,
        match=r"Encoder has no .*, only blocks of Block with norm1 \(LayerNorm\).*mlp "
        r"\(Sequential\)",
    ):
        upcycle(Encoder(2, mlp=lambda: unknown), 2)


def test_several_towers_are_listed():
    model = nn.ModuleDict({"text": Encoder(3), "vision": Encoder(2)})
    message = (
        r"text\.blocks \(3 blocks\), vision\.blocks \(2 blocks\)\. Pass one: "
        r"upcycle\(model\.vision\.blocks"
    )
    with pytest.raises(ValueError, match=message):
        upcycle(model, 2)
    upcycle(model["vision"].blocks, 2)
    assert [name for name, m in model.named_modules() if isinstance(m, MoE)] == [
        "vision.blocks.0.mlp",
        "vision.blocks.1.mlp",
    ]


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (ValueError, {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        (TypeError, {"num_experts": 2.0}, r"num_experts must be a whole number, got 2\.0"),
        (TypeError, {"top_k": True}, "top_k must be a whole number, got True"),
        (ValueError, {"top_k": 3}, "top_k must be from 1 to num_experts = 2, got 3"),
        (ValueError, {"noise": -0.1}, r"noise must be .*got -0\.1"),
        (ValueError, {"noise": float("nan")}, "noise must be .*got nan"),
        (
            ValueError,
            {"layers": "some"},
            r"layers must be \"all\", \"every n\".*from -4 to 3, got 'some'",
        ),
        (ValueError, {"layers": "every 0"}, "layers must be .*got 'every 0'"),
        (
            ValueError,
            {"layers": "every 5"},
            "layers must name at least one of the 4 blocks, got 'every 5'",
        ),
        (ValueError, {"layers": "last 3"}, "asks for more than the 2 odd blocks of 4"),
        (ValueError, {"layers": [4]}, "from -4 to 3, got 4"),
        (TypeError, {"layers": 1}, "layers must be .*got 1"),
        (ValueError, {"layers": [1.0]}, r"got 1\.0"),
        (ValueError, {"layers": []}, r"at least one of the 4 blocks, got \[\]"),
        (TypeError, {"router": {"renormalise": True}}, "renormalise"),
        (TypeError, {"router": {"renormalize": True}}, "renormalize"),
        (TypeError, {"activation": "relu"}, "activation"),
        (ValueError, {"precision": "low"}, "precision"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_changes(error, arguments, message):
    model = Encoder(4)
    with pytest.raises(error, match=f"(?s){message}"):
        upcycle(model, **{"num_experts": 2, "top_k": 1, **arguments})
    assert moe_layers(model) == []
