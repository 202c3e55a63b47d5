"""Images of several sizes in one batch: padded to one size, or packed into one row of tokens."""

import pytest
import torch
from torch import nn

from ironmoe.moe import MoE, SoftMoE, TopKRouter, VMoE, pad_images

SIZES = ((16, 16), (8, 12), (4, 4), (12, 8))


def images_of(sizes=SIZES, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.rand(2, *size, dtype=dtype, requires_grad=True) for size in sizes]


def vmoe(**options):
    torch.manual_seed(0)
    settings = {"moe_layers": (1,), "num_experts": 4, "channels": 2} | options
    model = VMoE(16, 4, 24, 2, 2, 32, 5, **settings).double().eval()
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("options", [{}, {"classifier": "map", "stem": "conv"}], ids=str)
def test_padded_images_get_what_each_gets_alone(options):
    model, images = vmoe(**options), images_of()
    logits = model(*pad_images(images, image_size=16, patch_size=4))
    for image, row in zip(images, logits, strict=True):
        alone = model(*pad_images([image], image_size=16, patch_size=4))
        torch.testing.assert_close(row, alone[0])
        expected, grad = (
            torch.autograd.grad(z[0], image, retain_graph=True)[0] for z in (alone[0], row)
        )
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(logits[0], model(images[0][None])[0])  # it fills the square


def test_what_pad_images_returns():
    batch, mask = pad_images(images_of(), image_size=16, patch_size=4)
    assert batch.shape == (4, 2, 16, 16) and mask.shape == (4, 16) and mask.dtype == torch.bool
    grids = mask.view(4, 4, 4)
    for image, square, grid in zip(images_of(), batch, grids, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(square[:, :height, :width], image)
        assert square.count_nonzero() == image.count_nonzero()
        assert grid.sum() == height * width / 16 and grid[: height // 4, : width // 4].all()


def test_cut_off_patches_of_whole_images_are_real():
    """With a conv stem, the side of an image need not be a multiple of the patch's."""
    batch, mask = pad_images(images_of([(10, 10), (8, 4)]), image_size=10, patch_size=4)
    assert batch.shape == (2, 2, 10, 10)
    assert mask.view(2, 3, 3).sum((1, 2)).tolist() == [9, 2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "images must hold at least one image"),
        ([(8, 8), (6, 8)], r"images\[1\] must have shape \(C, H, W\), with H and W multiples of "
         r"patch_size = 4 up to image_size = 16, got \(2, 6, 8\)"),
        ([(20, 8)], "up to image_size = 16"),
        ([(0, 8)], r"images\[0\]"),
        ([(8, 8, 8)], r"images\[0\]"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_fit_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        pad_images(images_of(sizes), image_size=16, patch_size=4)


class PackedViT(nn.Module):
    """As a user of NaViT writes it. Tokens of several images stand in one row; ``image`` (B, N) is
    the number of a token's image in its row, and −1 for padding."""

    def __init__(self, dim=12, heads=2, images_a_row=3):
        super().__init__()
        self.heads, self.images_a_row = heads, images_a_row
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.moe = MoE(dim, 20, 4, router=TopKRouter(dim, 4, 2), shared_dim=8)
        self.soft = SoftMoE(dim, 20, 3, 2)

    def forward(self, x_BND, image_BN):
        mask_BN = image_BN >= 0
        x_BND = x_BND.masked_fill(~mask_BN[..., None], 0)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x_BND)).chunk(3, -1)
        )
        same_BNN = image_BN[:, :, None] == image_BN[:, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=same_BNN[:, None])
        x_BND = x_BND + self.proj(y.transpose(1, 2).flatten(2))
        x_BND = x_BND + self.moe(self.norms[1](x_BND), mask_BN)

        # A soft layer mixes the tokens of one image: each image is a row of its own, in which all
        # others are padding and come back as 0.
        numbers_I = torch.arange(self.images_a_row, device=x_BND.device)
        own_BIN = image_BN[:, None] == numbers_I[:, None]
        rows_BIND = self.norms[2](x_BND)[:, None].expand(-1, self.images_a_row, -1, -1)
        mixed = self.soft(rows_BIND.flatten(0, 1), own_BIN.flatten(0, 1))
        x_BND = x_BND + mixed.view(rows_BIND.shape).sum(1)
        return x_BND.masked_fill(~mask_BN[..., None], 0)


LENGTHS = ((3, 4, 1), (8,), (2, 2))


def packed(filling):
    torch.manual_seed(1)
    x_BND = torch.randn(3, 9, 12, dtype=torch.float64)
    image_BN = torch.full((3, 9), -1)
    for row, lengths in zip(image_BN, LENGTHS, strict=True):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        row[: len(numbers)] = numbers
    return x_BND.masked_fill(image_BN[..., None] < 0, filling), image_BN


def test_packed_images_get_what_each_gets_alone():
    torch.manual_seed(0)
    model = PackedViT().double().eval()
    x_BND, image_BN = packed(float("nan"))
    x_BND.requires_grad_()
    y_BND = model(x_BND, image_BN)
    dy_BND = torch.randn_like(y_BND)
    tensors = [x_BND, *model.parameters()]
    together = torch.autograd.grad(y_BND, tensors, dy_BND)

    sums = [torch.zeros_like(tensor) for tensor in tensors]
    for b, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            own_N = image_BN[b] == number
            alone = model(x_BND[b : b + 1, own_N], torch.zeros(1, lengths[number]))
            torch.testing.assert_close(y_BND[b, own_N], alone[0])
            grads = torch.autograd.grad(alone, tensors, dy_BND[b : b + 1, own_N])
            sums = [total + grad for total, grad in zip(sums, grads, strict=True)]
    torch.testing.assert_close(together, tuple(sums))


def test_packed_rows_have_the_same_bits_whatever_the_padding_holds():
    torch.manual_seed(0)
    model = PackedViT().double().eval()
    first, second = (model(*packed(filling)) for filling in (float("nan"), 7.0))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"classifier": "token"},
        {"classifier": "gap", "make_moe": lambda: SoftMoE(24, 32, 4, 2)},
        {"classifier": "map", "ensemble_size": 2},
    ],
    ids=["token", "gap, soft", "map, ensemble"],
)
def test_a_masked_model_is_exported_for_any_batch(options):
    model = vmoe(**options).float()
    images, mask = pad_images(images_of(dtype=torch.float32), image_size=16, patch_size=4)
    images = images.detach()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, (images, mask), dynamic_shapes={"images": {0: batch}, "mask": {0: batch}}
    )
    for count in (1, 4, 16):
        some = images.repeat(4, 1, 1, 1)[:count], mask.repeat(4, 1)[:count]
        torch.testing.assert_close(program.module()(*some), model(*some))
