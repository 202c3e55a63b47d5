"""nn.TransformerEncoder and its kin with experts, whose fused path must not skip them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ironmoe.moe import Capacity, MoE, upcycle

DIM, HIDDEN, TOKENS, DEPTH = 16, 24, 5, 3
# On the way through an encoder: three products of width DIM and a softmax of TOKENS, an MLP, norms.
ROUNDINGS = DEPTH * (3 * DIM + TOKENS + (DIM + HIDDEN) + 2 * DIM)
FORMS = [(True, True), (True, False), (False, True), (False, False)]


def encoder(norm_first=False, batch_first=True, activation="relu", dropout=0.0, bias=True):
    layer = nn.TransformerEncoderLayer(
        DIM,
        2,
        HIDDEN,
        dropout,
        activation,
        batch_first=batch_first,
        norm_first=norm_first,
        bias=bias,
    )
    fused = batch_first and bias and not norm_first and activation in ("relu", "gelu")
    model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=fused)
    for parameter in model.parameters():  # copies of one layer would differ in nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("norm_first, batch_first", FORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), torch.nn.functional.silu])
def test_encoders_compute_the_same(norm_first, batch_first, activation, rounding):
    model = encoder(norm_first, batch_first, activation)
    for dtype in (torch.float32, torch.float64):
        model, x = model.to(dtype), torch.randn(2, TOKENS, DIM, dtype=dtype, requires_grad=True)
        sparse = upcycle(copy.deepcopy(model), 4, 2, layers=[0, 2])
        assert [isinstance(layer.linear1, MoE) for layer in sparse.layers] == [True, False, True]
        before, after = model(x), sparse(x)
        torch.testing.assert_close(after, before, rtol=0, atol=rounding(ROUNDINGS, before))
        ahead = torch.randn_like(before)
        gradients = [torch.autograd.grad(y, x, ahead)[0] for y in (before, after)]
        # the way there and back, with products of the numbers of both
        torch.testing.assert_close(*gradients, rtol=0, atol=rounding(4 * ROUNDINGS, gradients[0]))


@pytest.mark.parametrize("layers", ["all", [0], [2]])
def test_the_fused_path_is_left_where_it_would_skip_experts(layers, rounding):
    model = encoder()
    x, padding = torch.randn(2, TOKENS, DIM), torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[0, 3:] = True
    sparse = upcycle(copy.deepcopy(model), 4, 2, layers=layers, noise=0.5)
    alike = upcycle(copy.deepcopy(model), 4, 2, layers=layers)
    with torch.no_grad():  # only here does torch take it
        before, after = model(x), alike(x)
        torch.testing.assert_close(after, before, rtol=0, atol=rounding(ROUNDINGS, before))
        assert (sparse(x) - before).abs().max() > 1e-2
        before = model(x, src_key_padding_mask=padding)
        for twin in (alike, copy.deepcopy(alike), pickle.loads(pickle.dumps(alike))):
            after = twin(x, src_key_padding_mask=padding)
            # torch's fused path gives 0 at padding
            difference = (after - before).masked_fill(padding[..., None], 0)
            assert difference.abs().max() <= rounding(ROUNDINGS, before)


def test_a_single_layer_and_decoders_get_experts(rounding):
    layer = encoder().layers[0]
    x, memory = torch.randn(2, TOKENS, DIM), torch.randn(2, TOKENS, DIM)
    before = layer(x)
    assert upcycle(layer, 4) is layer
    torch.testing.assert_close(layer(x), before, rtol=0, atol=rounding(ROUNDINGS, before))
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, HIDDEN, 0.0), 2)
    before = decoder(x, memory)
    upcycle(decoder, 4)
    assert sum(isinstance(m, MoE) for m in decoder.modules()) == 2
    after = decoder(x, memory)
    torch.testing.assert_close(after, before, rtol=0, atol=rounding(2 * ROUNDINGS, before))


def test_the_encoder_of_a_whole_transformer_is_asked_for():
    model = nn.Transformer(DIM, 2, 2, 2, HIDDEN, 0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"several: encoder\.layers .*upcycle\(model\.decoder, …"):
        upcycle(model, 4)
    upcycle(model.encoder, 4)
    assert model.encoder.use_nested_tensor is False


def test_dropout_inside_is_refused_and_dropout_around_stays(rounding):
    model = encoder(dropout=0.1)
    with pytest.raises(ValueError, match=r"layers\.0 \(Tr.*has dropout, dropout with p = 0\.1"):
        upcycle(model, 4)
    for layer in model.layers:
        layer.dropout.p = 0.0
    sparse = upcycle(copy.deepcopy(model), 4, router={"noise_std": 0.0}).train()
    x, outputs = torch.randn(2, TOKENS, DIM), []
    for twin in (model.train(), sparse):
        torch.manual_seed(3)
        outputs.append(twin(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=rounding(ROUNDINGS, outputs[0]))
    assert (outputs[0] - model.eval()(x)).abs().max() > 1e-2


class Fixed(nn.TransformerEncoderLayer):
    """It does not ask its attribute for the activation."""

    def _ff_block(self, x):
        return self.linear2(torch.relu(self.linear1(x)))


@pytest.mark.parametrize(
    "kind, activation, message",
    [
        (nn.TransformerEncoderLayer, torch.tanh, "has the activation activation, tanh, which"),
        (Fixed, "relu", r"must call linear1, activation, dropout, .* got linear1 .*, linear2"),
    ],
)
def test_layers_that_do_something_else_are_refused(kind, activation, message):
    layer = kind(DIM, 2, HIDDEN, 0.0, activation).eval()
    before = dict(vars(layer))
    with pytest.raises(ValueError, match=message):
        upcycle(nn.Sequential(layer), 4)
    assert vars(layer) == before and callable(layer.activation)


def test_options_that_look_at_one_image_need_the_batch_first():
    model = encoder(batch_first=False)
    for options in (
        {"capacity": Capacity(1.0, images_per_group=1)},
        {"router": {"balance": "deepseek_sequence", "balance_weight": 0.1}},
    ):
        with pytest.raises(ValueError, match=r"batch_first must be True in layers\.0 for options"):
            upcycle(model, 4, **options)
        upcycle(encoder(), 4, **options)
