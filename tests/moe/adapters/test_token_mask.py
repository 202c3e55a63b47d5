"""Padding of a patched Hugging Face model goes through no expert."""

import copy
import threading

import hf_families
import pytest
import torch
from torch import nn

from ironmoe.moe.adapters import huggingface
from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.adapters.token_mask import current_token_mask, keep_token_masks
from ironmoe.moe.huggingface import patch, unpatch

transformers = pytest.importorskip("transformers", minversion="5.17")
build, patched = hf_families.build, hf_families.patched
FUSED = [name for name, family in hf_families.FAMILIES.items() if family.activation]
IDS, OTHER = torch.randint(
    3, hf_families.VOCAB, (2, 3, 9), generator=torch.Generator().manual_seed(0)
)
LEFT = torch.tensor([[0] * 4 + [1] * 5, [0] + [1] * 8, [1] * 9])
MASKS = {"left": LEFT, "right": LEFT.flip(1), "none": torch.ones_like(LEFT)}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def output(model, ids=IDS, **options):
    out = model(input_ids=ids, **options)
    return out.logits if "logits" in out else out.last_hidden_state


def masks_seen(model):
    """The mask at each call of the experts of the first routed layer, from now on."""
    seen = []
    next(expert_sites(model)).experts.register_forward_pre_hook(
        lambda _, args: seen.append(current_token_mask(len(args[0])))
    )
    return seen


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_real_tokens_are_those_of_eager_experts_and_do_not_depend_on_padding(name):
    model = build(name)
    ours = patched(model)
    real = LEFT.bool()
    expected, actual = (output(m, attention_mask=LEFT) for m in (model, ours))
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(actual[~real], expected[~real], atol=1e-2)
    changed = output(ours, torch.where(real, IDS, OTHER), attention_mask=LEFT)
    assert torch.equal(changed[real], actual[real])


@pytest.mark.parametrize("side", MASKS)
def test_masked_tokens_cost_no_expert_row(side, monkeypatch):
    model, mask = patched(build("mixtral")), MASKS[side]
    routings = []
    expert_mlp = huggingface.expert_mlp
    monkeypatch.setattr(
        huggingface,
        "expert_mlp",
        lambda *args, **options: routings.append(args[3]) or expert_mlp(*args, **options),
    )
    output(model, attention_mask=mask)
    assert len(routings) == 2
    for routing in routings:
        rows = (routing.experts < hf_families.EXPERTS).sum(1)
        assert torch.equal(rows, mask.flatten() * hf_families.TOP_K)


@pytest.mark.parametrize(
    "mask", [LEFT.bool(), LEFT.float(), 2 * LEFT], ids=["bool", "float", "numbers of documents"]
)
def test_what_is_not_zero_is_real(mask):
    model = patched(build("mixtral"))
    seen = masks_seen(model)
    output(model, attention_mask=mask)
    assert torch.equal(seen[0], LEFT.flatten().bool())


def test_a_mask_of_ones_changes_nothing():
    model = patched(build("mixtral"))
    assert torch.equal(output(model, attention_mask=MASKS["none"]), output(model))


def test_a_mask_of_zeros_leaves_no_row_and_gives_no_gradient():
    model = patched(build("mixtral"))
    output(model, attention_mask=torch.zeros_like(LEFT)).sum().backward()
    for site in expert_sites(model):
        assert all(weight.grad.count_nonzero() == 0 for weight in site.experts.parameters())


def test_garbage_in_the_padding_reaches_no_expert():
    experts = next(expert_sites(patched(build("mixtral")))).experts
    tower = Tower(experts)
    keep_token_masks(tower)
    x = torch.randn(3, 9, 32)
    x[~LEFT.bool()] = torch.nan
    x.requires_grad_()
    y = tower(inputs_embeds=x, attention_mask=LEFT)
    y.square().sum().backward()
    assert y[~LEFT.bool()].count_nonzero() == 0 and y[LEFT.bool()].isfinite().all()
    assert x.grad[~LEFT.bool()].count_nonzero() == 0
    assert all(weight.grad.isfinite().all() for weight in experts.parameters())


