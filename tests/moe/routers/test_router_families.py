"""``TopKRouter`` beside the routers of Hugging Face's families: the same experts, gates and
gradients from the same weights."""

from importlib import import_module

import hf_families
import pytest
import torch

from ironmoe.moe import Capacity, ExpertGroups, TopKRouter
from ironmoe.moe.adapters.huggingface_routing import expert_sites

EXPERTS, TOP_K = hf_families.EXPERTS, hf_families.TOP_K
SIGMOID = {"score": "sigmoid", "selection_bias": True}
GROUPED = {"groups": ExpertGroups(2, 1)}
# type of docs/routers.md: {family: (options of its config, arguments of TopKRouter)}
TYPES = {
    "A": {
        "qwen2_moe": ({}, {}),
        "qwen3_moe": ({"norm_topk_prob": True}, {"renormalize": True}),
        "qwen3_next": ({}, {"renormalize": True}),
        "olmoe": ({}, {}),
        "mellum": ({}, {"renormalize": True}),
    },
    "A1": {"mixtral": ({}, {"renormalize": True}), "hunyuan_v1_moe": ({}, {"renormalize": True})},
    "A2": {
        "jamba": ({}, {}),
        "deepseek_v2": ({"routed_scaling_factor": 1.7}, {"scale": 1.7}),
        "deepseek_v2 grouped": (
            {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7},
            {"groups": ExpertGroups(2, 1, "max"), "scale": 1.7},
        ),
    },
    "B": {
        "gpt_oss": ({}, {"order": "topk_first", "bias": True}),
        "granitemoe": ({}, {"order": "topk_first"}),
        "cohere2_moe": ({}, {"order": "topk_first"}),
    },
    "B'": {
        "cohere2_moe sigmoid": (
            {"expert_selection_fn": "sigmoid"},
            {"order": "topk_first", "score": "sigmoid", "renormalize": True},
        ),
    },
    "C": {
        "deepseek_v3": ({}, {**SIGMOID, **GROUPED, "renormalize": True, "scale": 2.5}),
        "glm4_moe": ({}, {**SIGMOID, **GROUPED, "renormalize": True}),
        "dots1": ({}, {**SIGMOID, **GROUPED}),
        "nemotron_h": ({}, {**SIGMOID, "renormalize": True}),
        "exaone_moe": ({}, {**SIGMOID, **GROUPED, "renormalize": True, "scale": 2.5}),
        "kimi_linear": ({}, {**SIGMOID, **GROUPED, "renormalize": True, "scale": 2.446}),
    },
    "C'": {
        "minimax_m2": ({}, {**SIGMOID, "renormalize": True}),
        "afmoe": ({"route_scale": 1.3}, {**SIGMOID, "renormalize": True, "scale": 1.3}),
        "hy_v3": ({}, {**SIGMOID, "renormalize": True, "scale": 2.826}),
        "lfm2_moe": ({}, {**SIGMOID, "renormalize": True}),
        "laguna": (
            {"moe_router_logit_softcapping": 2.0},
            {**SIGMOID, "renormalize": True, "softcap": 2.0},
        ),
    },
    "D": {
        "deepseek_v4": (
            {},
            {"score": "sqrtsoftplus", "selection_bias": True, "renormalize": True, "scale": 1.5},
        )
    },
    "E": {"ernie4_5_moe": ({}, {"selection_bias": True, "renormalize": True})},
    "G": {"mistral4": ({}, {**GROUPED, "renormalize": True})},
}


def by_expert(gates, experts):
    """(T, E) gates, 0 where not chosen: families order their choices differently."""
    return torch.zeros(len(gates), EXPERTS, dtype=torch.float64).scatter(
        1, experts.long(), gates.double()
    )


@pytest.mark.parametrize(
    "family", [f"{kind}: {name}" for kind, families in TYPES.items() for name in families]
)
def test_the_same_router(family, rounding):
    kind, name = family.split(": ")
    options, arguments = TYPES[kind][name]
    model = hf_families.build(name.split()[0], **options)
    site = list(expert_sites(model))[-1]
    block = model.get_submodule(site.name.rpartition(".")[0])
    seen = {}
    site.router.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    site.experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(
            zip(("y", "experts", "gates"), (*args, *kwargs.values()), strict=True)
        ),
        with_kwargs=True,
    )
    model(torch.randint(3, hf_families.VOCAB, (4, 12)))
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    weight = next(
        p for n, p in site.router.named_parameters() if n.endswith("weight") and p.ndim == 2
    )
    router = TopKRouter(x.shape[1], EXPERTS, TOP_K, **arguments).eval()
    router.weight.data.copy_(weight)
    if router.bias is not None:
        router.bias.data.copy_(site.router.bias)
    if router.selection_bias is not None:
        (bias,) = [
            t
            for n, t in block.state_dict().items()
            if n.endswith(("correction_bias", "expert_bias"))
        ]
        router.selection_bias.copy_(bias.flatten())
    gates, experts = router(x).routing
    expected = by_expert(seen["gates"], seen["experts"])
    assert torch.equal(
        by_expert(torch.ones_like(gates), experts) > 0,
        by_expert(torch.ones_like(gates), seen["experts"]) > 0,
    )
    # logits, softmax, sum; both sides are scores of at most 1
    atol = rounding(x.shape[1] + EXPERTS, expected.max().item())
    torch.testing.assert_close(by_expert(gates, experts), expected, rtol=0, atol=atol)
    mix = torch.randn(EXPERTS, dtype=torch.float64)
    (grad,) = torch.autograd.grad((by_expert(gates, experts) * mix).sum(), router.weight)
    (wanted,) = torch.autograd.grad((expected * mix).sum(), weight)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def modeling(name):
    pytest.importorskip("transformers")
    try:
        return import_module(f"transformers.models.{name}.modeling_{name}"), import_module(
            "transformers"
        )
    except ImportError:
        pytest.skip(f"this transformers has no {name}")


