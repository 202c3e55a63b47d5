"""Patched Hugging Face models under PEFT and accelerate."""

import copy

import hf_families
import pytest
import torch

from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.adapters.token_mask import current_token_mask
from ironmoe.moe.huggingface import patch

pytest.importorskip("transformers", minversion="5.17")
build, patched = hf_families.build, hf_families.patched
IDS = torch.randint(3, hf_families.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
REAL = MASK.bool()


def masks_seen(model):
    seen = []
    for site in expert_sites(model):
        site.experts.register_forward_pre_hook(
            lambda _, args: seen.append(current_token_mask(len(args[0])))
        )
    return seen


def passes(model):
    model.zero_grad()
    y = model(input_ids=IDS, attention_mask=MASK).logits[REAL]
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), **grads}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_adapters_on_the_weights_of_experts_act_and_learn(name, first):
    peft = pytest.importorskip("peft", minversion="0.18")

    def adapted(model):
        torch.manual_seed(0)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        config = peft.LoraConfig(
            r=2, target_modules=[], target_parameters=targets, init_lora_weights=False
        )
        return peft.get_peft_model(model, config)

    model = build(name, torch.float64)
    expected = passes(adapted(copy.deepcopy(model)))
    ours = adapted(patched(model)) if first == "patch" else patch(adapted(copy.deepcopy(model)))
    seen = masks_seen(ours)
    actual = passes(ours)
    assert len(seen) == 2 and all(torch.equal(mask, REAL.flatten()) for mask in seen)
    assert sum("lora_" in key for key in actual) == 8 and actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, msg=lambda text, key=key: f"{key}: {text}")
    with ours.disable_adapter():
        plain = ours(input_ids=IDS, attention_mask=MASK).logits[REAL]
    torch.testing.assert_close(plain, model(input_ids=IDS, attention_mask=MASK).logits[REAL])
    merged = ours.merge_and_unload()
    again = merged(input_ids=IDS, attention_mask=MASK).logits[REAL]
    torch.testing.assert_close(again, actual["output"])


@pytest.mark.parametrize("first", ["patch", "offload"])
@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere_come_for_the_forward(first):
    accelerate = pytest.importorskip("accelerate")

    def offloaded(model):
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    model = build("mixtral")
    given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    expected = patched(model)(**given).logits
    ours = offloaded(patched(model)) if first == "patch" else patch(offloaded(model))
    seen = masks_seen(ours)
    assert torch.equal(ours(**given).logits, expected)
    assert len(seen) == 2 and all(torch.equal(mask, REAL.flatten()) for mask in seen)
    experts = next(expert_sites(ours)).experts
    assert experts.down_proj.is_meta and experts._ironmoe.activation == "swiglu"
