import copy
import importlib.util
import pickle
import sys
from itertools import chain

import hf_families
import pytest
import torch
from torch import nn

from ironmoe.moe.adapters import huggingface, huggingface_activation
from ironmoe.moe.adapters.huggingface_routing import expert_sites, is_experts, router_logits
from ironmoe.moe.huggingface import patch, register, unpatch

transformers = pytest.importorskip("transformers", minversion="5.17")
assert_as_exact, build, patched, running = (
    hf_families.assert_as_exact,
    hf_families.build,
    hf_families.patched,
    hf_families.running,
)
FAMILIES = hf_families.FAMILIES
FUSED = [name for name, family in FAMILIES.items() if family.activation]
IDS = torch.randint(3, hf_families.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_warnings():
    huggingface_activation._warn_once.cache_clear()


def output(model, ids=IDS, **options):
    out = model(input_ids=ids, **options)
    return out.logits if "logits" in out else out.last_hidden_state


def passes(model):
    """Output, gradient of the embeddings and of all weights, for one loss."""
    embeds = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, out: embeds.append(out) or out.retain_grad()
    )
    model.zero_grad()
    y = output(model)
    hook.remove()
    (
        y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    ).sum().backward()
    grads = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"output": y.detach(), "embeddings": embeds[0].grad, **grads}


@pytest.mark.parametrize("name", FUSED)
def test_family_gives_the_eager_values_and_gradients_of_everything(name):
    model = build(name)
    ours = patched(model)
    assert {module._ironmoe.activation for module in ours.modules() if is_experts(module)} == {
        FAMILIES[name].activation
    }
    exact = passes(copy.deepcopy(model).double())
    assert_as_exact(passes(ours), [passes(model), passes(running(model, "batched_mm"))], exact)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FUSED])
def test_family_with_experts_of_its_own_keeps_them_and_says_so_once(name):
    model = build(name)
    reason = {
        "muse_spark": "it normalises what each expert gives",
        "inkling2": "ironmoe has no activation like its _apply_gate",
    }
    with pytest.warns(
        UserWarning, match=f"Experts keeps the eager experts of transformers: {reason[name]}"
    ) as caught:
        ours = patch(copy.deepcopy(model))
    assert len(caught) == 1 < len(list(expert_sites(model)))
    for name, tensor in passes(model).items():
        assert torch.equal(passes(ours)[name], tensor)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v4", "aria", "gemma4"])
def test_family_in_float64(name):
    model = build(name, torch.float64)
    for ours, eager in zip(passes(patched(model)).values(), passes(model).values(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9 * eager.abs().max().item())


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.generates])
@pytest.mark.filterwarnings("ignore:.*keeps the eager experts")
def test_family_generates_the_same_tokens(name):
    model = build(name)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS, **greedy)
    assert torch.equal(patch(model).generate(IDS, **greedy), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*keeps the eager experts")
def test_family_is_saved_without_a_trace_and_can_be_patched_again(name, tmp_path):
    model = patch(build(name))
    assert not any("ironmoe" in key for key in model.state_dict())
    model.save_pretrained(tmp_path)
    assert "ironmoe" not in (tmp_path / "config.json").read_text()
    reloaded = type(model).from_pretrained(tmp_path)
    assert all(
        module.config._experts_implementation != "ironmoe"
        for module in reloaded.modules()
        if is_experts(module)
    )
    selected = type(model).from_pretrained(tmp_path, experts_implementation="ironmoe")
    for again in (patch(reloaded), selected):
        torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*keeps the eager experts")
def test_family_still_gives_router_logits_and_auxiliary_loss(name):
    model = build(name)
    if not hasattr(model.config, "output_router_logits"):
        pytest.skip(f"{name} has no output_router_logits")
    eager = model(input_ids=IDS, output_router_logits=True)
    ours = patch(model)(input_ids=IDS, output_router_logits=True)
    assert eager.keys() == ours.keys()
    for theirs, logits in zip(
        eager.get("router_logits") or (), ours.get("router_logits") or (), strict=True
    ):
        torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)
    if eager.get("aux_loss") is not None:
        torch.testing.assert_close(ours.aux_loss, eager.aux_loss, rtol=1e-4, atol=1e-4)


