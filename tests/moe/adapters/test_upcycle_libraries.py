import copy

import pytest
import torch
from torch import nn

from ironmoe.moe import MoE, collect_aux_loss
from ironmoe.moe.adapters.upcycle import upcycle

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
}
IMAGES = {"image_size": 16, "patch_size": 8, **SIZES}
# On the way through a model: a patch of 3 · 8 · 8 numbers, products of the blocks, norms, and a
# head.
ROUNDINGS = 3 * 8 * 8 + 4 * (3 * 32 + (32 + 48) + 2 * 32) + 2 * 32
FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "vit, gelu_new": ("ViTModel", "ViTConfig", {"hidden_act": "gelu_new"}),
    "vit, gelu_fast": ("ViTModel", "ViTConfig", {"hidden_act": "gelu_fast"}),
    "vit, python's gelu": ("ViTModel", "ViTConfig", {"hidden_act": "gelu_python"}),
    "vit, relu2": ("ViTModel", "ViTConfig", {"hidden_act": "relu2"}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {}),
    "beit": ("BeitForImageClassification", "BeitConfig", {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {}),
    "dinov2, swiglu": ("Dinov2ForImageClassification", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {}),
    "dinov3, gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {"hidden_act": "gelu"}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "dpt, split in two modules": ("DPTModel", "DPTConfig", {"backbone_out_indices": [0, 1, 2, 3]}),
    "videomae, split in two modules": ("VideoMAEModel", "VideoMAEConfig", {"num_frames": 2}),
}


def build(family):
    transformers = pytest.importorskip("transformers")
    model, config, options = FAMILIES[family]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    pixels = (
        torch.rand(2, 2, 3, 16, 16) if family.startswith("videomae") else torch.rand(2, 3, 16, 16)
    )
    return getattr(transformers, model)(
        getattr(transformers, config)(**IMAGES, **options)
    ).eval(), pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_models_compute_the_same_when_gates_sum_to_one(family, rounding):
    model, pixels = build(family)
    head = [name for name, _ in model.named_modules() if name.endswith("head.mlp")]
    for dtype in (torch.float32, torch.float64):
        model, pixels = model.to(dtype), pixels.to(dtype)
        with torch.no_grad():
            before = model(pixel_values=pixels)[0]
            for top_k, renormalize in [(2, True), (4, False), (2, False)]:
                moe = upcycle(
                    copy.deepcopy(model), 4, top_k, layers="every 2", renormalize=renormalize
                )
                error = (moe(pixel_values=pixels)[0] - before).abs().max()
                if renormalize or top_k == 4:
                    # transformers writes √(2/π) there with ten digits
                    written = 1e-11 if "gelu_fast" in family else 0
                    assert error <= rounding(ROUNDINGS, before) + written * before.abs().max()
                # new weights are small: in float32 what is lost may be as small as the rounding
                elif dtype == torch.float64:
                    assert error > 1e-5
    found = [name for name, m in moe.named_modules() if isinstance(m, MoE)]
    assert [name.split(".")[-2:] for name in found] == [
        [i, "intermediate" if "split" in family else "mlp"] for i in "13"
    ]
    assert all(not isinstance(moe.get_submodule(name), MoE) for name in head)


@pytest.mark.parametrize("family", ["vit", "dinov2, swiglu", "videomae, split in two modules"])
def test_transformers_models_can_be_trained_and_saved(family):
    model, pixels = build(family)
    model = upcycle(model.train(), 4, 2, layers="last 1", noise=0.1)
    pixels = pixels.repeat(8, *[1] * (pixels.ndim - 1)) + 0.3 * torch.randn(16, *pixels.shape[1:])
    (model(pixel_values=pixels)[0].square().sum() + collect_aux_loss(model)).backward()
    moe = next(m for m in model.modules() if isinstance(m, MoE))
    assert all((p.grad.flatten(1).abs().sum(1) > 0).all() for p in moe.parameters())
    dense, _ = build(family)
    twin = upcycle(dense, 4, 2, layers="last 1")
    twin.load_state_dict(model.state_dict())
    model.eval()
    with torch.no_grad():
        assert twin(pixel_values=pixels)[0].equal(model(pixel_values=pixels)[0])


SWIN = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24], "layer_scale_init_value": 0.5}
WIDTHS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
# name → the model, its configuration, and in how many of its blocks "every 2" puts experts
STAGED = {
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", CONVNEXT, 2),
    "dinov3 convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", CONVNEXT, 2),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN, 1),
    "swin v2": ("Swinv2ForImageClassification", "Swinv2Config", SWIN, 1),
    "donut swin": ("DonutSwinModel", "DonutSwinConfig", SWIN, 1),
    "focalnet": ("FocalNetModel", "FocalNetConfig", {"embed_dim": 8, "depths": [1, 2]}, 1),
    "pvt": ("PvtModel", "PvtConfig", {**WIDTHS, "num_attention_heads": [1, 2, 3, 4]}, 2),
}


