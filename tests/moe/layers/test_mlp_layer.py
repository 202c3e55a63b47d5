import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from ironmoe.moe import MoE, collect_aux_loss, trace_routing
from ironmoe.moe.layers.timm import MoEMlp

as_mlp_layer = MoE.as_mlp_layer

SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}


class Block(nn.Module):
    """Hands its mlp_layer what timm's Block does."""

    def __init__(self, dim, mlp_layer, act_layer=nn.GELU, mlp_ratio=4.0, device=None, dtype=None):
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=None,
            bias=True,
            drop=0.0,
            device=device,
            dtype=dtype,
        )

    def forward(self, x):
        return x + self.mlp(self.norm2(x))


def test_a_block_gets_experts_of_its_sizes_under_the_names_of_its_mlp():
    block = Block(12, as_mlp_layer(4, 2), mlp_ratio=2.0)
    assert {name: tuple(p.shape) for name, p in block.mlp.named_parameters(prefix="mlp")} == {
        "mlp.router.weight": (4, 12),
        "mlp.fc1.weight": (4, 24, 12),
        "mlp.fc1.bias": (4, 24),
        "mlp.fc2.weight": (4, 12, 24),
        "mlp.fc2.bias": (4, 12),
    }
    x = torch.randn(2, 5, 12, requires_grad=True)
    y = block(x)
    (y.square().sum() + collect_aux_loss(block)).backward()
    assert y.shape == x.shape and all(p.grad is not None for p in block.parameters())


def test_it_computes_what_the_moe_of_the_same_weights_does():
    layer = as_mlp_layer(4, 2, router={"renormalize": True})(12, 20).double().eval()
    plain = MoE(12, 20, 4, 2, dtype=torch.float64).eval()
    plain.load_state_dict(layer.state_dict())
    plain.router.renormalize = True
    x = torch.randn(3, 12, dtype=torch.float64)
    assert isinstance(layer, MoE) and layer(x).equal(plain(x))


def test_every_block_gets_a_router_of_its_own():
    layer = as_mlp_layer(4, 2)
    blocks = nn.Sequential(Block(12, layer), Block(16, layer))
    assert blocks[0].mlp.router.weight.shape == (4, 12) and blocks[1].mlp.router.weight.shape == (
        4,
        16,
    )


@pytest.mark.parametrize(
    "act_layer, activation",
    [
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU, "relu"),
        (lambda: nn.SiLU(inplace=True), "silu"),
    ],
)
def test_the_act_layer_names_the_activation(act_layer, activation):
    assert Block(8, as_mlp_layer(2), act_layer).mlp.activation == activation


def test_a_named_activation_may_be_gated():
    layer = as_mlp_layer(2, activation="swiglu")(8, 12, act_layer=nn.Tanh)
    assert layer.activation == "swiglu" and layer.fc1.weight.shape == (2, 24, 8)


def test_options_reach_router_and_layer():
    layer = as_mlp_layer(4, 3, router={"noise_std": 0.5}, recompute=True)(
        8, bias=(False, False), dtype=torch.bfloat16
    )
    assert (layer.router.top_k, layer.router.noise_std, layer.recompute) == (3, 0.5, True)
    assert layer.fc1.bias is None and layer.fc2.bias is None and layer.fc1.weight.shape == (4, 8, 8)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"out_features": 9}, "out_features must be None or in_features = 8, got 9"),
        ({"norm_layer": nn.LayerNorm}, "norm_layer must be None.*LayerNorm"),
        ({"drop": 0.1}, r"drop must be 0.*got 0\.1: put an nn\.Dropout behind"),
        ({"drop": (0.0, 0.1)}, r"drop must be 0.*got \(0\.0, 0\.1\)"),
        ({"use_conv": True}, "use_conv must be False"),
        ({"bias": (True, False)}, r"bias must be the same for both layers, got \(True, False\)"),
        ({"act_layer": nn.Tanh}, r"act_layer must make one of gelu, .*got Tanh\(\)"),
    ],
)
def test_what_experts_do_not_have_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        as_mlp_layer(2)(8, **arguments)


