"""ConvNeXt, Swin and Mixers with experts compute what they did: twins of each library's model, and
the model itself where the library can be imported."""

import copy

import pytest
import staged_twins as staged
import torch
from torch import nn

from ironmoe.moe import Capacity, MoE, collect_aux_loss, upcycle
from ironmoe.moe.layers.dense_mlp import read_mlp

IMAGES = (2, 3, staged.SIDE, staged.SIDE)
# On the way through a twin: a patch of 3 · 4 · 4 numbers; in each of three blocks of width 12 seven
# rows of seven pixels or an attention of four products, an MLP of 12 and 24, and two norms; a head.
ROUNDINGS = 48 + 3 * (49 + 4 * 12 + (12 + 24) + 2 * 12) + 48 + 12

# name → the model, where its three blocks have their MLP
TWINS = {
    "timm convnext": (
        staged.TimmConvNeXt,
        ["stages.0.blocks.0.mlp", "stages.1.blocks.0.mlp", "stages.1.blocks.1.mlp"],
    ),
    "timm convnext, 1 × 1 convolutions": (
        lambda: staged.TimmConvNeXt(staged.ConvMlp),
        ["stages.0.blocks.0.mlp.moe", "stages.1.blocks.0.mlp.moe", "stages.1.blocks.1.mlp.moe"],
    ),
    "torchvision convnext": (
        staged.TorchvisionConvNeXt,
        ["features.1.0.block.3", "features.3.0.block.3", "features.3.1.block.3"],
    ),
    "timm swin": (
        staged.Swin,
        ["layers.0.blocks.0.mlp", "layers.1.blocks.0.mlp", "layers.1.blocks.1.mlp"],
    ),
    "torchvision swin": (
        staged.TorchvisionSwin,
        ["features.1.0.mlp", "features.3.0.mlp", "features.3.1.mlp"],
    ),
    "timm mixer": (staged.MlpMixer, [f"blocks.{i}.mlp_channels" for i in range(3)]),
    "timm resmlp": (
        lambda: staged.MlpMixer(staged.ResBlock),
        [f"blocks.{i}.mlp_channels" for i in range(3)],
    ),
}


def places(model):
    return [name for name, module in model.named_modules() if isinstance(module, MoE)]


def assert_same(model, sparse, images, terms, rounding):
    """Logits and the gradient of the images."""
    images = images.clone().requires_grad_()
    before, after = model(images), sparse(images)
    torch.testing.assert_close(after, before, rtol=0, atol=rounding(terms, before))
    ahead = torch.randn_like(before)
    gradients = [torch.autograd.grad(logits, images, ahead)[0] for logits in (before, after)]
    # the way there and back, with products of the numbers of both
    torch.testing.assert_close(*gradients, rtol=0, atol=rounding(4 * terms, gradients[0]))


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_staged_models_compute_the_same(name, dtype, rounding):
    make, expected = TWINS[name]
    model, images = make().to(dtype).eval(), torch.rand(IMAGES, dtype=dtype)
    sparse = upcycle(copy.deepcopy(model), 4, 2)
    assert places(sparse) == expected
    assert_same(model, sparse, images, ROUNDINGS, rounding)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("layers, chosen", [("every 2", [1]), ("last 1", [1]), ([0, -1], [0, 2])])
def test_blocks_are_counted_through_all_stages(name, layers, chosen):
    make, expected = TWINS[name]
    assert places(upcycle(make(), 2, layers=layers)) == [expected[i] for i in chosen]


@pytest.mark.parametrize("name", TWINS)
def test_other_stages_can_follow_later_and_all_train(name):
    make, expected = TWINS[name]
    model = upcycle(upcycle(make().train(), 3, layers=[2], noise=0.1), 2, layers=[0, 1], noise=0.1)
    assert places(model) == expected
    (model(torch.randn(16, *IMAGES[1:])).square().sum() + collect_aux_loss(model)).backward()
    for layer in (m for m in model.modules() if isinstance(m, MoE)):
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_options_that_look_at_one_image_refuse_tokens_on_two_axes():
    images = torch.rand(IMAGES)
    for options in (
        {"capacity": Capacity(1.0, images_per_group=1)},
        {"router": {"balance": "deepseek_sequence", "balance_weight": 0.1}},
    ):
        with pytest.raises(ValueError, match=r"x must have shape \(\w+, tokens, 8\) for"):
            upcycle(staged.Swin(), 4, **options)(images)
        # where pixels come from 1 × 1 convolutions, they are told as one sequence
        upcycle(staged.TimmConvNeXt(staged.ConvMlp), 4, **options)(images)


def test_stochastic_depth_stays_around_the_experts(rounding):
    model = staged.TimmConvNeXt(drop_path=0.5).train()
    images = torch.rand(IMAGES)
    sparse = upcycle(copy.deepcopy(model), 4, router={"noise_std": 0.0})
    outputs = []
    for twin in (model, sparse):
        torch.manual_seed(3)
        outputs.append(twin(images))
    torch.testing.assert_close(*outputs, rtol=0, atol=rounding(ROUNDINGS, outputs[0]))
    assert (outputs[0] - model.eval()(images)).abs().max() > 1e-3