def selected_by(scores, router):
    """The two experts of each token, out of the group whose best two have the largest sum if the
    router has groups."""
    groups = getattr(router, "num_group", None) or 1
    if groups > 1 and getattr(router, "topk_method", "") != "greedy":
        grouped = scores.unflatten(1, (groups, -1))
        best = grouped.topk(2).values.sum(-1).argmax(1, keepdim=True)
        scores = grouped.masked_fill(
            torch.arange(groups)[:, None] != best[..., None], -torch.inf
        ).flatten(1)
    return scores.topk(hf_families.TOP_K).indices.sort().values


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("is_patched", [False, True])
@pytest.mark.filterwarnings("ignore:.*keeps the eager experts")
def test_router_logits_are_those_the_family_routes_by(name, is_patched):
    model, score = build(name), FAMILIES[name].score
    sites = list(expert_sites(patch(model) if is_patched else model))
    assert sites and [s.name for s in sites] == [
        n for n, module in model.named_modules() if is_experts(module)
    ]
    calls = {}
    for site in sites:
        assert (
            model.get_submodule(site.name) is site.experts
            and site.num_experts == hf_families.EXPERTS
        )
        site.router.register_forward_hook(
            lambda _m, _a, out, site=site: calls.update({site.name: [out]})
        )
        site.experts.register_forward_pre_hook(
            lambda _m, args, site=site: calls[site.name].append(args)
        )
    output(model)
    for site in (site for site in sites if site.name in calls):
        returned, (_, chosen, gates) = calls[site.name]
        logits = router_logits(returned, site.num_experts)
        if score is None:
            assert logits is None
            continue
        assert logits.shape == (len(chosen), hf_families.EXPERTS) and logits.is_floating_point()
        scores = {
            "softmax": lambda z: z.softmax(-1),
            "sigmoid": torch.sigmoid,
            "sqrtsoftplus": lambda z: nn.functional.softplus(z).sqrt(),
            "": lambda z: z,
        }[score](logits)
        if score:
            kept = scores.gather(1, chosen)
            torch.testing.assert_close(
                gates / gates.sum(1, keepdim=True), kept / kept.sum(1, keepdim=True)
            )
        if "Hash" in type(site.router).__name__:  # chooses by token id
            continue
        block = model.get_submodule(site.name.rpartition(".")[0])
        tensors = chain(block.named_parameters(), block.named_buffers())
        biases = [
            tensor
            for key, tensor in tensors
            if key.endswith(("e_score_correction_bias", "expert_bias"))
        ]
        scores = sum(biases, start=logits if name == "kolibri1" else scores)
        assert torch.equal(selected_by(scores, site.router), chosen.sort().values)
    assert calls


def test_router_logits_are_found_by_form():
    logits, index = torch.randn(5, 4), torch.zeros(5, 2, dtype=torch.int64)
    for returned in (
        logits,
        (logits, logits[:, :2], index),
        (index, logits[:, :2], logits),
        logits.view(1, 5, 4),
    ):
        assert torch.equal(router_logits(returned, 4), logits)
    for returned in (
        logits.softmax(-1),
        (logits.softmax(-1), logits, index),
        (index,),
        (),
        torch.randn(5, 3),
        torch.randn(4),
    ):
        assert router_logits(returned, 4) is None
    assert router_logits(logits[:0], 4).shape == (0, 4)


