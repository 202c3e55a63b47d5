"""Other models that the official JAX code can build: small random ones, run by it, and by this
library (tests/data/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from ironmoe.moe import (
    Capacity,
    ExpertChoiceRouter,
    MoE,
    VMoE,
    aux_loss_in_eval,
    collect_aux_loss,
    open_vmoe_checkpoint,
    write_vmoe_checkpoint,
)

OFFICIAL = np.load(Path(__file__).parents[2] / "data" / "official_variants.npz")
SETTINGS = json.loads(str(OFFICIAL["settings"]))


def params_of(name):
    prefix = f"{name}/params/"
    return {
        key.removeprefix(prefix): OFFICIAL[key] for key in OFFICIAL.files if key.startswith(prefix)
    }


def model_of(name):
    s, params = SETTINGS[name], params_of(name)
    dispatch_dtype = torch.bfloat16 if s["bf"] and s["kind"] != "dense" else None
    if s["kind"] == "ec":
        dim, hidden_dim = next(
            a.shape[1:] for key, a in params.items() if key.endswith("Moe/Mlp/Dense_0/kernel")
        )

        def make():
            router = ExpertChoiceRouter(
                dim, s["E"], s["cf"], images_per_group=s["ipg"], multiple_of=s["mult"]
            )
            return MoE(
                dim,
                hidden_dim,
                s["E"],
                activation="gelu_tanh",
                router=router,
                dispatch_dtype=dispatch_dtype,
            )

        return VMoE.from_jax(params, make_moe=make)
    if s["kind"] in ("soft", "dense"):
        return VMoE.from_jax(
            params, **({"dispatch_dtype": torch.bfloat16} if s["kind"] == "soft" else {})
        )
    router = {"importance_weight": 0.005, "load_weight": s["load"], "balance_weight": s["gs"]}
    capacity = Capacity(s["cf"], images_per_group=s["ipg"], priority=s["bpr"])
    return VMoE.from_jax(
        params, top_k=s["K"], router=router, capacity=capacity, dispatch_dtype=dispatch_dtype
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_auxiliary_loss_and_input_gradient(name):
    s, model = SETTINGS[name], model_of(name)
    model.train(s["train"])
    for i, layer in enumerate(module for module in model.modules() if isinstance(module, MoE)):
        if s["train"]:
            layer.router.noise = torch.from_numpy(OFFICIAL[f"{name}/noise/{i}"])
    x = (
        rearrange(torch.from_numpy(OFFICIAL[f"{name}/x"]), "b h w c -> b c h w")
        .contiguous()
        .requires_grad_()
    )
    labels = torch.from_numpy(OFFICIAL[f"{name}/y"])
    with aux_loss_in_eval(model):
        logits_MBC = model.member_logits(x)
        aux_loss = collect_aux_loss(model)
    members = len(logits_MBC)
    logits = rearrange(logits_MBC, "m b c -> (b m) c")  # the official code's order
    logits_tolerance, grad_tolerance = (1e-4, 1e-2) if s["bf"] else (1e-5, 1e-5)
    torch.testing.assert_close(
        logits, torch.from_numpy(OFFICIAL[f"{name}/logits"]), rtol=0, atol=logits_tolerance
    )
    assert aux_loss.item() == pytest.approx(float(OFFICIAL[f"{name}/aux_loss"]), abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, labels.repeat_interleave(members)) + aux_loss
    (grad,) = torch.autograd.grad(loss, [x])
    expected = torch.from_numpy(OFFICIAL[f"{name}/grad_x"])
    assert (grad - expected).abs().max() <= grad_tolerance * expected.abs().max()


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_go_back_as_they_came(name):
    params, back = params_of(name), model_of(name).to_jax()
    assert set(back) == set(params)
    assert all(np.array_equal(back[key], params[key]) for key in params)


@pytest.mark.parametrize("name", SETTINGS)
def test_weights_are_read_from_files_into_a_model_that_had_no_memory(tmp_path, name):
    pytest.importorskip("msgpack")
    params, model = params_of(name), model_of(name)
    write_vmoe_checkpoint(tmp_path / "x", params, shards=2, chunk_bytes=1000)
    stored = open_vmoe_checkpoint(tmp_path / "x")
    if SETTINGS[name]["kind"] in ("soft", "dense", "ec"):
        empty = model.to("meta").to_empty(device="cpu")
        empty.load_jax(stored)
    else:
        router = {"selection_bias": not name.startswith("ensemble")}
        options = {"top_k": SETTINGS[name]["K"], "router": router}
        empty = VMoE.from_jax(stored, shard=lambda model: None, **options)
    assert all(np.array_equal(array, params[key]) for key, array in empty.to_jax().items())
    assert not any(buffer.any() for buffer in empty.buffers())


def test_another_resolution_is_the_same_for_a_model_that_had_no_memory():
    params = params_of("training-two-experts-gshard")
    models = [
        VMoE.from_jax(params, top_k=2, image_size=40, shard=shard)
        for shard in (None, lambda model: None)
    ]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert one.equal(other)


def test_an_ensembles_prediction_is_the_mean_probability():
    name = "ensemble-small"
    model = model_of(name)
    x = rearrange(torch.from_numpy(OFFICIAL[f"{name}/x"]), "b h w c -> b c h w")
    with torch.no_grad():
        members = model.member_logits(x)
        assert len(members) == SETTINGS[name]["Mem"] and not torch.allclose(members[0], members[1])
        torch.testing.assert_close(model(x).exp(), members.softmax(-1).mean(0))


def test_old_names_of_dense_checkpoints():
    """The names of the first released ViT files, and those of later ones."""
    params = params_of("dense-token-representation")
    for attention, mlp, norm in (
        ("MultiHeadDotProductAttention_1", "MlpBlock_3", "LayerNorm_2"),
        ("MultiHeadDotProductAttention_0", "MlpBlock_0", "LayerNorm_1"),
    ):
        old = {
            key.replace("Encoder/", "Transformer/")
            .replace("SelfAttention", attention)
            .replace("/Mlp/", f"/{mlp}/")
            .replace("LayerNorm_1", norm): array
            for key, array in params.items()
        }
        assert old.keys() != params.keys()
        model = VMoE.from_jax(old)
        assert all(np.array_equal(array, params[key]) for key, array in model.to_jax().items())


def test_another_resolution_takes_the_official_rule():
    """scipy.ndimage.zoom(order=1) on the grid, the token's embedding kept: linear, corner on
    corner."""
    params = params_of("training-two-experts-gshard")
    small = VMoE.from_jax(params, top_k=2)
    positions = params["Encoder/posembed_input/pos_embedding"][0]
    grid = positions[1:].reshape(*[int(len(positions) ** 0.5)] * 2, -1)
    patch, side = small.patch_size, 5
    model = VMoE.from_jax(params, top_k=2, image_size=patch * side)
    at = np.linspace(0, len(grid) - 1, side)
    low = np.minimum(at.astype(int), len(grid) - 2)
    weight = at - low
    rows = grid[low] * (1 - weight)[:, None, None] + grid[low + 1] * weight[:, None, None]
    both = rows[:, low] * (1 - weight)[None, :, None] + rows[:, low + 1] * weight[None, :, None]
    expected = np.concatenate([positions[:1], both.reshape(side * side, -1)])
    np.testing.assert_allclose(model.pos_embedding[0].detach().numpy(), expected, atol=1e-6)
    assert model(torch.rand(2, 3, patch * side, patch * side)).shape == (2, small.num_classes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("head/kernel"), "params must hold 'head/kernel'"),
        (
            lambda p: p.pop("Encoder/encoder_norm/bias"),
            "missing: Encoder/encoder_norm/bias; not known: none",
        ),
        (
            lambda p: p.update({"Encoder/extra": np.zeros(3)}),
            "missing: none; not known: Encoder/extra",
        ),
        (
            lambda p: p.update({"head/bias": np.zeros(3)}),
            r"params\['head/bias'\] must have shape \(\d+,\), got \(3,\)",
        ),
        (
            lambda p: p.update({"embedding/kernel": np.zeros((4, 4))}),
            r"params\['embedding/kernel'\] must have 4 axes",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(change, message):
    params = params_of("gap")
    change(params)
    with pytest.raises(ValueError, match=message):
        VMoE.from_jax(params, top_k=1)


def test_what_no_array_tells_must_be_given():
    with pytest.raises(ValueError, match="top_k must be given for a checkpoint with 4 experts"):
        VMoE.from_jax(params_of("gap"))
    with pytest.raises(ValueError, match="top_k must be None for a checkpoint without experts"):
        VMoE.from_jax(params_of("dense-map"), top_k=2)
    with pytest.raises(ValueError, match="heads must be"):
        VMoE.from_jax(params_of("gap"), top_k=1, heads=7)
    with pytest.raises(ValueError, match="no conv stem"):
        VMoE(8, 4, 16, 1, 2, 32, 5, stem="conv").to_jax()
