"""A mask tells VMoE which patches are padding: an image gets the logits of its real patches
alone."""

import copy
import math

import pytest
import torch
from einops import rearrange
from torch import nn

from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, SoftMoE, VMoE, collect_aux_loss
from ironmoe.moe.vit.attention import Attention, AttentionPool

PATCH, SIDE, DIM = 4, 4, 24
GRIDS = ((4, 4), (2, 3), (1, 1), (3, 4), (0, 0))  # height and width of each image, in patches
QUIET = {"noise_std": 0.0, "load_weight": 0.0}
KINDS = {
    "token": {}, "gap": {"classifier": "gap"}, "map": {"classifier": "map"},
    "representation": {"representation_size": 12}, "conv": {"stem": "conv"},
    "conv, gap": {"stem": "conv", "classifier": "gap"},
    "dense": {"moe_layers": ()}, "ensemble": {"ensemble_size": 2},
    "ensemble, map": {"ensemble_size": 2, "classifier": "map"},
    "ensemble, capacity": {
        "ensemble_size": 2, "capacity": Capacity(1.0, images_per_group=1, multiple_of=1)
    },
    "bfloat16 dispatch": {"dispatch_dtype": torch.bfloat16},
    "soft": {"make_moe": lambda: SoftMoE(DIM, 32, 4, 2, activation="gelu_tanh")},
    "shared expert": {"make_moe": lambda: MoE(DIM, 32, 4, shared_dim=20, shared_gate=True)},
    "user's own": {"make_moe": lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())},
    "expert choice": {
        "make_moe": lambda: MoE(
            DIM, 32, 4, router=ExpertChoiceRouter(DIM, 4, 2.0, images_per_group=1, multiple_of=1)
        )
    },
    "capacity": {"capacity": Capacity(1.0, images_per_group=1, multiple_of=1, priority=True)},
}  # fmt: skip


def model_of(kind, dtype=torch.float64):
    torch.manual_seed(0)
    settings = {"moe_layers": (1, 2), "num_experts": 4, "channels": 2, "router": QUIET}
    model = VMoE(PATCH * SIDE, PATCH, DIM, 3, 2, 32, 5, **settings | KINDS[kind]).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # a norm of 0 is 0 until its bias is trained
            nn.init.normal_(module.bias)
    nn.init.normal_(model.head.weight)
    if model.cls is not None:
        nn.init.normal_(model.cls)
    return model.eval()


def batch(dtype=torch.float64, filling=float("nan"), place=(0, 0)):
    """Images of ``GRIDS`` patches on squares filled with ``filling``, and the mask (B, h, w)."""
    torch.manual_seed(1)
    pixels = PATCH * SIDE
    images = torch.rand(len(GRIDS), 2, pixels, pixels, dtype=torch.float64).to(dtype)
    rows, columns = torch.tensor(GRIDS)[:, :, None].unbind(1)
    at = torch.arange(SIDE)
    top, left = place
    mask = ((at >= top) & (at < top + rows))[:, :, None] & ((at >= left) & (at < left + columns))[
        :, None, :
    ]
    real = mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    return images.masked_fill(~real, filling), mask