class Tower(nn.Module):
    """A model around experts, and around another model if it has one."""

    def __init__(self, experts, inner=None):
        super().__init__()
        self.experts, self.inner = experts, inner

    def get_input_embeddings(self):
        return None

    def forward(self, inputs_embeds=None, attention_mask=None, inner=None, cache=None):
        if inner is not None:
            self.inner(**inner)
        x = inputs_embeds.flatten(0, 1)
        index = (torch.arange(len(x))[:, None] + torch.arange(2)) % hf_families.EXPERTS
        y = self.experts(x, index, torch.ones(len(x), 2, dtype=x.dtype))
        return y.view(inputs_embeds.shape)


class Cache:
    def __init__(self, is_compileable):
        self.is_compileable = is_compileable


X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[0, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention_mask": PADDING}, PADDING),
        ({}, None),
        ({"attention_mask": PADDING[:, None, None].expand(-1, 1, 3, 3)}, None),
        ({"attention_mask": {"full_attention": PADDING}}, None),
        ({"attention_mask": PADDING[:1]}, None),
        ({"attention_mask": PADDING[:, :2]}, None),
        ({"attention_mask": torch.cat([PADDING.flip(1), PADDING], 1)}, None),
        (
            {"attention_mask": torch.cat([PADDING.flip(1), PADDING], 1), "cache": Cache(False)},
            PADDING,
        ),
        (
            {"attention_mask": torch.cat([PADDING.flip(1), PADDING], 1), "cache": Cache(True)},
            None,
        ),
        ({"attention_mask": PADDING, "cache": Cache(True)}, PADDING),
    ],
)
@pytest.mark.parametrize("by_position", [False, True])
def test_the_mask_of_a_call_is_that_of_its_own_tokens(options, expected, by_position):
    """The last columns of a longer one, where a cache holds what came before."""
    tower = Tower(next(expert_sites(patched(build("mixtral")))).experts)
    keep_token_masks(tower)
    seen = masks_seen(tower)
    if by_position:
        tower(X, options.get("attention_mask"), None, options.get("cache"))
    else:
        tower(inputs_embeds=X, **options)
    if expected is None:
        assert seen == [None]
    else:
        assert torch.equal(seen[0], expected.flatten() > 0)


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ({"attention_mask": 1 - PADDING}, 1 - PADDING),
        ({}, None),
        # made from the mask of the model around it
        ({"attention_mask": PADDING[:, None, None].expand(-1, 1, 3, 3)}, PADDING),
        ({"inputs_embeds": X[:, :2], "attention_mask": {"full_attention": PADDING}}, None),
    ],
)
def test_a_model_inside_another_has_its_own_mask_and_ends_it(inner, expected):
    experts = [site.experts for site in expert_sites(patched(build("mixtral")))]
    outer = Tower(experts[0], Tower(experts[1]))
    keep_token_masks(outer)
    own, inside = masks_seen(outer), masks_seen(outer.inner)
    outer(inputs_embeds=X, attention_mask=PADDING, inner={"inputs_embeds": X, **inner})
    assert torch.equal(own[0], PADDING.flatten() > 0)
    assert (
        (inside[0] is None) if expected is None else torch.equal(inside[0], expected.flatten() > 0)
    )
    assert current_token_mask(X.shape[0] * X.shape[1]) is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_mask_outlives_an_error(error):
    """No hook runs after an interrupt, so there the next call of the model cleans up."""
    model = patched(build("mixtral"))
    seen = masks_seen(model)
    handle = model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda *_: raise_(error))
    with pytest.raises(error):
        output(model, attention_mask=LEFT)
    handle.remove()
    output(model)
    assert seen == [None] and current_token_mask(LEFT.numel()) is None


def raise_(error):
    raise error


