"""Models that have no gradient: attacks and checks that need none take them, others say so."""

import copy

import numpy as np
import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import APGD, CW, FAB, PGD, Square, check_model, evaluate

EPS = 0.3
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao.quantization warns that it will go


@pytest.fixture(scope="module")
def data():
    return toys.blobs(60)


@pytest.fixture(scope="module")
def network(data):
    return toys.mlp(*data).float()


def in_numpy(network):
    first, second = (
        (layer.weight.detach().numpy().T, layer.bias.detach().numpy())
        for layer in network
        if isinstance(layer, nn.Linear)
    )

    def model(x):
        hidden = x.numpy().reshape(len(x), -1) @ first[0] + first[1]
        hidden = nn.functional.gelu(torch.from_numpy(hidden)).numpy()
        return torch.from_numpy(hidden @ second[0] + second[1])

    return model


def under_no_grad(network):
    @torch.no_grad()
    def model(x):
        return network(x)

    return model


class Trained(nn.Module):
    """Its weights, which nobody froze, have a graph, and its images have none."""

    def __init__(self, network):
        super().__init__()
        self.hidden = [copy.deepcopy(network).requires_grad_()]

    def forward(self, x):
        return self.hidden[0](x.detach())


class Service:
    """It answers lists of numbers."""

    def __init__(self, network):
        self.network = network

    def __call__(self, images):
        if images.requires_grad:
            raise RuntimeError("cannot send a tensor that requires grad")
        received = torch.tensor(np.asarray(images.tolist()), dtype=torch.float32)
        with torch.no_grad():
            return torch.tensor(self.network(received).tolist())


def in_int8(network):
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {nn.Linear})


BLACK_BOXES = {
    "numpy": in_numpy,
    "no_grad": under_no_grad,
    "detached": Trained,
    "service": Service,
    "int8": in_int8,
}


@pytest.fixture(params=BLACK_BOXES)
def black_box(request, network):
    return BLACK_BOXES[request.param](network)


def test_square_takes_it_as_it_takes_the_model_with_a_gradient(black_box, network, data):
    attacks = [Square(model, EPS, steps=60) for model in (black_box, network)]
    reports = [evaluate(a.model, data, {"square": a}) for a in attacks]
    fell = [int(report.attacks["square"].fell.sum()) for report in reports]
    assert 0 < fell[1] < 60 and abs(fell[0] - fell[1]) <= 2  # int8 rounds its weights
    assert reports[0].complete and reports[0].clean_accuracy.count == 60

    flags = {flag.name: flag for flag in reports[0].checks}
    # int8 takes the scale of its activations from the whole batch
    tripped = {flag.name for flag in flags.values() if flag.tripped}
    assert tripped <= ({"batch dependence"} if isinstance(black_box, nn.Sequential) else set())
    for name in ("quantised input", "zero gradients"):
        assert "the model has no gradient (" in flags[name].message


@pytest.mark.parametrize("attack", [PGD, APGD, FAB, CW])
def test_an_attack_along_gradients_names_one_that_needs_none(black_box, data, attack):
    norm = "L2" if attack is CW else "Linf"
    follows = attack(black_box, EPS, steps=3, norm=norm)
    message = "must be differentiable with respect to its images.* Square and HopSkipJump"
    with pytest.raises(ValueError, match=message):
        follows.run(*data)
    with pytest.raises(ValueError, match=message):
        evaluate(black_box, data, {"a": follows})


def test_no_image_requires_a_gradient_where_none_is_wanted(network, data):
    seen = []

    def model(x):
        seen.append(x.requires_grad)
        with torch.no_grad():
            return network(x)

    Square(model, EPS, steps=10).run(*data)
    evaluate(model, data, {"square": Square(model, EPS, steps=10)}, checks=False)
    assert not any(seen)


def test_an_error_of_the_model_itself_stays_that_error(data):
    def broken(x):
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        PGD(broken, EPS).run(*data)
    with pytest.raises(KeyError, match="weights"):
        evaluate(broken, data, {"pgd": PGD(broken, EPS)})


def test_a_lack_of_memory_stays_that_error(network, data):
    def large(x):
        if x.requires_grad:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(x)

    with pytest.raises(torch.OutOfMemoryError):
        PGD(large, EPS).run(*data)


def test_a_model_that_fails_under_attack_alone_says_how(network, data):
    """Its error is part of the message."""

    def picky(x):
        return network(torch.from_numpy(x.numpy()))

    with pytest.raises(ValueError, match=r"RuntimeError: Can't call numpy\(\) on Tensor"):
        PGD(picky, EPS).run(*data)


def test_the_checks_of_a_service_cost_no_more_than_they_say(network, data):
    asked = []
    service = Service(network)

    def model(x):
        asked.append(len(x))
        return service(x)

    check_model(Square(model, EPS), *data)
    assert sum(asked) <= 12 * 60 + 4


@pytest.mark.parametrize("attack", [PGD, FAB, CW, Square])
def test_labels_alone_are_for_hopskipjump(network, data, attack):
    def model(x):
        return network(x).argmax(1)

    norm = "L2" if attack is CW else "Linf"
    for run in (
        lambda: attack(model, EPS, steps=3, norm=norm).run(*data),
        lambda: evaluate(model, data, {"a": attack(model, EPS, steps=3, norm=norm)}),
    ):
        with pytest.raises((ValueError, TypeError), match=r"labels.*HopSkipJump"):
            run()