def alone(model, image, mask):
    """(M, C) logits of the patches that the mask (h, w) calls real, by hand: without padding."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    if len(rows):
        y, x = (slice(at[0] * PATCH, (at[-1] + 1) * PATCH) for at in (rows, columns))
        tokens = rearrange(model.stem(image[None, :, y, x]), "b d h w -> b (h w) d")
    else:
        tokens = image.new_zeros(1, 0, DIM)
    positions = model.pos_embedding[:, int(model.cls is not None) :][:, mask.flatten()]
    tokens = tokens + positions
    if model.cls is not None:
        tokens = torch.cat([model.cls + model.pos_embedding[:, :1], tokens], 1)
    for i, block in enumerate(model.blocks):
        if i == model.first_moe:
            tokens = tokens.repeat(model.ensemble_size, 1, 1)
        tokens = block(tokens)
    pooled = model._pooled(model.norm(tokens))
    if model.pre_logits is not None:
        pooled = model.pre_logits(pooled).tanh()
    return model.head(pooled)


@pytest.mark.parametrize("place", [(0, 0), (1, 1)], ids=["upper left", "in the middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_gets_the_logits_of_its_real_patches_alone(kind, place):
    model, (images, mask) = model_of(kind), batch(place=place)
    logits = model.member_logits(images, mask)
    assert logits.isfinite().all()
    tolerance = 1e-2 if "bfloat16" in kind else 1e-9
    for b in range(len(GRIDS)):
        if mask[b].any():
            expected = alone(model, images[b], mask[b])
            torch.testing.assert_close(logits[:, b], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_padding_holds_changes_no_bit(kind):
    """Neither logits nor losses nor gradients, in training and in eval."""
    for training in (False, True):
        found = []
        for filling in (float("nan"), 0.0, 1e30):
            model = model_of(kind, torch.float32).train(training)
            images, mask = batch(torch.float32, filling)
            images.requires_grad_()
            logits = model.member_logits(images, mask)
            loss = logits.square().sum() + collect_aux_loss(model)
            parameters = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, [images, *parameters])
            assert all(grad.isfinite().all() for grad in grads)
            padding = (images != images) if filling != filling else (images == filling)
            assert not grads[0][padding].any()
            found.append([logits, loss, *grads])
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_ones_gives_what_no_mask_gives(kind):
    model, (images, _) = model_of(kind), batch(filling=0.5)
    ones = torch.ones(len(images), SIDE * SIDE, dtype=torch.bool)
    torch.testing.assert_close(model(images, ones), model(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_a_real_patch_have_finite_logits_and_gradients(kind):
    model = model_of(kind, torch.float32).train()
    images = torch.full((2, 2, PATCH * SIDE, PATCH * SIDE), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, SIDE * SIDE, dtype=torch.bool)
    logits = model(images, nothing)
    loss = logits.square().sum() + collect_aux_loss(model)
    grads = torch.autograd.grad(loss, [images, *model.parameters()], allow_unused=True)
    assert logits.isfinite().all() and torch.equal(*model.eval()(images, nothing))
    assert all(grad is None or grad.isfinite().all() for grad in grads)
    assert not grads[0].any()


def test_a_mask_has_one_or_two_axes_and_may_be_of_integers():
    model, (images, mask) = model_of("token"), batch()
    expected = model(images, mask)
    for same in (mask.flatten(1), mask.long(), mask.flatten(1).to(torch.uint8)):
        assert torch.equal(model(images, same), expected)
    turned = mask.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous
    assert torch.equal(model(images, turned), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 15, dtype=torch.bool), r"mask must have shape \(5, 16\), got \(5, 15\)"),
        (torch.ones(5, 4, 5, dtype=torch.bool), r"mask must have shape \(5, 4, 4\)"),
        (torch.ones(4, 16, dtype=torch.bool), r"mask must have shape \(5, 16\)"),
        (
            torch.ones(5, 16),
            "mask must be bool, or integers where 0 marks padding, got torch.float",
        ),
    ],
)
def test_a_wrong_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        model_of("token")(batch()[0], mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_logits_are_near_those_in_float64(dtype):
    exact = model_of("map")
    images, mask = batch(filling=0.0)
    expected = exact(images, mask)
    logits = copy.deepcopy(exact).to(dtype)(images.to(dtype), mask)
    assert logits.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype] * expected.abs().max()
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance.item())


def test_the_mean_over_many_patches_in_bfloat16_counts_them_all():
    """bfloat16 has no number between 256 and 258."""
    model = VMoE(20, 1, 8, 1, 1, 8, 5, classifier="gap").bfloat16()
    x, mask = torch.ones(1, 400, 8, dtype=torch.bfloat16), torch.arange(400)[None] < 257
    assert torch.equal(model._pooled(x, mask), torch.ones(1, 8, dtype=torch.bfloat16))


def test_a_conv_stem_with_cut_off_patches_sees_padding_as_the_border():
    """A side of 10 pixels has 3 patches of 4, the last of them half."""
    torch.manual_seed(0)
    model = VMoE(10, 4, DIM, 1, 2, 32, 5, stem="conv", channels=1).double().eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.norm.bias)
    images = torch.rand(2, 1, 10, 10, dtype=torch.float64)
    mask = torch.ones(2, 3, 3, dtype=torch.bool)
    torch.testing.assert_close(model(images, mask), model(images))
    mask[1, :, 2] = False
    mask[1, 0] = False
    stem = model.stem(images[1:, :, 4:, :8])
    masked = model.stem(images, mask)
    torch.testing.assert_close(masked[1:, :, 1:, :2], stem)
    assert model(images, mask).isfinite().all()


@pytest.mark.parametrize("module", [Attention(8, 2), AttentionPool(8, 2, 12)])
def test_second_derivatives_of_masked_attention(module):
    module = module.double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert torch.autograd.gradcheck(lambda x: module(x, mask), x)
    assert torch.autograd.gradgradcheck(lambda x: module(x, mask), x)


def test_an_ensemble_repeats_the_mask():
    model, (images, mask) = model_of("ensemble"), batch()
    members = model.member_logits(images, mask)
    assert members.shape == (2, len(GRIDS), 5) and not torch.allclose(members[0], members[1])
    mean = members.log_softmax(-1).logsumexp(0) - math.log(2)
    torch.testing.assert_close(model(images, mask), mean)


@pytest.mark.parametrize("kind", ["map", "conv, gap", "soft", "ensemble, capacity"])
def test_it_compiles_whole_with_a_mask(kind):
    torch._dynamo.reset()
    model, (images, mask) = model_of(kind, torch.float32), batch(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, mask), model(images, mask))