def test_a_mixer_routes_patches_or_channels(rounding):
    model = staged.MlpMixer().eval()
    images = torch.rand(IMAGES)
    tokens = upcycle(copy.deepcopy(model), 4, mlp="mlp_tokens", layers=[1, 2])
    assert places(tokens) == ["blocks.1.mlp_tokens", "blocks.2.mlp_tokens"]
    assert tokens.blocks[1].mlp_tokens.dim == 16
    assert_same(model, tokens, images, ROUNDINGS, rounding)
    both = upcycle(tokens, 4, mlp="mlp_channels")
    assert len(places(both)) == 5
    assert_same(model, both, images, ROUNDINGS, rounding)
    with pytest.raises(
        ValueError, match=r"mlp must be the name .* got 'mlp', and it has blocks\.0"
    ):
        upcycle(model, 4, mlp="mlp")
    assert places(model) == []


def test_an_unknown_name_among_several_mlps_is_asked_for():
    model = staged.MlpMixer()
    for block in model.blocks:
        block.mlp_other = block.mlp_channels
        del block.mlp_channels
    with pytest.raises(
        ValueError, match=r"one known MLP each \(known are blocks\.0\.mlp_tokens.*mlp='…' names"
    ):
        upcycle(model, 4)
    assert len(places(upcycle(model, 4, mlp="mlp_other"))) == 3


def assert_refused(model, message):
    before = list(model.modules())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        upcycle(model, 4)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_what_mixes_tokens_between_the_layers_is_refused_by_name():
    assert_refused(
        staged.TimmConvNeXt(staged.GrnMlp),
        r"stages\.0\.blocks\.0\.mlp \(GrnMlp\) holds more .* grn \(GlobalResponseNorm\)",
    )
    assert_refused(
        staged.MlpMixer(staged.SpatialGatingBlock),
        r"blocks\.0\.mlp_channels \(GatedMlp\) holds more than .*gate",
    )


class Inline(nn.Module):
    """A block with the names of transformers' ConvNeXt, and something else between the layers."""

    def __init__(self, between, layer_scale=1.0):
        super().__init__()
        self.dwconv, self.layernorm = staged.depthwise(8), nn.LayerNorm(8)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.between, self.layer_scale = between, layer_scale

    def forward(self, x):
        y = self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.between(self.act(self.pwconv1(y)))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


@pytest.mark.parametrize("layer_scale", [1.0, 1e-6])
def test_a_block_that_does_more_between_its_layers_is_refused(layer_scale):
    called = "must call pwconv1, act, pwconv2 once each .* got pwconv1 \\(Linear\\), act \\(GELU\\)"

    def with_norm():
        return nn.Sequential(Inline(nn.Sequential(staged.GlobalResponseNorm(16)), layer_scale))

    assert_refused(with_norm(), rf"0 \(Inline\) {called}, between \(Sequential\), between\.0 \(Gl")
    assert_refused(nn.Sequential(Inline(lambda x: 2 * x, layer_scale)), r"computes something else")
    with torch.device("meta"):
        on_meta = with_norm()
    assert_refused(on_meta, called)
    upcycle(nn.Sequential(Inline(lambda x: x, layer_scale)), 4)


def test_a_trial_leaves_modes_and_random_numbers_as_they_were():
    blocks = Inline(nn.Dropout(0.0)).train(), Inline(nn.Dropout(0.5)).train()
    for block in blocks:
        block.dwconv.eval()
    modes = [module.training for block in blocks for module in block.modules()]
    state = torch.get_rng_state()
    read_mlp(blocks[0])
    with pytest.raises(ValueError, match=r"between \(Dropout\)"):
        read_mlp(blocks[1])
    modules = [module for block in blocks for module in block.modules()]
    assert [module.training for module in modules] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules)
    assert state.equal(torch.get_rng_state())


def test_squeeze_and_excitation_is_no_mlp():
    """It has two 1 × 1 convolutions by the same names, and is narrow in the middle."""
    model = staged.TimmConvNeXt()
    for stage in model.stages:
        for block in stage.blocks:
            dim = block.gamma.numel()
            block.shortcut.se = staged.ConvMlp(dim, dim // 4)
    assert len(places(upcycle(model, 2))) == 3


def library(name):
    try:
        return __import__(name, fromlist=["models"])
    # timm needs torchvision, which fails in many ways beside a torch it was not built for
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def timm_convnext(**options):
    return library("timm.models").ConvNeXt(
        depths=(1, 2, 1, 1), dims=(8, 12, 16, 24), num_classes=5, ls_init_value=0.5, **options
    )


LIBRARIES = {
    "timm convnext": timm_convnext,
    "timm convnext, 1 × 1 convolutions": lambda: timm_convnext(conv_mlp=True),
    "timm swin": lambda: library("timm.models").SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2)
    ),
    "timm mixer": lambda: library("timm.models").MlpMixer(
        num_classes=5, img_size=32, patch_size=8, num_blocks=3, embed_dim=16
    ),
    "torchvision convnext": lambda: library("torchvision.models").convnext.ConvNeXt(
        [
            library("torchvision.models").convnext.CNBlockConfig(8, 12, 1),
            library("torchvision.models").convnext.CNBlockConfig(12, None, 2),
        ],
        layer_scale=0.5,
    ),
    "torchvision swin": lambda: library("torchvision.models").SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=[4, 4]
    ),
    "torchvision vit": lambda: library("torchvision.models").VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_models_of_the_libraries_themselves_compute_the_same(name, rounding):
    model = LIBRARIES[name]().eval()
    sparse = upcycle(copy.deepcopy(model), 4, 2, layers="every 2")
    assert places(sparse)
    assert_same(model, sparse, torch.rand(2, 3, 32, 32), 4 * ROUNDINGS, rounding)