def build_staged(name):
    transformers = pytest.importorskip("transformers")
    model, config, options, _ = STAGED[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    return getattr(transformers, model)(
        getattr(transformers, config)(image_size=32, patch_size=4, **options)
    ).eval()


@pytest.mark.parametrize("name", STAGED)
def test_transformers_models_in_stages_compute_the_same(name, rounding):
    model = build_staged(name)
    # five blocks of width 24 and less, each with a convolution of 49 pixels or four products
    terms = 3 * 4 * 4 + 5 * (49 + 4 * 24 + (24 + 96) + 2 * 24)
    for dtype in (torch.float32, torch.float64):
        model, pixels = model.to(dtype), torch.rand(2, 3, 32, 32, dtype=dtype, requires_grad=True)
        sparse = upcycle(copy.deepcopy(model), 4, 2, layers="every 2")
        assert sum(isinstance(m, MoE) for m in sparse.modules()) == STAGED[name][-1]
        before, after = model(pixels)[0], sparse(pixels)[0]
        torch.testing.assert_close(after, before, rtol=0, atol=rounding(terms, before))
        ahead = torch.randn_like(before)
        gradients = [torch.autograd.grad(y, pixels, ahead)[0] for y in (before, after)]
        # the way there and back, with products of the numbers of both
        torch.testing.assert_close(*gradients, rtol=0, atol=rounding(4 * terms, gradients[0]))


@pytest.mark.parametrize(
    "model, config, message",
    [
        (
            "ConvNextV2Model",
            "ConvNextV2Config",
            r"stages\.0\.layers\.0 \(ConvNextV2Layer\) must call .* grn \(ConvNextV2GRN\)",
        ),
        ("PvtV2Model", "PvtV2Config", r"layers\.0.*mlp .* holds more than .*dwconv"),
    ],
)
def test_transformers_models_that_mix_tokens_inside_an_mlp_are_refused(model, config, message):
    transformers = pytest.importorskip("transformers")
    options = {**WIDTHS, "num_attention_heads": [1, 2, 3, 4]} if "Pvt" in model else WIDTHS
    dense = getattr(transformers, model)(getattr(transformers, config)(**options))
    before = list(dense.modules())
    with pytest.raises(ValueError, match=message):
        upcycle(dense, 4)
    assert all(a is b for a, b in zip(dense.modules(), before, strict=True))


def test_the_quick_gelu_of_clip(rounding):
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES)).eval()
    pixels = torch.rand(2, 3, 16, 16)
    before = model(pixel_values=pixels)[0]
    upcycle(model, 4, 2)
    assert {m.activation for m in model.modules() if isinstance(m, MoE)} == {"quick_gelu"}
    torch.testing.assert_close(
        model(pixel_values=pixels)[0], before, rtol=0, atol=rounding(ROUNDINGS, before)
    )


def test_an_activation_without_a_kernel_is_named():
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGES, hidden_act="mish"))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp \(CLIPMLP\).*Mish\w*\(\), which computes none of gelu"
    ):
        upcycle(model, 4)


def test_clip_is_upcycled_by_tower(rounding):
    transformers = pytest.importorskip("transformers")
    text = {**SIZES, "hidden_act": "gelu", "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**IMAGES, "hidden_act": "gelu"})
    ).eval()
    inputs = {"input_ids": torch.randint(3, 64, (2, 7)), "pixel_values": torch.rand(2, 3, 16, 16)}
    before = model(**inputs).logits_per_image
    with pytest.raises(
        ValueError, match=r"(?s)several:.*text_model.*\(4 blocks\), vision_model.*\(4 blocks\)"
    ):
        upcycle(model, 4)
    upcycle(model.vision_model, 4, layers="last 2")
    assert all("vision_model" in name for name, m in model.named_modules() if isinstance(m, MoE))
    # A cosine of two unit vectors, times a scale of about 14: the values in between are as large as
    # the scale, not the product.
    scale = float(model.logit_scale.detach().exp())
    after = model(**inputs).logits_per_image
    torch.testing.assert_close(after, before, rtol=0, atol=rounding(ROUNDINGS, scale))


@pytest.fixture
def timm():
    try:
        import timm
    # timm needs torchvision, which fails in many ways beside a torch it was not built for
    except Exception as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.1, "class_token": False, "global_pool": "avg"},
        {"act_layer": "gelu_tanh"},
        {"act_layer": "quick_gelu"},
        {"mlp_layer": "SwiGLUPacked"},
        {"mlp_layer": "SwiGLU"},
    ],
)
def test_timm_models_compute_the_same_when_gates_sum_to_one(timm, options, rounding):
    options = dict(options)
    if "mlp_layer" in options:
        options.update(mlp_layer=getattr(timm.layers, options["mlp_layer"]), act_layer=nn.SiLU)
    sizes = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = timm.models.VisionTransformer(**sizes, **options).eval()
    images = torch.rand(2, 3, 16, 16)
    before = model(images)
    upcycle(model, 4, 2, layers="every 2")
    assert [type(block.mlp) is MoE for block in model.blocks] == [False, True] * 2
    torch.testing.assert_close(model(images), before, rtol=0, atol=rounding(ROUNDINGS, before))
