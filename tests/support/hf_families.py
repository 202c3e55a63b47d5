"""Tiny random models of the families whose experts run through transformers' experts interface.

``FAMILIES`` maps a family's name in transformers to how its tiny model is made; ``build(name)``
makes it, or skips the test where the installed transformers does not have the family. Below them
what the tests of the adapter share.
"""

import copy
import warnings
from importlib import import_module
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch

from ironmoe.moe.adapters.huggingface_routing import is_experts
from ironmoe.moe.huggingface import patch

VOCAB, EXPERTS, TOP_K = 64, 8, 2
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
}  # fmt: skip
LOCAL = {"num_local_experts": EXPERTS}
NUMBERED = {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8}
ROUTED = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1}
GROUPED = {**ROUTED, "n_group": 2, "topk_group": 1, "head_dim": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MLA = {**ROUTED, **LATENT, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
WINDOWED = {
    "head_dim": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "rel_extent": 64,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
LINEAR = {
    **HYBRID, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip


class Family(NamedTuple):
    """How to make a family's tiny model, and how its router scores.

    model: the class, which also says whether it generates text. options: of its config, beyond
        ``BASE``.
    score: what of the logits a token's gates are proportional to; "" if nothing (sparsemixer), None
        if the router returns no logits.
    activation: ironmoe's name for what its experts do, None for none.
    """

    model: str
    options: dict[str, Any]
    score: str | None = "softmax"
    activation: str | None = "swiglu"

    @property
    def generates(self) -> bool:
        return self.model.endswith("ForCausalLM")


FAMILIES = {
    "afmoe": Family("AfmoeForCausalLM", {**NUMBERED, "num_dense_layers": 1}, "sigmoid"),
    "aria": Family(
        "AriaTextForCausalLM",
        {"moe_num_experts": EXPERTS, "moe_topk": TOP_K, "moe_num_shared_experts": 1},
    ),
    "axk1": Family("AXK1ForCausalLM", {**MLA, **SPARSE}, "sigmoid"),
    "axk2": Family("AXK2ForCausalLM", {**MLA, **SPARSE}, "sigmoid"),
    "bailing_hybrid": Family(
        "BailingHybridForCausalLM", {**MLA, **LOCAL, **HYBRID, **SPARSE, "head_dim": 8}, "sigmoid"
    ),
    "beam": Family(
        "BeamForCausalLM", {**NUMBERED, "n_group": 2, "topk_group": 1, **SPARSE}, "sigmoid"
    ),
    "cohere2_moe": Family("Cohere2MoeForCausalLM", {**NUMBERED}),
    "deepseek_ocr2": Family("DeepseekOcr2TextModel", {**ROUTED, **SPARSE}),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", {**MLA, "first_k_dense_replace": 1}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", {**MLA, "first_k_dense_replace": 1}, "sigmoid"),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM", {**MLA, **INDEXED, "first_k_dense_replace": 1}, "sigmoid"
    ),
    "deepseek_v4": Family(
        "DeepseekV4ForCausalLM",
        {
            **ROUTED,
            **INDEXED,
            "head_dim": 16,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "mlp_layer_types": ["hash_moe", "moe"],
        },
        "sqrtsoftplus",
        activation="limited_swiglu",
    ),
    "diffusion_gemma": Family(
        "DiffusionGemmaEncoderTextModel",
        {**NUMBERED, "top_k_experts": TOP_K},
        None,
        activation="geglu_tanh",
    ),
    "dots1": Family("Dots1ForCausalLM", {**GROUPED, "first_k_dense_replace": 1}, "sigmoid"),
    "dots3_note": Family("Dots3NoteForCausalLM", {**MLA, **INDEXED, **SPARSE}, "sigmoid"),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": 16},
    ),
    "ernie4_5_vl_moe": Family(
        "Ernie4_5_VLMoeTextModel",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM", {**NUMBERED, "n_group": 2, "topk_group": 1, **SPARSE}, "sigmoid"
    ),
    "flex_olmo": Family("FlexOlmoForCausalLM", {**NUMBERED}),
    "flint": Family(
        "FlintForCausalLM",
        {**NUMBERED, "mlp_only_layers": [], "shared_expert_intermediate_size": 16},
        "sigmoid",
    ),
    "gemma4": Family(
        "Gemma4ForCausalLM",
        {
            **NUMBERED,
            "top_k_experts": TOP_K,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 8,
        },
        None,
        activation="geglu_tanh",
    ),
    "glm4_moe": Family("Glm4MoeForCausalLM", {**GROUPED, "first_k_dense_replace": 1}, "sigmoid"),
    "glm4_moe_lite": Family("Glm4MoeLiteForCausalLM", {**MLA, **SPARSE}, "sigmoid"),
    "glm4v_moe": Family(
        "Glm4vMoeTextModel",
        {
            **GROUPED,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "mrope_section": [1, 1, 2],
            },
        },
        "sigmoid",
    ),
    "glm5_next": Family(
        "Glm5NextTextModel",
        {
            **MLA,
            **INDEXED,
            **HYBRID,
            **SPARSE,
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 8,
            "linear_num_heads": 2,
        },
        "sigmoid",
        activation="limited_swiglu",
    ),
    "glm_moe_dsa": Family("GlmMoeDsaForCausalLM", {**MLA, **INDEXED, **SPARSE}, "sigmoid"),
    "gpt_oss": Family(
        "GptOssForCausalLM", {**LOCAL, "head_dim": 8}, activation="clamped_swiglu_interleaved"
    ),
    "granitemoe": Family("GraniteMoeForCausalLM", {**LOCAL}),
    "granitemoe_swa": Family("GraniteMoeSWAForCausalLM", {**LOCAL}),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {**LOCAL, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    ),
    "granitemoeshared": Family(
        "GraniteMoeSharedForCausalLM", {**LOCAL, "shared_intermediate_size": 16}
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM", {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 8}
    ),
    "hy_v3": Family("HYV3ForCausalLM", {**NUMBERED, **SPARSE}, "sigmoid"),
    "hy_v4": Family(
        "HYV4ForCausalLM", {**MLA, **INDEXED, **SPARSE}, "sigmoid", activation="limited_swiglu"
    ),
    "inkling": Family("InklingForCausalLM", {**ROUTED, **WINDOWED}, "sigmoid"),
    "inkling2": Family(
        "Inkling2ForCausalLM",
        {**ROUTED, **WINDOWED, "unpadded_vocab_size": VOCAB},
        "sigmoid",
        activation=None,
    ),
    "jamba": Family(
        "JambaForCausalLM",
        {
            "num_experts": EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        {**MLA, **LOCAL, **HYBRID, **SPARSE, "linear_head_dim": 8, "linear_num_heads": 2},
        "sigmoid",
    ),
    "kolibri1": Family("Kolibri1ForCausalLM", {**NUMBERED}, "sigmoid"),
    "laguna": Family(
        "LagunaForCausalLM",
        {**NUMBERED, "shared_expert_intermediate_size": 16, **SPARSE},
        "sigmoid",
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        {**NUMBERED, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        "sigmoid",
    ),
    "mellum": Family("MellumForCausalLM", {**NUMBERED}),
    "mimo_v2_flash": Family("MiMoV2FlashForCausalLM", {**GROUPED, **SPARSE}, "sigmoid"),
    "minimax": Family("MiniMaxForCausalLM", {**LOCAL, "head_dim": 8}),
    "minimax_m2": Family("MiniMaxM2ForCausalLM", {**LOCAL, "head_dim": 8}, "sigmoid"),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLForCausalLM", {**LOCAL, "head_dim": 8}, "sigmoid", activation="clamped_swiglu"
    ),
    "mistral4": Family("Mistral4ForCausalLM", {**MLA}),
    "mistral_large4": Family("MistralLarge4TextModel", {**MLA}),
    "mixtral": Family("MixtralForCausalLM", {**LOCAL}),
    "muse_spark": Family(
        "MuseSparkTextModel",
        {**LOCAL, "moe_intermediate_size": 16, "moe_hidden_size": 16, "head_dim": 8},
        "sigmoid",
        activation=None,
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {
            **ROUTED,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "head_dim": 8,
            "n_groups": 2,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "moe_latent_size": 24,
            "use_mamba_kernels": False,
        },
        "sigmoid",
        activation="relu2",
    ),
    "olmoe": Family("OlmoeForCausalLM", {"num_experts": EXPERTS}),
    "openai_privacy_filter": Family(
        "OpenAIPrivacyFilterForTokenClassification",
        {**LOCAL, "head_dim": 8},
        activation="clamped_swiglu",
    ),
    "phimoe": Family("PhimoeForCausalLM", {**LOCAL}, ""),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", {**NUMBERED, "shared_expert_intermediate_size": 16}),
    "qwen3_5_moe": Family("Qwen3_5MoeForCausalLM", {**NUMBERED, **LINEAR}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", {**NUMBERED}),
    "qwen3_next": Family("Qwen3NextForCausalLM", {**NUMBERED, **LINEAR}),
    "qwen3_omni_moe": Family("Qwen3OmniMoeThinkerTextModel", {**NUMBERED}),
    "qwen3_vl_moe": Family("Qwen3VLMoeTextModel", {**NUMBERED}),
    "qwen4_exp": Family(
        "Qwen4ExpForCausalLM",
        {
            **NUMBERED,
            **LINEAR,
            "hc_lowrank": 8,
            "ple_embed_dim": 16,
            "ple_layer_ids": [],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
    ),
    "solar_open": Family("SolarOpenForCausalLM", {**GROUPED}, "sigmoid"),
    "unlimited_ocr": Family("UnlimitedOcrTextModel", {**ROUTED, **SPARSE}),
    "zaya": Family("ZayaForCausalLM", {**NUMBERED, "num_experts_per_tok": 1}, None),
}


def build(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The tiny model in eval mode, its experts eager, with weights large enough that every part of
    it matters."""
    pytest.importorskip("transformers")
    family = FAMILIES[name]
    try:
        modeling = import_module(f"transformers.models.{name}.modeling_{name}")
        model_class = getattr(modeling, family.model)
        assert modeling.use_experts_implementation
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {name} behind its experts interface")
    config = model_class.config_class(**{**BASE, **family.options, **options})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return lively(model_class(config)).eval().to(dtype)


@torch.no_grad()
def lively(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with weights so large that clamps cut, with biases that matter, and a hash
    table that spreads."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
            torch.nn.init.normal_(tensor, std=0.05)
        elif name.endswith("tid2eid"):
            tensor.copy_(torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(VOCAB)]))
        elif isinstance(tensor, torch.nn.Parameter) and tensor.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(tensor, std=1.5 if "experts.gate_up_proj" in name else 0.3)
    return model


def patched(model):
    """A patched copy. No fallback may pass unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return patch(copy.deepcopy(model))


def running(model, implementation):
    """A copy that runs an implementation of transformers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if is_experts(module):
            module.config._experts_implementation_internal = implementation
    return model


def assert_as_exact(ours, theirs, exact):
    """No tensor of ours is further from float64 than twice the worst of transformers' own
    implementations, plus 32 units in the last place of its largest number. Two of them are asked
    because one may be right by luck. In a parameter of a few numbers both may
    be, all the more as the two share what surrounds the experts: there four times are allowed."""
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        error, *own = ((result[name].double() - truth).abs().max() for result in (ours, *theirs))
        few_ulp = 32 * torch.finfo(ours[name].dtype).eps * truth.abs().max()
        allowed = 2 if truth.numel() > 16 else 4
        assert error <= allowed * max(own) + few_ulp, (
            f"{name}: error {error:.2e}, transformers {[f'{e:.2e}' for e in own]}"
        )
