"""What runs at the end of a backward pass runs once, whatever becomes of the loss."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks.training.weights.end_of_backward import EndOfBackward


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no gradient here")


def watched(model, x, seen):
    def end():
        seen.append(model.weight.grad is not None)

    ended = EndOfBackward(end)
    return ended, ended.watch(model(x).square().sum())


def test_it_runs_when_all_gradients_are_there_and_once():
    model, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    _, loss = watched(model, x, seen)
    loss.backward(retain_graph=True)
    loss.backward()
    del loss
    assert seen == [True]


def test_the_value_and_the_gradient_are_those_of_the_loss():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = model(x).square().sum()
    _, loss = watched(model, x, [])
    assert torch.equal(loss, plain)
    weights = list(model.parameters())
    found = torch.autograd.grad(loss, weights)
    expected = torch.autograd.grad(plain, weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autograd_grad_of_something_made_of_the_loss_is_enough():
    model, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    _, loss = watched(model, x, seen)
    torch.autograd.grad(3 * loss + 1, [model.bias])
    assert seen == [False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_run_again_before_the_end(reentrant):
    seen, order = [], []
    model, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)

    def layer(x):
        order.append(len(seen))
        return model(x)

    ended = EndOfBackward(lambda: seen.append(True))
    loss = ended.watch(checkpoint(layer, x, use_reentrant=reentrant).sum())
    loss.backward()
    assert order == [0, 0] and seen == [True] and model.weight.grad is not None


def test_it_runs_after_an_error_in_the_backward_pass():
    seen = []
    ended = EndOfBackward(lambda: seen.append(True))
    loss = ended.watch(Fails.apply(torch.ones(2, requires_grad=True)).sum())
    with pytest.raises(RuntimeError, match="no gradient here"):
        loss.backward()
    assert seen == [True] and loss.requires_grad


def test_it_runs_when_the_loss_is_thrown_away_or_has_no_graph():
    model, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    _, loss = watched(model, x, seen)
    assert not seen
    del loss
    assert seen == [False]
    with torch.no_grad():
        watched(model, x, seen)
    assert len(seen) == 2


def test_finish_runs_it_early_and_once():
    model, x, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    ended, loss = watched(model, x, seen)
    ended.finish()
    ended.finish()
    loss.backward()
    assert seen == [False]