def same_weight(router, linear):
    router.weight.data.copy_(linear.weight)
    return router.eval()


def test_dbrx_divides_by_a_p_norm():
    module, transformers = modeling("dbrx")
    x = torch.randn(40, 16)
    for p in (1.0, 2.0):
        config = transformers.DbrxConfig(
            d_model=16,
            ffn_config={
                "ffn_hidden_size": 8,
                "moe_num_experts": EXPERTS,
                "moe_top_k": 2,
                "moe_normalize_expert_weights": p,
                "hidden_size": 16,
            },
        )
        block = module.DbrxFFN(config)
        torch.nn.init.normal_(block.router.layer.weight)
        gates, experts = block.route_tokens_to_experts(block.router(x))
        ours = same_weight(TopKRouter(16, EXPERTS, 2, renormalize=p), block.router.layer)(x).routing
        assert torch.equal(ours.experts.long(), experts)
        torch.testing.assert_close(ours.gates, gates)


def test_llama4_takes_the_sigmoid_of_the_best():
    module, transformers = modeling("llama4")
    router = module.Llama4Router(
        transformers.Llama4TextConfig(
            hidden_size=16, num_local_experts=EXPERTS, num_experts_per_tok=1
        )
    )
    x = torch.randn(40, 16)
    ours = same_weight(TopKRouter(16, EXPERTS, 1, order="topk_first", score="sigmoid"), router)(
        x
    ).routing
    torch.testing.assert_close(by_expert(*ours), router(x)[0].double())


def test_longcat_biases_the_choice_and_scales():
    module, transformers = modeling("longcat_flash")
    config = transformers.LongcatFlashConfig(
        hidden_size=16,
        n_routed_experts=6,
        zero_expert_num=2,
        moe_topk=2,
        num_experts_per_tok=2,
        routed_scaling_factor=6.0,
    )
    router = module.LongcatFlashTopkRouter(config)
    torch.nn.init.normal_(router.classifier.weight)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    x = torch.randn(40, 16)
    _, gates, experts = router(x)
    ours = same_weight(
        TopKRouter(16, EXPERTS, 2, selection_bias=True, scale=6.0), router.classifier
    )
    ours.selection_bias.copy_(router.e_score_correction_bias)
    torch.testing.assert_close(by_expert(*ours(x).routing), by_expert(gates, experts))


def test_switch_transformers_drop_by_capacity():
    module, transformers = modeling("switch_transformers")
    config = transformers.SwitchTransformersConfig(
        d_model=16, num_experts=4, expert_capacity=5, router_jitter_noise=0.01, router_bias=False
    )
    router = module.SwitchTransformersTop1Router(config).eval()
    torch.nn.init.normal_(router.classifier.weight)
    x_BND = torch.randn(3, 30, 16)
    index, probability, _ = router(x_BND)
    ours = same_weight(TopKRouter(16, 4, 1, jitter=0.01), router.classifier)
    kept = Capacity(places=5, tokens_per_group=30)(ours(x_BND.flatten(0, 1)).routing, 4, 30)
    expected = (index * probability).flatten(0, 1)
    assert (expected.sum(1) == 0).sum() > 0
    torch.testing.assert_close(
        torch.zeros(90, 5).scatter(1, kept.experts.long(), kept.gates)[:, :4], expected
    )


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nllb_drops_by_capacity_and_priority(priority, before):
    module, transformers = modeling("nllb_moe")
    config = transformers.NllbMoeConfig(
        d_model=16, num_experts=4, batch_prioritized_routing=priority,
        normalize_router_prob_before_dropping=before,
        moe_eval_capacity_token_fraction=0.4, second_expert_policy="all",
    )  # fmt: skip
    router = module.NllbMoeTop2Router(config).eval()
    torch.nn.init.normal_(router.classifier.weight)
    x = torch.randn(40, 16)
    found = router.route_tokens(router.classifier(x))
    weights = next(t for t in found if t.is_floating_point() and t.shape == (40, 4))
    ours = same_weight(TopKRouter(16, 4, 2, renormalize=before), router.classifier)(x).routing
    kept = Capacity(places=16, priority=priority, renormalize=not before)(ours, 4, 40)
    assert (kept.experts == 4).any()
    torch.testing.assert_close(
        torch.zeros(40, 5).scatter(1, kept.experts.long(), kept.gates)[:, :4],
        weights,
        rtol=1e-5,
        atol=1e-6,
    )
