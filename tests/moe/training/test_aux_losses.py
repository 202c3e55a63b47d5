"""Auxiliary losses from the passes of a training step to their collection."""

import copy
import gc
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks import PGD
from ironmoe.bench.benchmarks.offload.live_memory import LiveMemory
from ironmoe.moe import MoE, TopKRouter, VMoE, aux_loss_in_eval, collect_aux_loss
from ironmoe.moe.layers.mlp import Mlp

DIM, EXPERTS = 8, 4


def layer(**router):
    options = {"noise_std": 0.0, "importance_weight": 0.3, "z_weight": 0.1, **router}
    return MoE(DIM, 16, EXPERTS, router=TopKRouter(DIM, EXPERTS, 2, **options)).double()


class Blocks(nn.Module):
    """Residual MLPs behind a linear layer, so that a backbone lies before each router.
    ``checkpointed``: None, or the value of use_reentrant."""

    def __init__(self, *mlps, checkpointed=None):
        super().__init__()
        self.stem = nn.Linear(DIM, DIM).double()
        self.mlps = nn.ModuleList(mlps)
        self.checkpointed = checkpointed

    def forward(self, x):
        x = self.stem(x)
        for mlp in self.mlps:
            if self.checkpointed is None:
                x = x + mlp(x)
            else:
                x = x + checkpoint(mlp, x, use_reentrant=self.checkpointed)
        return x