@pytest.mark.parametrize(
    "error, options, message",
    [
        (
            ValueError,
            {"num_experts": 2, "top_k": 3},
            "top_k must be from 1 to num_experts = 2, got 3",
        ),
        (ValueError, {"num_experts": 2, "activation": "tanh"}, "activation must be one of"),
        (ValueError, {"num_experts": 2, "precision": "low"}, "precision"),
        (TypeError, {"num_experts": 2, "experts": 3}, "experts"),
        (TypeError, {"num_experts": 2, "router": {"renormalise": True}}, "renormalise"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_built(error, options, message):
    with pytest.raises(error, match=message):
        as_mlp_layer(**options)


def test_layer_and_models_can_be_copied_and_pickled():
    layer = as_mlp_layer(4, 2, router={"renormalize": True})
    block = Block(8, layer)
    moe, x = block.mlp.eval(), torch.randn(3, 8)
    assert isinstance(moe, MoEMlp) and moe.router.renormalize
    saved = io.BytesIO()
    torch.save(moe, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(block).mlp,
        pickle.loads(pickle.dumps(moe)),
        torch.load(saved, weights_only=False),
    ):
        assert twin(x).equal(moe(x))


@pytest.fixture
def timm():
    try:
        import timm
        import timm.optim
    # timm needs torchvision, which fails in many ways beside a torch it was not built for
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


def test_timm_vit_with_experts_trains_and_is_traced(timm):
    model = timm.models.VisionTransformer(**SIZES, mlp_layer=as_mlp_layer(4, 2))
    images = torch.rand(8, 3, 16, 16)
    (
        nn.functional.cross_entropy(model(images), torch.arange(8) % 5) + collect_aux_loss(model)
    ).backward()
    assert all(p.grad is not None for p in model.parameters())
    with trace_routing(model.eval()) as trace:
        model(images)
    assert len(trace.layers) == 2
    model.set_grad_checkpointing()
    model.train()(images).sum().backward()


@pytest.mark.parametrize("weight_init", ["", "jax", "moco", "reset"])
def test_timm_initialises_every_expert_and_keeps_them_different(timm, weight_init):
    model = timm.models.VisionTransformer(
        **SIZES, mlp_layer=as_mlp_layer(4, 2), weight_init=weight_init
    )
    for reset in (False, True):
        if reset:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(math.nan)
            model.init_weights(mode=weight_init, needs_reset=True)
        for block in model.blocks:
            for parameter in (block.mlp.fc1.weight, block.mlp.fc2.weight, block.mlp.router.weight):
                assert parameter.isfinite().all() and parameter.std() > 0.01
            assert not block.mlp.fc1.weight[0].equal(block.mlp.fc1.weight[1])
            assert (block.mlp.fc1.bias == 0).all()


def test_timm_scales_the_second_layer_of_every_expert_by_depth(timm):
    plain, fixed = (
        timm.models.VisionTransformer(**SIZES, mlp_layer=as_mlp_layer(4, 2), fix_init=fix_init)
        for fix_init in (False, True)
    )
    for depth, (a, b) in enumerate(zip(plain.blocks, fixed.blocks, strict=True), start=1):
        bounds = a.mlp.fc2.weight.abs().amax((1, 2)), b.mlp.fc2.weight.abs().amax((1, 2))
        torch.testing.assert_close(
            bounds[0] / bounds[1], torch.full((4,), math.sqrt(2 * depth)), rtol=0.02, atol=0
        )


def test_timm_decays_the_weights_of_experts_and_not_their_biases(timm):
    model = timm.models.VisionTransformer(**SIZES, mlp_layer=as_mlp_layer(4, 2))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = timm.optim.param_groups_weight_decay(model, weight_decay=0.05)
    decay = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}
    for block in range(2):
        for name, wanted in [
            ("router.weight", 0.05),
            ("fc1.weight", 0.05),
            ("fc2.weight", 0.05),
            ("fc1.bias", 0),
            ("fc2.bias", 0),
        ]:
            assert f"blocks.{block}.mlp.{name}" in decay[wanted]


def test_timm_checkpoints_load(timm, tmp_path):
    layer, images = as_mlp_layer(4, 2), torch.rand(2, 3, 16, 16)
    model, other = (
        timm.models.VisionTransformer(**SIZES, mlp_layer=layer).eval() for _ in range(2)
    )
    torch.save(model.state_dict(), tmp_path / "model.pth")
    timm.models.load_checkpoint(other, str(tmp_path / "model.pth"))
    assert other(images).equal(model(images)) and copy.deepcopy(model)(images).equal(model(images))
    assert pickle.loads(pickle.dumps(model))(images).equal(model(images))
