"""Balance losses of what was really routed, beside transformers' own function and the papers."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from two_processes import run_in_two_processes

from ironmoe.kernels import ExpertGroups
from ironmoe.kernels.scores import get_score
from ironmoe.moe import (
    BALANCE_LOSSES,
    Capacity,
    EnsembleRouter,
    MoE,
    TopKRouter,
    balance_loss,
    choice_counts,
    collect_aux_loss,
    deepseek_balance_loss,
    global_batch_balance_loss,
    importance_loss,
    load_loss,
    mixtral_balance_loss,
    router_z_loss,
    start_global_batch,
)

D, E, K, T = 8, 6, 2, 30
MASK = torch.rand(T, generator=torch.Generator().manual_seed(3)) < 0.6
NO_OTHERS = {"importance_weight": 0.0, "load_weight": 0.0}
ROUTERS = {
    "V-MoE's": {},
    "gpt-oss's": {"order": "topk_first", "bias": True},
    "Mixtral's": {"renormalize": True, "noise_std": 0.0},
    "DeepSeek-V3's": {
        "score": "sigmoid",
        "selection_bias": True,
        "groups": ExpertGroups(3, 2),
        "renormalize": True,
        "scale": 2.5,
    },
    "DeepSeek-V4's": {"score": "sqrtsoftplus", "selection_bias": True, "renormalize": True},
}
all_forms = pytest.mark.parametrize("form", BALANCE_LOSSES)
masks = pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])


def make(form, num_experts=E, top_k=K, **options):
    options = {**NO_OTHERS, "balance": form, "balance_weight": 1.0} | options
    router = TopKRouter(D, num_experts, top_k, **options, dtype=torch.float64)
    if router.selection_bias is not None:
        torch.nn.init.normal_(router.selection_bias, std=0.2)
    return router


def by_loops(scores_TE, experts_TK):
    """Σ f P of equations 12 to 14 of 2401.06066, and 17 to 20 of 2412.19437 for one sequence."""
    num_tokens, num_experts = scores_TE.shape
    top_k = experts_TK.shape[1]
    total = 0.0
    for i in range(num_experts):
        chosen = sum(i in experts_TK[t].tolist() for t in range(num_tokens))
        f = num_experts / (top_k * num_tokens) * chosen
        share = [scores_TE[t, i] / scores_TE[t].sum() for t in range(num_tokens)]
        total = total + f * sum(share) / num_tokens
    return total


@masks
@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("layers", [1, 3])
def test_mixtral_is_the_function_of_transformers(layers, top_k, mask):
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = tuple(torch.randn(layers, T, E).unbind())
    mine, theirs = (tuple(z.clone().requires_grad_() for z in logits) for _ in range(2))
    expected = module.load_balancing_loss_func(
        theirs, E, top_k, attention_mask=None if mask is None else mask.view(3, 10).long()
    )
    scores = torch.cat(mine).softmax(-1)
    experts = scores.topk(top_k).indices
    found = mixtral_balance_loss(
        scores, experts, mask=None if mask is None else mask.repeat(layers)
    )
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, mine), torch.autograd.grad(expected, theirs), strict=True
    ):
        torch.testing.assert_close(a, b)


@masks
def test_a_mixtral_router_has_the_loss_of_transformers_on_its_own_logits(mask):
    module = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    router = make("mixtral", renormalize=True, noise_std=0.0).float()
    _, logits, aux_loss, _ = router(torch.randn(T, D), mask=mask)
    attention = None if mask is None else mask.view(3, 10).long()
    expected = module.load_balancing_loss_func((logits,), E, K, attention_mask=attention)
    torch.testing.assert_close(aux_loss, expected)
    (found,) = torch.autograd.grad(aux_loss, router.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(found, wanted)


@masks
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("form", ["mixtral", "deepseek", "deepseek_sequence", "global_batch"])
def test_a_router_balances_what_it_routed(form, options, mask):
    """Its own scores, with noise; its own choices, after selection bias and groups."""
    router = make(form, **options)
    x, noise = torch.randn(T, D, dtype=torch.float64), torch.randn(T, E, dtype=torch.float64)
    router.noise = noise
    (_, experts), logits, aux_loss, _ = router(x, mask=mask, sequence_length=10)
    scores = get_score(router.score).value(logits + noise * router.noise_std / E)
    size = 10 if form == "deepseek_sequence" else T
    real = torch.ones(T, dtype=torch.bool) if mask is None else mask
    parts = [part[real[part]] for part in torch.arange(T).split(size)]
    expected = sum(by_loops(scores[part], experts[part]) for part in parts) / len(parts)
    expected = expected * (K if form == "mixtral" else 1)
    torch.testing.assert_close(aux_loss, expected)
    (found,) = torch.autograd.grad(aux_loss, router.weight, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, router.weight)
    torch.testing.assert_close(found, wanted)


def test_the_sequences_of_deepseek_v3_by_its_equations():
    """Without a selection bias: equation 18 counts the K best scores before it."""
    router = make("deepseek_sequence", score="sigmoid", renormalize=True, noise_std=0.0)
    x_BSD = torch.randn(3, 10, D, dtype=torch.float64)
    scores_BSE = (x_BSD @ router.weight.T).sigmoid()
    expected = [by_loops(scores, scores.topk(K).indices) for scores in scores_BSE]
    aux_loss = router(x_BSD.flatten(0, 1), sequence_length=10).aux_loss
    torch.testing.assert_close(aux_loss, torch.stack(expected).mean())
    found = deepseek_balance_loss(scores_BSE, scores_BSE.topk(K).indices)
    torch.testing.assert_close(found, torch.stack(expected))
    assert router.needs_sequence_length and not make("deepseek").needs_sequence_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_the_value_of_perfect_balance_and_of_collapse(num_experts, top_k, dtype):
    experts = torch.arange(24)[:, None].add(torch.arange(top_k)).remainder(num_experts)
    even = torch.ones(24, num_experts, dtype=dtype)
    first = torch.arange(top_k).expand(24, -1)
    collapsed = torch.zeros(24, num_experts, dtype=dtype).index_fill(1, first[0], 1.0)
    for scores, chosen, value in ((even, experts, 1.0), (collapsed, first, num_experts / top_k)):
        value = torch.tensor(value, dtype=dtype)
        torch.testing.assert_close(mixtral_balance_loss(scores, chosen), top_k * value)
        torch.testing.assert_close(deepseek_balance_loss(scores, chosen), value)
        load = choice_counts(chosen, num_experts)
        torch.testing.assert_close(global_batch_balance_loss(scores, load), value)


def test_with_one_choice_mixtral_is_gshard():
    gates = torch.randn(3, 10, E, dtype=torch.float64).softmax(-1)
    found = mixtral_balance_loss(gates, gates.argmax(-1, keepdim=True))
    torch.testing.assert_close(found, balance_loss(gates))


def test_a_dropped_choice_counts_for_no_expert():
    experts = torch.tensor([[0, 2], [3, 1], [3, 3]], dtype=torch.int32)
    assert choice_counts(experts, 3).tolist() == [1, 1, 1]
    assert choice_counts(experts, 3, mask=torch.tensor([True, False, True])).tolist() == [1, 0, 1]
    assert choice_counts(experts.view(3, 1, 2), 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert choice_counts(experts[:0], 3).tolist() == [0, 0, 0]


@all_forms
@masks
@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
def test_the_gradient_is_that_of_the_loss(form, options, mask):
    router = make(form, **options)
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    router.noise = torch.randn(9, E, dtype=torch.float64)
    mask = None if mask is None else mask[:9]

    def loss(x):
        start_global_batch(router)
        return router(x, 6, mask=mask, sequence_length=3).aux_loss

    assert torch.autograd.gradcheck(loss, x)


@all_forms
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_padding_reaches_a_balance_loss(form, value):
    scores = torch.rand(T, E, dtype=torch.float64)
    padded = scores.where(MASK[:, None], value).requires_grad_()
    experts = scores.topk(K).indices
    load = choice_counts(experts[MASK], E)
    for loss in (
        lambda s, e, **mask: mixtral_balance_loss(s, e, **mask),
        lambda s, e, **mask: deepseek_balance_loss(s, e, **mask),
        lambda s, e, **mask: global_batch_balance_loss(s, load, **mask),
    ):
        found = loss(padded, experts, mask=MASK)
        torch.testing.assert_close(found, loss(scores[MASK], experts[MASK]))
        (grad,) = torch.autograd.grad(found, padded)
        assert grad.isfinite().all() and not grad[~MASK].any()
        assert loss(padded, experts, mask=torch.zeros_like(MASK)) == 0
    router = make(form)
    x = torch.randn(T, D, dtype=torch.float64).where(MASK[:, None], value).requires_grad_()
    grads = torch.autograd.grad(router(x, 10, mask=MASK).aux_loss, [x, router.weight])
    assert all(grad.isfinite().all() for grad in grads)


@all_forms
def test_members_of_an_ensemble_are_routers_of_their_own(form):
    options = {**NO_OTHERS, "balance": form, "balance_weight": 1.0, "dtype": torch.float64}
    ensemble = EnsembleRouter(D, 2 * E, K, ensemble_size=2, **options)
    x, noise = torch.randn(T, D).double(), torch.randn(2, T, E).double()
    losses = []
    for member in range(2):
        alone = TopKRouter(D, E, K, **options)
        alone.weight.data.copy_(ensemble.weight.data[member * E : member * E + E])
        alone.noise = noise[member]
        losses.append(alone(x, 10, sequence_length=5, mask=MASK).aux_loss)
    ensemble.noise = noise
    found = ensemble(x.repeat(2, 1), 10, sequence_length=5, mask=MASK.repeat(2)).aux_loss
    torch.testing.assert_close(found, torch.stack(losses).mean())


@all_forms
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_few_tokens_and_few_experts(form, num_experts, top_k, tokens):
    router = make(form, num_experts, top_k)
    x = torch.randn(tokens, D, dtype=torch.float64)
    for mask in (None, torch.zeros(tokens, dtype=torch.bool)):
        start_global_batch(router)
        aux_loss = router(x, 3, mask=mask, sequence_length=2).aux_loss
        (grad,) = torch.autograd.grad(aux_loss, router.weight)
        assert aux_loss.isfinite() and grad.isfinite().all()
        assert aux_loss > 0 if tokens and mask is None else aux_loss == 0


@all_forms
@masks
def test_a_training_step_compiles_whole(form, mask):
    router = make(form, noise_std=0.0).float()
    twin, x = copy.deepcopy(router), torch.randn(T, D)
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    for _ in range(3):  # the global batch grows
        ours, expected = (r(x, 10, mask=mask, sequence_length=5) for r in (compiled, twin))
        torch.testing.assert_close(ours.aux_loss, expected.aux_loss)
        grads = (
            torch.autograd.grad(o.aux_loss, r.weight) for o, r in ((ours, router), (expected, twin))
        )
        torch.testing.assert_close(*grads)
    if form == "global_batch":
        assert torch.equal(router.global_load.counts, twin.global_load.counts)


@pytest.mark.parametrize(
    ("shape", "capacity"),
    [
        ((3, 10), None),
        ((3, 10), Capacity(1.0, tokens_per_group=7)),
        ((2, 1, 10), None),
        ((10,), None),
    ],
)
def test_a_layer_says_how_long_its_sequences_are(shape, capacity):
    """The axis of x before the last, also where a capacity has groups of another size."""
    router = make("deepseek_sequence", score="sigmoid", noise_std=0.0)
    layer = MoE(D, 5, E, router=router, capacity=capacity, dtype=torch.float64)
    x = torch.randn(*shape, D, dtype=torch.float64)
    y = layer(x)
    scores_BSE = (x @ router.weight.T).sigmoid().view(-1, 10, E)
    expected = deepseek_balance_loss(scores_BSE, scores_BSE.topk(K).indices).mean()
    torch.testing.assert_close(collect_aux_loss(layer), expected)
    assert y.shape == x.shape


@all_forms
def test_a_layer_hands_its_mask_to_the_loss(form):
    layer = MoE(D, 5, E, router=make(form, noise_std=0.0), dtype=torch.float64)
    x = torch.randn(T, D, dtype=torch.float64)
    losses = []
    for inputs in ((x, MASK), (x[MASK],)):
        start_global_batch(layer)
        y = layer(*inputs)
        losses.append(collect_aux_loss(layer))
        assert y.isfinite().all()
    torch.testing.assert_close(*losses)


@all_forms
@pytest.mark.parametrize("passes_at_once", [1, 3])
def test_a_layer_under_checkpointing_learns_as_without(form, passes_at_once):
    """Also where later passes have added to the load of the global batch before the first one is
    repeated."""
    layer = MoE(D, 5, E, router=make(form, noise_std=0.0), dtype=torch.float64)
    x = torch.randn(3, 10, D, dtype=torch.float64, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        start_global_batch(layer)
        for micro_batches in x.split(passes_at_once):
            outputs = [call(micro_batch) for micro_batch in micro_batches]
            (torch.stack(outputs).sum() + collect_aux_loss(layer)).backward()
        grads.append(layer.router.weight.grad.clone())
        layer.zero_grad()
    torch.testing.assert_close(*grads)


@all_forms
def test_under_the_transforms_of_torch_func(form):
    router = make(form, noise_std=0.0)
    x = torch.randn(3, 10, D, dtype=torch.float64)

    def loss(weight, x):
        call = torch.func.functional_call
        return call(router, {"weight": weight}, (x, 5), {"sequence_length": 2}).aux_loss

    router(x[0])
    start_global_batch(router)
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(router.weight, x)
    assert router.global_load.counts is None or not router.global_load.counts.any()
    for each, expected in zip(x, found, strict=True):
        start_global_batch(router)
        aux_loss = router(each, 5, sequence_length=2).aux_loss
        torch.testing.assert_close(torch.autograd.grad(aux_loss, router.weight)[0], expected)


class TestGlobalBatch:
    def test_micro_batches_have_the_load_of_all_so_far(self):
        router = make("global_batch", noise_std=0.0)
        x = torch.randn(4, T, D, dtype=torch.float64)
        for _ in range(2):
            start_global_batch(router)
            chosen = []
            for micro_batch in x:
                (_, experts), logits, aux_loss, _ = router(micro_batch)
                chosen.append(experts)
                load = choice_counts(torch.cat(chosen), E)
                expected = global_batch_balance_loss(logits.softmax(-1), load)
                torch.testing.assert_close(aux_loss, expected)
            assert torch.equal(router.global_load.counts, load)

    def test_an_even_global_batch_of_uneven_micro_batches_has_no_gradient(self):
        """What the form is for: a micro-batch of one domain may use few experts."""
        router = make("global_batch", num_experts=2, top_k=1, noise_std=0.0)
        router.weight.data.zero_()[0, 0] = 1.0
        one = torch.eye(D, dtype=torch.float64)[:1].repeat(5, 1)
        router(one)
        (grad,) = torch.autograd.grad(router(-one).aux_loss, router.weight)
        torch.testing.assert_close(grad, torch.zeros_like(grad))
        (grad,) = torch.autograd.grad(router(-one).aux_loss, router.weight)
        assert grad.abs().max() > 1e-3

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_repeated_forward_counts_once(self, use_reentrant):
        router = make("global_batch", noise_std=0.0)
        x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

        def loss(x):
            routing, _, aux_loss, _ = router(x)
            return aux_loss + routing.gates.sum()

        (expected,) = torch.autograd.grad(loss(x), x)
        counts = router.global_load.counts.clone()
        start_global_batch(router)
        checkpoint(loss, x, use_reentrant=use_reentrant).backward()
        assert torch.equal(router.global_load.counts, counts)
        torch.testing.assert_close(x.grad, expected)

    def test_eval_counts_nothing(self):
        router = make("global_batch").eval()
        router.aux_loss_in_eval = True
        x = torch.randn(T, D, dtype=torch.float64)
        assert torch.equal(router(x).aux_loss, router(x).aux_loss)
        assert router.global_load.counts is None

    def test_the_load_is_no_state_and_copies_begin_without(self):
        router = make("global_batch")
        router(torch.randn(T, D, dtype=torch.float64))
        assert not list(router.buffers()) and set(router.state_dict()) == {"weight"}
        for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            assert twin.global_load.counts is None
        assert router.global_load.counts.sum() == T * K
        router.reset_parameters()
        assert not router.global_load.counts.any()

    def test_a_pass_on_fake_tensors_leaves_no_load(self):
        router = make("global_batch", noise_std=0.0)
        with FakeTensorMode(allow_non_fake_inputs=True):
            router(torch.empty(T, D, dtype=torch.float64))
        x = torch.randn(T, D, dtype=torch.float64)
        expected = copy.deepcopy(router)(x).aux_loss
        torch.testing.assert_close(router(x).aux_loss, expected)

    def test_without_groups_of_the_capacity(self):
        """P is the mean over all tokens, also where other losses are by groups."""
        router = make("global_batch", noise_std=0.0)
        x = torch.randn(T, D, dtype=torch.float64)
        expected = router(x).aux_loss
        start_global_batch(router)
        torch.testing.assert_close(router(x, 7).aux_loss, expected)


IMPORTS = """
import torch._dynamo  # DistributedDataParallel imports it
from torch.nn.parallel import DistributedDataParallel
from ironmoe.moe import (
    TopKRouter, choice_counts, global_batch_balance_loss, start_global_batch,
)
"""
# Each process has other tokens, and process 1 none at last.
PROGRAM = """
D, E, T = 8, 6, 30
torch.manual_seed(0)
weights = {"importance_weight": 0.0, "load_weight": 0.0, "balance_weight": 1.0}
router = TopKRouter(D, E, 2, balance="global_batch", noise_std=0.0, **weights, dtype=torch.float64)
router = DistributedDataParallel(router)
x = torch.randn(2, 3, T, D, dtype=torch.float64)
x = [batch[: T - 7 * rank] for batch in x[rank]]
x[2] = x[2][: 0 if rank else T]
start_global_batch(router)
chosen = []
for batch in x:
    (_, experts), logits, aux_loss, _ = router(batch)
    everyone = [None] * 2
    dist.all_gather_object(everyone, experts)
    chosen += everyone
    load = choice_counts(torch.cat(chosen), E)
    expected = global_batch_balance_loss(logits.softmax(-1), load) if len(batch) else 0.0
    assert torch.equal(router.module.global_load.counts, load)
    torch.testing.assert_close(aux_loss, torch.as_tensor(expected).to(aux_loss))
    aux_loss.backward()