@contextmanager
def no_word():
    """A block in which a word of a lost gradient is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the auxiliary loss of")
        yield


def losses_alone(module, *inputs):
    return sum(module.router(x).aux_loss for x in inputs)


def tokens(count=10, seed=0):
    return torch.randn(
        count, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("keep_outputs", [True, False])
def test_the_losses_of_all_calls_are_summed_and_collecting_empties(keep_outputs):
    moe = layer()
    inputs = [tokens(5 + i, seed=i) for i in range(3)]
    outputs = [moe(x) if keep_outputs else moe(x) is None for x in inputs]
    expected = losses_alone(moe, *inputs)
    torch.testing.assert_close(moe.aux_loss, expected)
    found = collect_aux_loss(moe)
    torch.testing.assert_close(found, expected)
    (got,) = torch.autograd.grad(found, moe.router.weight)
    (wanted,) = torch.autograd.grad(expected, moe.router.weight)
    torch.testing.assert_close(got, wanted)
    assert moe.aux_loss is None and collect_aux_loss(moe) == 0 and len(outputs) == 3


def test_a_layer_that_runs_twice_in_a_model_gives_both_losses():
    moe = layer()
    model, x = Blocks(moe, moe), tokens()
    y = model(x)
    first = model.stem(x)
    expected = losses_alone(moe, first, first + moe(first))
    model.zero_grad()
    moe.aux_losses.take()
    y = model(x)
    found = collect_aux_loss(model)
    torch.testing.assert_close(found, expected)
    (found + y.sum()).backward()


def test_a_layer_that_does_not_run_gives_nothing_of_the_step_before():
    model, x = Blocks(layer(), layer()), tokens()
    (model(x).sum() + collect_aux_loss(model)).backward()
    y = model.mlps[0](x)
    found = collect_aux_loss(model)
    torch.testing.assert_close(found, losses_alone(model.mlps[0], x))
    (y.sum() + found).backward()


@pytest.mark.parametrize("choices", [False, True])
def test_a_recomputed_pass_adds_nothing(choices):
    moes = [layer(selection_bias=choices, noise_std=1.0) for _ in range(2)]
    plain, x = Blocks(*moes), tokens()
    recomputing = Blocks(*copy.deepcopy(moes), checkpointed=False)
    recomputing.stem.load_state_dict(plain.stem.state_dict())
    for _ in range(2):
        grads = []
        for model in (plain, recomputing):
            torch.manual_seed(1)
            y = model(x)
            loss = collect_aux_loss(model)
            (y.square().sum() + loss).backward()
            assert all(mlp.aux_loss is None for mlp in model.mlps)
            grads.append([loss, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(grads[0], grads[1])
    if choices:
        for one, other in zip(plain.mlps, recomputing.mlps, strict=True):
            assert one.router.choices.equal(other.router.choices)
            assert one.router.choices.sum() == 2 * 2 * len(x)


def test_the_reentrant_form_says_which_layer_lost_its_gradient():
    model = Blocks(layer(), checkpointed=True)
    y = model(tokens())
    with pytest.warns(UserWarning, match=r"loss of mlps\.0 has no gradient.*use_reentrant=False"):
        loss = collect_aux_loss(model)
    assert loss > 0 and not loss.requires_grad
    y.sum().backward()
    assert model.mlps[0].aux_loss is None  # the recomputation has added nothing
    with no_word(), torch.no_grad():  # nobody wants a gradient
        model(tokens())
        collect_aux_loss(model)
    model.mlps[0].router.requires_grad_(False)
    with no_word():  # there is none to have
        model(tokens())
        collect_aux_loss(model)


def test_compiled_losses_whose_graph_is_gone_do_not_come_up_in_the_next_step():
    model, x = Blocks(layer(), layer()), tokens()
    for i, mlp in enumerate(model.mlps):
        model.mlps[i] = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    model(x).sum().backward()  # nobody collects
    y = model.mlps[0](model.stem(x))
    with pytest.warns(UserWarning, match=r"mlps\.1.*collect the loss before you call backward"):
        loss = collect_aux_loss(model)
    (y.sum() + loss).backward()
    assert collect_aux_loss(model) == 0


def test_a_loss_whose_graph_a_backward_pass_freed_is_named():
    model = Blocks(layer())
    y = model(tokens())
    y.sum().backward()
    with pytest.warns(UserWarning, match=r"mlps\.0.*collect the loss before you call backward"):
        loss = collect_aux_loss(model)
    torch.testing.assert_close(loss, losses_alone(model.mlps[0], model.stem(tokens())))
    y = model(tokens())
    y.sum().backward(retain_graph=True)
    with no_word():
        collect_aux_loss(model).backward()


def test_a_layer_without_any_loss_has_none_to_lose():
    nothing = dict.fromkeys(("importance_weight", "load_weight", "z_weight"), 0.0)
    model = Blocks(layer(**nothing), checkpointed=True)
    with no_word():
        y = model(tokens())
        assert collect_aux_loss(model) == 0
        y.sum().backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_of_an_attack_do_not_count_beside_the_pass_that_trains(compiled):
    model, x = Blocks(layer()), tokens()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(3):  # images to train on, made in training mode
        point = x.clone().requires_grad_()
        torch.autograd.grad(run(point).square().sum(), point)
    with no_word():
        y = run(x)
        loss = collect_aux_loss(model)
    torch.testing.assert_close(loss, losses_alone(model.mlps[0], model.stem(x)))
    (y.sum() + loss).backward()


def test_an_attack_between_forward_and_collection_leaves_the_loss_alone():
    model = VMoE(8, 4, 16, 2, 2, 32, 3, "all", 4, channels=1).train()
    nn.init.normal_(model.head.weight)
    images = torch.rand(4, 1, 8, 8)
    logits = model(images)
    before = [block.mlp.aux_loss for block in model.blocks]
    PGD(model, 0.1, steps=2)(images, logits.argmax(1))
    with aux_loss_in_eval(model):
        pass
    assert all(b.mlp.aux_loss is loss for b, loss in zip(model.blocks, before, strict=True))
    (logits.sum() + collect_aux_loss(model)).backward()


@pytest.mark.parametrize("twice", [False, True])
def test_compiled_layers_give_the_sum_of_one_graph(twice):
    moe = layer()
    model, x = Blocks(*([moe, moe] if twice else [moe])), tokens()
    (model(x).sum() * 0).backward()
    moe.aux_losses.take()
    y = model(x)
    expected = collect_aux_loss(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        y = compiled(x)
        found = collect_aux_loss(compiled)  # once, though the wrapper shows the layer twice
        torch.testing.assert_close(found, expected)
        (y.sum() + found).backward()


def test_a_compiled_pass_without_gradients_leaves_the_loss_of_a_training_pass():
    model, x = Blocks(layer()), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    with torch.no_grad():
        compiled(x + 1)
    with pytest.warns(UserWarning, match="only for a part of its passes"):
        loss = collect_aux_loss(model)
    both = losses_alone(model.mlps[0], model.stem(x), model.stem(x + 1))
    torch.testing.assert_close(loss, both)
    (y.sum() + loss).backward()
    assert model.mlps[0].router.weight.grad.any()

    with torch.no_grad():
        compiled(x)
    with pytest.warns(UserWarning, match="recorded no gradient"):
        loss = collect_aux_loss(model)
    torch.testing.assert_close(loss, losses_alone(model.mlps[0], model.stem(x)).detach())
    assert collect_aux_loss(model) == 0


def test_wrappers_do_not_double_a_loss():
    moe, x = layer(), tokens()
    model = Blocks(torch.compile(moe, backend="eager"))
    y = model(x)
    torch.testing.assert_close(collect_aux_loss(model), losses_alone(moe, model.stem(x)))
    assert y.shape == x.shape


def test_a_copy_and_a_transform_leave_no_loss_behind():
    moe, x = layer(), tokens()
    y = moe(x)
    assert copy.deepcopy(moe).aux_loss is None
    moe.aux_losses.take()

    def loss(parameters):
        y = torch.func.functional_call(moe, parameters, (x,))
        return y.sum() * 0 + collect_aux_loss(moe)

    found = torch.func.grad(loss)(dict(moe.named_parameters()))["router.weight"]
    (expected,) = torch.autograd.grad(losses_alone(moe, x), moe.router.weight)
    torch.testing.assert_close(found, expected)
    torch.func.grad(lambda p: torch.func.functional_call(moe, p, (x,)).sum())(
        dict(moe.named_parameters())
    )
    assert moe.aux_loss is None and y.shape == x.shape


def test_a_foreign_module_takes_part_by_its_attribute():
    class Foreign(nn.Linear):
        def forward(self, x):
            self.aux_loss = self.weight.square().sum()
            return super().forward(x)

    foreign = Foreign(3, 3)
    model = nn.Sequential(foreign, nn.Linear(3, 3))
    y = model(torch.ones(2, 3))
    assert collect_aux_loss(model) == foreign.weight.square().sum() and foreign.aux_loss is None
    assert collect_aux_loss(model) == 0 and y.shape == (2, 3)


def peak_of_a_step(model, x, collect=True):
    memory = LiveMemory()
    with memory:
        y = model(x)
        loss = y.square().mean() + (collect_aux_loss(model) if collect else 0)
        loss.backward()
    model.zero_grad(set_to_none=False)
    return memory.peak


@pytest.mark.parametrize("recompute", [None, False], ids=["plain", "checkpointed"])
def test_losses_add_no_memory_but_their_own(recompute):
    """Compared with the same layers without losses. What a loss keeps of its own are (T, E)
    tensors."""
    weights = ("importance_weight", "load_weight", "z_weight")
    x = tokens(512)
    peaks = {}
    for weight in (0.0, 0.1):
        model = Blocks(*(layer(**dict.fromkeys(weights, weight), noise_std=1.0) for _ in range(6)))
        model.checkpointed = recompute
        peak_of_a_step(model, x)  # makes the gradients
        peaks[weight] = peak_of_a_step(model, x)
        uncollected = peak_of_a_step(model, x, collect=False)
        assert uncollected <= peaks[weight] + 1000
    own = 12 * len(x) * EXPERTS * x.element_size()  # a dozen of such tensors a layer
    assert peaks[0.1] - peaks[0.0] <= own * (6 if recompute is None else 1) + 6000


def test_checkpointed_layers_peak_like_dense_ones_and_one_layer_of_their_own():
    """However many blocks there are: what a layer needs beyond a dense MLP is there once, but for
    its weights, their gradients, and the order of its rows."""
    x, extra = tokens(512), {}
    for depth in (2, 8):
        dense = Blocks(*(Mlp(DIM, 16) for _ in range(depth)), checkpointed=False).double()
        moe = Blocks(*(layer(noise_std=1.0) for _ in range(depth)), checkpointed=False)
        for model in (dense, moe):
            peak_of_a_step(model, x)  # makes the gradients
        extra[depth] = peak_of_a_step(moe, x) - peak_of_a_step(dense, x)
    weights = sum(p.nbytes for p in moe.mlps[0].parameters())
    order = 3 * len(x) * 2 * 4  # int32 tensors of a dispatch
    assert extra[8] - extra[2] <= 6 * (2 * weights + order)
    peak_of_a_step(moe.mlps[0], x)
    assert extra[8] <= peak_of_a_step(moe.mlps[0], x)


def test_abandoned_passes_keep_no_more_than_one_graph():
    model, x = Blocks(*(layer() for _ in range(3))), tokens(256)
    alive = []
    with LiveMemory() as memory:
        before = memory.live
        for _ in range(4):
            model(x)
            gc.collect()
            alive.append(memory.live - before)
    assert max(alive) <= alive[0] + 1000
    with pytest.warns(UserWarning, match="was discarded before the next pass"):
        collect_aux_loss(model)
    gc.collect()
    assert memory.live - before < alive[0] / 4


def test_eval_mode_frees_a_pass_that_was_given_up_and_no_other():
    model, x = Blocks(*(layer() for _ in range(3))), tokens(256)
    with LiveMemory() as memory:
        before = memory.live
        model(x)
        gc.collect()
        held = memory.live - before
        model.eval()
        gc.collect()
        assert memory.live - before < held / 4

    for mlp in model.mlps:
        mlp.aux_loss = None
    y = model.train()(x)
    model.eval().train()
    with no_word():
        loss = collect_aux_loss(model)
    (y.sum() + loss).backward()
    assert loss.requires_grad


def test_a_layer_that_runs_with_and_without_gradients_gives_both_and_says_so():
    moe, x = layer(), tokens()
    model = Blocks(moe)
    stem = model.stem(x)
    y = stem + checkpoint(moe, stem, use_reentrant=True) + moe(stem)
    with pytest.warns(UserWarning, match=r"mlps\.0 has no gradient, or only for a part"):
        found = collect_aux_loss(model)
    torch.testing.assert_close(found, 2 * losses_alone(moe, stem))
    (found + y.sum()).backward()


def test_the_losses_of_a_layer_can_be_forgotten():
    moe = layer()
    moe(tokens())
    moe.aux_loss = None
    assert moe.aux_loss is None and collect_aux_loss(moe) == 0
    with pytest.raises(ValueError, match="aux_loss must be None"):
        moe.aux_loss = torch.ones(())
