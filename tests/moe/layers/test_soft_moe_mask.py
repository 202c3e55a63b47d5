"""A mask tells SoftMoE which tokens of an image are padding."""

import pytest
import torch

from ironmoe.moe import SoftMoE

D = 6
LENGTHS = (5, 0, 1, 7)


def layer_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return SoftMoE(D, 10, 3, 2, dtype=dtype, **options).eval()


def padded(dtype=torch.float64, filling=float("nan")):
    """Images of ``LENGTHS`` tokens in rows of 7, the mask, and what the padding is filled with."""
    torch.manual_seed(1)
    x = torch.randn(len(LENGTHS), 7, D, dtype=torch.float64).to(dtype)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return x.masked_fill(~mask[..., None], filling), mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dispatch_dtype": torch.bfloat16}], ids=str)
def test_an_image_gets_what_it_gets_without_padding(dtype, options):
    layer, (x, mask) = layer_of(dtype, **options), padded(dtype)
    y = layer(x, mask)
    assert y.dtype == dtype and not y[~mask].any()
    # a sum of another length may be rounded once more
    tolerance = 4 * torch.finfo(options.get("dispatch_dtype", dtype)).eps
    for image, row, length in zip(x, y, LENGTHS, strict=True):
        alone = layer(image[None, :length])[0]
        torch.testing.assert_close(row[:length], alone, rtol=tolerance, atol=tolerance)


def test_it_is_the_definition_over_the_real_tokens():
    """Equations 1 to 3 of arXiv 2308.00951, an image and a slot at a time."""
    layer, (x, mask) = layer_of(), padded()
    y = layer(x, mask)
    for image, row, real in zip(x, y, mask, strict=True):
        tokens = image[real]
        if not len(tokens):
            continue
        scores = layer.scores(tokens[None])[0]
        slots = []
        for e in range(3):
            for p in range(2):
                mixed = scores[:, e, p].softmax(0) @ tokens
                hidden = torch.nn.functional.gelu(layer.fc1.weight[e] @ mixed + layer.fc1.bias[e])
                slots.append(layer.fc2.weight[e] @ hidden + layer.fc2.bias[e])
        torch.testing.assert_close(row[real], scores.flatten(1).softmax(1) @ torch.stack(slots))


@pytest.mark.parametrize("training", [False, True])
def test_what_the_padding_holds_changes_no_bit_and_gets_no_gradient(training):
    found = []
    for filling in (float("nan"), 0.0, 1e30, float("-inf")):
        layer = layer_of(torch.float32, noise_std=1.0).train(training)
        x, mask = padded(torch.float32, filling)
        x.requires_grad_()
        torch.manual_seed(2)
        y = layer(x, mask)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[0][~mask].any()
        found.append([y, *grads])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_are_those_of_the_images_alone():
    layer, (x, mask) = layer_of(), padded()
    x.requires_grad_()
    dy = torch.randn_like(x)
    together = torch.autograd.grad(layer(x, mask), [x, *layer.parameters()], dy)
    alone = [torch.zeros_like(grad) for grad in together]
    for b, length in enumerate(LENGTHS):
        y = layer(x[b : b + 1, :length])
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy[b : b + 1, :length])
        alone = [total + grad for total, grad in zip(alone, grads, strict=True)]
    torch.testing.assert_close(together[0][mask], alone[0][mask])
    torch.testing.assert_close(together[1:], tuple(alone[1:]))


def test_second_derivatives_with_a_mask():
    layer, (x, mask) = layer_of(), padded(filling=0.0)
    x = x[[1, 2]].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask[[1, 2]]), x)


def test_images_without_any_token_give_zeros_and_finite_gradients():
    layer, x = layer_of(), torch.full((2, 3, D), float("nan"), dtype=torch.float64)
    x.requires_grad_()
    y = layer(x, torch.zeros(2, 3, dtype=torch.bool))
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert not y.any() and not any(grad.any() for grad in grads)
    for shape in ((0, 3, D), (2, 0, D)):
        empty = torch.zeros(shape, dtype=torch.float64)
        assert layer(empty, torch.zeros(shape[:2], dtype=torch.bool)).shape == shape


def test_a_mask_of_ones_is_no_mask_and_integers_are_taken():
    layer, (x, mask) = layer_of(), padded()
    ones = torch.ones(4, 7, dtype=torch.bool)
    x0 = x.nan_to_num()
    torch.testing.assert_close(layer(x0, ones), layer(x0), rtol=0, atol=0)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(layer(x, mask.to(dtype)), layer(x, mask))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 6, dtype=torch.bool), r"mask must have shape \(4, 7\), got \(4, 6\)"),
        (torch.ones(4, 7), "mask must be bool, or integers where 0 marks padding, got torch.float"),
    ],
)
def test_a_wrong_mask_is_named(mask, message):
    with pytest.raises(ValueError, match=message):
        layer_of()(padded()[0], mask)


def test_it_compiles_whole_with_a_mask():
    layer, (x, mask) = layer_of(torch.float32), padded(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), layer(x, mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_of_a_padded_batch_give_the_mixtures_of_its_real_tokens(dtype):
    layer, (x, mask) = layer_of(dtype), padded(dtype)
    scores = layer.scores(x, mask)
    assert scores.dtype == torch.promote_types(dtype, torch.float32) and scores.isfinite().all()
    into_slots, into_tokens = scores.softmax(1), scores.flatten(2).softmax(-1)
    for image, length in enumerate(LENGTHS):
        alone = layer.scores(x[image : image + 1, :length])
        real = slice(0, length)
        torch.testing.assert_close(into_slots[image, real], alone[0].softmax(0))
        torch.testing.assert_close(into_tokens[image, real], alone[0].flatten(1).softmax(1))
        if length:
            assert not into_slots[image, length:].any()
    torch.testing.assert_close(layer.scores(x, mask.int()), scores, rtol=0, atol=0)
    unpadded = layer.scores(x[3:], mask[3:])
    torch.testing.assert_close(unpadded, layer.scores(x[3:]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="mask must have shape"):
        layer.scores(x, mask[:, :3])