router.eval()
router.module.aux_loss_in_eval = True
if rank == 0:  # alone: nobody is waited for
    assert router.module(x[0]).aux_loss > 0
dist.barrier()
"""


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_the_load_of_a_global_batch_is_summed_over_processes(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)


def test_an_unknown_name_is_named():
    with pytest.raises(ValueError, match=r"balance must be one of \('gshard', .* got 'switch'"):
        TopKRouter(D, E, balance="switch")


def test_a_form_without_a_weight_is_said_to_have_no_effect():
    with pytest.warns(UserWarning, match="balance='mixtral' has no effect.*balance_weight is 0"):
        TopKRouter(D, E, balance="mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(D, E)
        TopKRouter(D, E, balance="mixtral", balance_weight=0.01)


SCORES, CHOICES = torch.rand(2, T, E), torch.randint(0, E, (2, T, K))
LOAD = torch.ones(E, dtype=torch.int64)


@pytest.mark.parametrize("loss", [mixtral_balance_loss, deepseek_balance_loss])
def test_arguments_of_a_balance_loss_that_changed_places_are_errors(loss):
    with pytest.raises(ValueError, match=r"scores must be floats.*got torch.int64"):
        loss(CHOICES, SCORES)
    with pytest.raises(ValueError, match=r"experts must be integers.*got torch.float32"):
        loss(SCORES, SCORES.topk(K).values)
    with pytest.raises(ValueError, match=r"experts must be integers.*got torch.bool"):
        loss(SCORES, SCORES > 0.5)
    with pytest.raises(ValueError, match=r"experts must have shape \(2, 30, 'K'\)"):
        loss(SCORES, CHOICES[0])


def test_a_load_in_the_place_of_scores_is_an_error():
    with pytest.raises(ValueError, match="scores must be floats"):
        global_batch_balance_loss(LOAD, SCORES)
    with pytest.raises(
        ValueError, match=r"scores must be floats.*got torch.float32 of shape \(6,\)"
    ):
        global_batch_balance_loss(LOAD.float(), SCORES)
    with pytest.raises(ValueError, match=r"load must have shape \(…, 6\)"):
        global_batch_balance_loss(SCORES, LOAD[:-1])
    with pytest.raises(ValueError, match="experts must be integers"):
        choice_counts(SCORES, E)


@pytest.mark.parametrize(
    "function",
    [
        lambda mask: mixtral_balance_loss(SCORES, CHOICES, mask=mask),
        lambda mask: deepseek_balance_loss(SCORES, CHOICES, mask=mask),
        lambda mask: global_batch_balance_loss(SCORES, LOAD, mask=mask),
        lambda mask: choice_counts(CHOICES, E, mask=mask),
        lambda mask: importance_loss(SCORES, mask=mask),
        lambda mask: load_loss(SCORES, SCORES, 0.1, K, mask=mask),
        lambda mask: balance_loss(SCORES, mask=mask),
        lambda mask: router_z_loss(SCORES, mask=mask),
    ],
)
def test_the_mask_of_a_loss_has_a_value_for_each_token(function):
    mask = torch.stack([MASK, ~MASK])
    torch.testing.assert_close(function(mask.int()), function(mask), rtol=0, atol=0)
    for wrong in (MASK, mask[..., None], mask[:, :-1]):
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 30\)"):
            function(wrong)
    with pytest.raises(ValueError, match="mask must be bool, or integers"):
        function(mask.float())
    with pytest.raises(TypeError, match="mask must be a tensor or None, got list"):
        function(mask.tolist())