def test_each_thread_has_the_mask_of_its_own_call():
    model = patched(build("mixtral"))
    both = threading.Barrier(2, timeout=60)
    seen = {}

    def look(_, args):
        both.wait()
        seen[threading.get_ident()] = current_token_mask(len(args[0]))

    model.model.layers[1].mlp.experts.register_forward_pre_hook(look)
    results = {}

    def call(side):
        output(model, attention_mask=MASKS[side])
        results[side] = seen[threading.get_ident()]

    threads = [threading.Thread(target=call, args=(side,)) for side in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {side: mask.tolist() for side, mask in results.items()} == {
        side: (MASKS[side].flatten() > 0).tolist() for side in ("left", "right")
    }


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "jamba", "nemotron_h"])
def test_generate_with_left_padding_gives_the_same_tokens(name):
    model = build(name)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS, attention_mask=LEFT, **greedy)
    ours = patched(model)
    seen = masks_seen(ours)
    assert torch.equal(ours.generate(IDS, attention_mask=LEFT, **greedy), expected)
    assert torch.equal(seen[0], LEFT.flatten() > 0) and seen[-1].all()


def gradients(model, **options):
    model.zero_grad()
    output(model, attention_mask=LEFT, **options)[LEFT.bool()].square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_know_no_mask_and_give_the_same_gradients(use_reentrant):
    model = patched(build("mixtral", torch.float64)).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    # reentrant checkpoints need an input with a gradient
    model.enable_input_require_grads()
    seen = masks_seen(model)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])
    assert seen == [None, None]
    with torch.no_grad():
        output(model, attention_mask=LEFT)
    assert torch.equal(seen[-1], LEFT.flatten() > 0)


def test_a_model_checkpointed_as_a_whole_knows_its_mask_both_times():
    model = patched(build("mixtral", torch.float64)).train()
    expected = gradients(model)
    seen = masks_seen(model)
    model.zero_grad()
    logits = torch.utils.checkpoint.checkpoint(
        lambda ids: output(model, ids, attention_mask=LEFT), IDS, use_reentrant=False
    )
    logits[LEFT.bool()].square().sum().backward()
    assert len(seen) == 2 and all(torch.equal(mask, LEFT.flatten() > 0) for mask in seen)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name])


def test_compiled_layers_that_are_checkpointed_give_the_same_gradients():
    model = patched(build("mixtral", torch.float64)).train()
    expected = gradients(model, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.compile(backend="aot_eager", fullgraph=True)
    for name, grad in gradients(model, use_cache=False).items():
        torch.testing.assert_close(grad, expected[name])
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["compile", "export"])
def test_the_mask_is_in_the_graph(how):
    model = patched(build("mixtral")).requires_grad_(False)
    given = {"input_ids": IDS, "attention_mask": LEFT, "use_cache": False}
    if how == "compile":
        graph = torch.compile(model, backend="eager", fullgraph=True)
    else:
        graph = torch.export.export(model, (), given).module()
    for mask in MASKS.values():
        actual = graph(**{**given, "attention_mask": mask}).logits
        torch.testing.assert_close(actual, output(model, attention_mask=mask))
    torch.compiler.reset()
    assert current_token_mask(LEFT.numel()) is None


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_graph_with_a_mask_takes_any_batch_of_any_length(name):
    model = patched(build(name)).requires_grad_(False)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    graph = torch.export.export(
        model,
        (),
        {"input_ids": IDS, "attention_mask": LEFT, "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
    ).module()
    for batch, length in [(3, 9), (2, 8), (3, 5)]:
        given = {
            "input_ids": IDS[:batch, -length:],
            "attention_mask": LEFT[:batch, -length:],
            "use_cache": False,
        }
        torch.testing.assert_close(graph(**given).logits, model(**given).logits)


def test_unpatch_takes_the_hooks_off_and_patching_twice_puts_them_on_once():
    model = build("mixtral")
    patch(patch(model))
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in (model, model.model)]
    assert hooks == [2, 2]
    unpatch(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "_ironmoe_hooks" not in vars(model)


def test_a_copy_has_hooks_of_its_own():
    model = patched(build("mixtral"))
    twin = copy.deepcopy(model)
    seen, expected = masks_seen(twin), output(model, attention_mask=LEFT)
    assert torch.equal(output(twin, attention_mask=LEFT), expected)
    assert torch.equal(seen[0], LEFT.flatten() > 0)
    unpatch(twin)
    output(twin, attention_mask=LEFT)
    assert seen[1] is None and model._forward_pre_hooks