class Wrapper(nn.Module):
    """Passes on what it is asked for, as PEFT's wrappers do."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name):
        return (
            super().__getattr__(name)
            if name in ("base_layer", "_modules")
            else getattr(self.base_layer, name)
        )


def test_sites_are_found_behind_wrappers_and_only_with_routers_of_their_own_block():
    model = build("mixtral")
    plain = list(expert_sites(model))
    for layer in model.model.layers:
        layer.mlp.experts = Wrapper(Wrapper(layer.mlp.experts))
    wrapped = list(expert_sites(model))
    assert [(s.experts, s.router) for s in wrapped] == [(s.experts, s.router) for s in plain]
    del model.model.layers[0].mlp.gate
    assert [s.router is None for s in expert_sites(model)] == [True, False]
    assert [s.router for s in expert_sites(plain[0].experts)] == [None]


# A whole model.


def test_gradient_checkpointing_changes_nothing():
    model = patched(build("mixtral")).train()
    plain = passes(model)
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    for key, tensor in passes(model).items():
        assert torch.equal(tensor, plain[key])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("name", "first_call"), [("mixtral", "patched"), ("gpt_oss", "registered")]
)
def test_compiles_without_graph_breaks_where_eager_experts_cannot(name, first_call):
    model = build(name)
    model.requires_grad_(False)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=IDS)
    torch.compiler.reset()
    register()
    ours = patched(model) if first_call == "patched" else running(model, "ironmoe")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(input_ids=IDS, use_cache=False).logits, output(model), rtol=1e-4, atol=1e-4
    )
    assert ours.model.layers[0].mlp.experts._ironmoe.activation == FAMILIES[name].activation
    torch.compiler.reset()


def test_patch_selects_once_and_unpatch_restores_config_by_config():
    text = {**hf_families.BASE, **hf_families.NUMBERED}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation(
        {"": "eager", "text_config": "batched_mm", "vision_config": "grouped_mm"}
    )
    before = model.get_experts_implementation()
    keys = set(model.state_dict())
    assert patch(model) is model and patch(model) is model
    now = {"": "ironmoe", "text_config": "ironmoe", "vision_config": "grouped_mm"}
    assert model.get_experts_implementation() == now and set(model.state_dict()) == keys
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert unpatch(copied).get_experts_implementation() == before
        assert not any("ironmoe" in key for module in copied.modules() for key in vars(module))
    assert model.get_experts_implementation() == now  # copies have configs of their own
    model.set_experts_implementation({"text_config": "grouped_mm"})
    patch(model)
    assert unpatch(model).get_experts_implementation() == {**before, "text_config": "grouped_mm"}
    with pytest.raises(
        ValueError, match="must have been patched, got a Qwen3VLMoeForConditionalGeneration"
    ):
        unpatch(model)


def test_patch_reaches_configs_that_belong_to_one_layer():
    """The layers of Dots 3's vision tower have configs of their own, which
    set_experts_implementation does not reach."""
    dots = pytest.importorskip("transformers.models.dots3_note.modeling_dots3_note")
    options = {
        **hf_families.BASE,
        "pyramid_num_routed": [4, 8],
        "moe_intermediate_size": 16,
        "adapter_in_dim": 32,
    }
    model = hf_families.lively(
        dots.Dots3NoteVisionModel(transformers.Dots3NoteVisionConfig(**options))
    )
    before = [site.experts.config._experts_implementation for site in expert_sites(model)]
    ours = patched(model)
    sites = list(expert_sites(ours))
    assert [(site.num_experts, site.experts.config._experts_implementation) for site in sites] == [
        (4, "ironmoe"),
        (8, "ironmoe"),
    ]
    x = torch.randn(1, 9, 32)
    for block, own in zip(model.blocks, ours.blocks, strict=True):
        torch.testing.assert_close(own.mlp(x), block.mlp(x), rtol=1e-4, atol=1e-4)
    unpatch(ours)
    assert [site.experts.config._experts_implementation for site in sites] == before


def test_generate_on_a_gpu_does_not_switch_patched_experts():
    """There it selects batched_mm wherever grouped_mm is selected, config by config, and those it
    does not list take the model's."""
    model = patched(build("mixtral"))
    selected = model.get_experts_implementation()
    model.set_experts_implementation(
        {key: "batched_mm" if own == "grouped_mm" else own for key, own in selected.items()}
    )
    assert next(expert_sites(model)).experts.config._experts_implementation == "ironmoe"


# What is refused.


def test_models_without_experts_of_the_interface_are_refused():
    small = {**hf_families.BASE, "head_dim": 8}
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(
        ValueError,
        match="LlamaForCausalLM has no experts to patch; found no module named after experts",
    ):
        patch(dense)
    config = transformers.Llama4TextConfig(**small, num_local_experts=4, intermediate_size_mlp=24)
    with pytest.raises(
        ValueError,
        match=r"Llama4ForCausalLM has no .* found Llama4TextExperts, Llama4TextMoe; supported are",
    ):
        patch(transformers.Llama4ForCausalLM(config))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        patch("mistralai/Mixtral-8x7B-v0.1")


def test_quantised_experts_are_refused():
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = build("mixtral")
    replace_with_fp8_linear(model, quantization_config=transformers.FineGrainedFP8Config())
    with pytest.raises(
        ValueError,
        match=r"quantised experts: model\.layers\.0\.mlp\.experts is a FP8Experts of "
        r"torch\.float8_e4m3fn",
    ):
        patch(model)
    assert "_ironmoe_before" not in vars(model)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("transformers", "needs transformers 5.17 or newer"),
        ("transformers.integrations.moe", "has no experts interface"),
    ],
)
def test_missing_or_old_transformers_is_named(monkeypatch, missing, message):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=message):
        register()


def test_import_registers_nothing(monkeypatch):
    """That it does not import transformers either is tested where all light imports are."""
    interface = importlib.import_module("transformers.integrations.moe").ExpertsInterface
    monkeypatch.delitem(interface._global_mapping, "ironmoe", raising=False)
    again = importlib.util.module_from_spec(huggingface.__spec__)
    huggingface.__spec__.loader.exec_module(again)
    assert "ironmoe" not in interface._global_mapping

    again.register()
    again.register()
    assert "ironmoe" in interface().valid_keys()
